"""Result files on disk: what they are called, how they were made, and what is in them. Needs no torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicrop.dataset import box_of, field_of, image_of, load_task, refuse_bad_ids, with_ids
from vicrop.evaluation.metrics import OF_BOXES
from vicrop.evaluation.own_metrics import changed_since, found_again
from vicrop.files import ROOT, in_repository, read_json, read_meta, safe_name
from vicrop.images import size_as_seen
from vicrop.tables import METHODS, MODELS, SIZES, TASKS, size_class

REFERENCE_METHODS = ("grad", "grad_high")  # further names of methods in the published code
KNOWN_METHODS = (*METHODS, *REFERENCE_METHODS)


def say(sentence: str) -> None:
    """Print a sentence about a file or record, such as that it is left out, to stderr: the table goes to stdout."""
    print(sentence, file=sys.stderr)


# -------------------------------------------------------------------------------------------------------------- names
def result_path(folder: str | Path, model: str, task: str, method: str) -> Path:
    """FOLDER/MODEL-TASK-METHOD.json, safe for any model id and task name; `name_of` reads it back."""
    parts = safe_name(model), *(safe_name(name).replace("-", "_") for name in (task, method))
    return Path(folder) / f"{'-'.join(parts)}.json"


def name_of(path: Path, meta: dict) -> tuple[str, str, str]:
    """(model, task, method) of a result file, from its .meta.json or else from its name; any model is allowed.

    Raises:
        ValueError: neither tells them, or the method is unknown, or the task, and nothing tells how it is scored.
    """
    said = [meta.get("settings", {}).get(name) for name in ("model", "task", "method")]
    parts = said if all(isinstance(name, str) for name in said) else path.stem.rsplit("-", 2)
    if len(parts) != 3:
        raise ValueError(f"{path.name} in {path.parent} is not named MODEL-TASK-METHOD.json")
    model, task, method = parts
    tasks = TASKS if "scoring" not in meta else [*TASKS, task]
    for name, table, what in ((task, tasks, "task"), (method, KNOWN_METHODS, "method")):
        if name not in table:
            raise ValueError(f"{path.name} in {path.parent}: unknown {what} {name!r}, known are {', '.join(table)}")
    return model, task, method


def place_in_table(name: str) -> tuple[int, str]:
    """A sort key: tasks, models and methods as tables.py lists them, then all others by name."""
    return place_among([*TASKS, *MODELS, *KNOWN_METHODS], name), name


def place_among(names: Sequence[str], name: str) -> int:
    """The place of a name in a list; the length of the list if the name is not in it."""
    return names.index(name) if name in names else len(names)


# -------------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class ResultFile:
    """A result file: its path, its model, task and method, its records, and how they were made."""

    path: Path
    model: str
    task: str
    method: str
    records: list[dict]
    meta: dict[str, Any]  # what its .meta.json says of how it was made; empty without one

    @classmethod
    def read(cls, path: str | Path) -> "ResultFile":
        """The ResultFile at a path.

        Raises:
            FileNotFoundError, ValueError: there is no such file; its name is not that of a result; it holds no records.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no result file at {path}: run.py writes data/results/MODEL-TASK-METHOD.json")
        meta = meta_of(path)
        return cls(path, *name_of(path, meta), read_results(path), meta)

    @property
    def way(self) -> str:
        """Its method, with what its run made otherwise than with one crop for every question."""
        made = self.meta.get("settings", {})
        regions = f", {made['regions']} regions" if "regions" in made else ""
        return self.method + regions + (f" below {made['crop_below']:g}" if "crop_below" in made else "")

    @property
    def images(self) -> Path:
        """The folder of its images."""
        said = self.meta.get("settings", {}).get("image_path")
        return ROOT / (TASKS[self.task]["image_path"] if said is None else said)

    @property
    def metrics(self) -> dict[str, str]:
        """{metric: grader} by which its run was to be scored, or else that of the benchmark."""
        scoring = self.meta.get("scoring")
        return found_again(scoring, self.path.parent) if scoring else dict(TASKS[self.task]["metrics"])

    @property
    def changed_metrics(self) -> list[Path]:
        """The files of metrics that are not what they were when the run was made."""
        return changed_since(self.meta.get("scoring", {}), self.path.parent)

    def is_unlabelled(self, record: dict, grader: str) -> bool:
        """Has a record of own data no labels, and the grader reads some? It is then only looked at.

        A benchmark's record has labels, or it is broken.
        """
        return self.task not in TASKS and grader not in OF_BOXES and not record.get("labels")

    @property
    def missing(self) -> int | None:
        """How many records of the dataset the file lacks; None if that is not known."""
        counts = self.meta.get("counts", {})
        if "dataset" in counts:  # of the dataset that was asked about
            return counts["dataset"] - len(self.records)
        if self.task not in TASKS:
            return None
        path, ids = in_repository(TASKS[self.task]["question_path"]), {record["id"] for record in self.records}
        try:
            known = {record["id"] for record in load_task(path)} if path.is_file() else set()
        except (ValueError, OSError) as error:
            say(f"{error}: so the number of missing records is not known")
            return None
        return len(known - ids) if ids <= known else None


def result_files(folder: str | Path) -> tuple[list[ResultFile], list[str]]:
    """(the results of a folder in the order of the tables, [for each other file a sentence on why it is left out]).

    Raises:
        ValueError: there are no result files, and no run has begun one.
    """
    found, left_out = [], []
    paths = [path for path in sorted(Path(folder).glob("*.json")) if not path.name.endswith(".meta.json")]
    for path in paths:
        if not path.name.startswith((".", "evaluation_report")):
            try:
                found.append(ResultFile.read(path))
            except (ValueError, OSError) as error:
                left_out.append(f"{error}: it is left out")
    if not found and not left_out and not list(Path(folder).glob("*.parts")):
        raise ValueError(f"no result files in {folder}: run `bash run_all.sh` or run.py first")
    found.sort(key=lambda file: [place_in_table(name) for name in (file.task, file.model, file.method)])
    return found, left_out


def read_results(path: Path) -> list[dict]:
    """The records of a result file; those without an id are named and left out.

    Raises:
        ValueError: the file is no complete JSON list of records, no record has an id, or an id comes twice.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}, not a list of records")
    records, nameless = with_ids(records)
    refuse_bad_ids(records, path)
    if nameless and not records:
        raise ValueError(f"{path}: {nameless[0]}")
    for sentence in nameless:
        say(f"{path}: {sentence}: it is left out")
    return records


def meta_of(path: Path) -> dict[str, Any]:
    """What a result's .meta.json says of how it was made; empty if there is none, or if it cannot be read (printed)."""
    try:
        return read_meta(path.with_suffix(".meta.json"))
    except (ValueError, OSError) as error:
        say(f"{error}: {path.name} is taken without it")
        return {}


# -------------------------------------------------------------------------------------------------------------- sizes
def size_of(record: dict, image_folder: str | Path) -> str | None:
    """small, medium or large by the part of the image that gt_bbox covers; None without gt_bbox or image."""
    if "size" in record or not record.get("gt_bbox"):
        return record.get("size")
    try:
        size = field_of(record, "image_size") or size_as_seen(image_of(record, image_folder))
        x1, y1, x2, y2 = box_of(record, image_size=size)
    except (ValueError, OSError):  # no image, or no box in it: the run has printed that
        return None
    return size_class((x2 - x1) * (y2 - y1) / (size[0] * size[1]))


def place_of_size(size: str) -> int:
    """A sort key: small, medium, large, then all others."""
    return place_among(list(SIZES), size)
