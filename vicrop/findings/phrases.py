"""Phrases with a box each, for findings about localization heads: as records of a task, and the run over them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vicrop.dataset import GROUNDING, Query, box_of_truth, checked, refuse_bad_ids
from vicrop.evaluation.provenance import checkpoint_name
from vicrop.evaluation.settings import RunSettings
from vicrop.files import PACKAGE, in_repository, read_rows

SETTINGS = PACKAGE / "localization" / "conf" / "model"  # how phrases are read with some models


def phrases_of(run: RunSettings) -> tuple[RunSettings, list[dict]]:
    """(the run, over phrases in place of questions; its records, with the phrase as `question` and a `gt_bbox`).

    They are those of --question_path, if that is a file of JSON lines as localization.evaluate_boxes takes it (`id` or
    `question_id`, `prompt`, `image_path`, `bbox` [x, y, width, height]); else those of GROUNDING beside the questions.

    Raises:
        FileNotFoundError, ValueError: there is no such file; a line that is none of these.
    """
    path = in_repository(run.question_path)
    path = path if path.suffix == ".jsonl" else path.parent / GROUNDING
    if not path.is_file():
        raise FileNotFoundError(f"no phrases at {path}: --question_path must be a file of JSON lines with id, prompt, "
                                f"image_path and bbox, or have {GROUNDING} beside it")  # fmt: skip
    rows = read_rows(path)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must have lines, each an object with id, prompt, image_path and bbox")
    rows = [row | {"id": row.get("id", row.get("question_id"))} for row in rows]
    refuse_bad_ids(rows, path)
    for row in rows:
        checked(row, Query, f"{path}, {row['id']!r}")
    images = [(path.parent / row["image_path"]).resolve() for row in rows]  # an absolute path stays as it is
    folder = Path(os.path.commonpath([image.parent for image in images]))
    records = [
        {"id": row["id"], "question": row["prompt"], "image_path": str(image.relative_to(folder)),
         "gt_bbox": list(box_of_truth(row, f"{path}, {row['id']!r}")[0])}
        for row, image in zip(rows, images, strict=True)
    ]  # fmt: skip
    return replace(run, question_path=str(path), image_path=folder, hub=None), records


@dataclass(frozen=True)
class Asking:
    """How localization/ asks a model for a phrase, as far as it has settings for that checkpoint.

    Attributes:
        conv_mode: how the phrase stands before the model (config.ConvMode).
        notes: a sentence if it shows images to the model otherwise than the run does.
    """

    conv_mode: str
    notes: list[str]


def asking_of(run: RunSettings) -> Asking:
    """The Asking of a run's model: by its name, or by its checkpoint."""
    said: Any = OmegaConf.create({})
    for path in sorted(SETTINGS.glob("*.yaml")):
        settings: Any = OmegaConf.load(path)
        if path.stem == run.model.name or settings.get("name") == checkpoint_name(run.model):
            said = settings
    own = {name: value for name, value in said.get("look", {}).items() if run.model.options.get(name) != value}
    options = " ".join(f"--{name} {value}" for name, value in own.items())
    notes = [f"localization/ asks this checkpoint with {options}: without it, as here, figures differ"] if own else []
    return Asking(said.get("conv_mode", "referseg"), notes)
