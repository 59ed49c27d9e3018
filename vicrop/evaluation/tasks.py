"""Tasks: the benchmarks of tables.TASKS, and own data: a folder with data.json and, if it says more, a task.json.

{"metric": ["exact", "my_metrics.py:close_enough"], "prompt": "{question} Answer with one word.", "max_new_tokens": 40}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from vicrop.dataset import ASKED, checked, load_task, name_of, shown
from vicrop.evaluation.metrics import OF_BOXES, metrics_named, note_on_few_labels
from vicrop.evaluation.settings import RunSettings
from vicrop.files import ROOT, in_repository, read_json, safe_name
from vicrop.hub import SPLIT, HubDataset
from vicrop.tables import TASKS, known

QUESTIONS, SETTINGS, IMAGES = "data.json", "task.json", "images"  # what a task's folder may hold
DEFAULT_TASK, DEFAULT_METRIC = "demo", "exact"  # the metric of own data: one label is enough for it
Word = Annotated[str, Meta(min_length=1)]
Words = Annotated[list[Word], Meta(min_length=1)]
Metrics = Annotated[Word | Words | None, Meta(description="{} is a metric's name, or a list of names")]
Prompt = Annotated[str | None, Meta(description="{} is a text with {{question}} in it once")]
Count = Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="{} is a whole number from 1 on")]
Folder = Annotated[Word | None, Meta(description="{} is the folder of the images, as seen from this file")]


class TaskFile(msgspec.Struct):
    """What a task.json may say; an option of the command line goes before it."""

    metric: Metrics = None
    prompt: Prompt = None
    max_new_tokens: Count = None
    image_path: Folder = None

    def __post_init__(self):
        if self.prompt is not None and self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt is a text with {{question}} in it once, not {self.prompt!r}")


@dataclass(frozen=True)
class Task:
    """Questions, and what belongs to them.

    Attributes:
        name: a part of the names of its results.
        question_path: its data.json; image_path: the folder of its images.
        metrics: {metric: grader} (see metrics.metrics_named).
        hub: where the questions are copied from, if they are not there yet.
        prompt, max_new_tokens: how it is asked; None: as always.
    """

    name: str
    question_path: str
    image_path: Path
    metrics: Mapping[str, str]
    hub: HubDataset | None = None
    prompt: str | None = None
    max_new_tokens: int | None = None


# ------------------------------------------------------------------------------------------------------- which it is
def chosen_task(
    name: str | None = None, question_path: str | None = None, image_path: str | None = None, metric: str | None = None,
    split: str | None = None, subset: str | None = None, data: Path = Path("data"),
) -> Task:  # fmt: skip
    """The Task of a command line; its questions are not read yet.

    Args:
        name: of tables.TASKS, of a folder in `data`, or the path of a folder; with a question_path only what the
            results are called, and whose metrics they have.
        question_path: a file, or a dataset of the hub; image_path: the folder of the images.
        metric: names, comma-separated; split, subset: of the dataset; data: the folder of own tasks.
    Raises:
        ValueError: no such task, metric, file or function; a task.json that says something else than it may.
    """
    if question_path is None and (split or subset):
        raise ValueError("--split and --subset are about a dataset of the hub, which --question_path names")
    hub = None
    if name is not None and question_path is not None:
        refuse_almost_known(name)
    if question_path is None:
        name, file = named_task(name or DEFAULT_TASK, data)
    elif hub := hub_dataset(question_path, split, subset, data):
        name, file = name or hub.folder.name, hub.questions
    else:
        file = file_of(question_path)
        name = name or (file.resolve().parent.name if file.name == QUESTIONS else file.stem)
    settings_file = in_repository(file).parent / SETTINGS
    said = read_task_file(settings_file)
    images = file.parent / (said.image_path or IMAGES)
    return Task(
        name, str(file), Path(image_path or images), metrics_of(name, metric, said, settings_file), hub, said.prompt,
        said.max_new_tokens,
    )  # fmt: skip


def named_task(name: str, data: Path) -> tuple[str, Path]:
    """(its name, its data.json) of a task of tables.TASKS, of a folder in `data`, or of a folder's path.

    Raises:
        ValueError: there is none; it names those that there are, and where its questions would be.
    """
    if name in TASKS:
        return name, Path(TASKS[name]["question_path"])
    for folder in (data / name, ROOT / "data" / name, Path(name)):
        if (folder / QUESTIONS).is_file():
            return folder.resolve().name, folder / QUESTIONS
    own = sorted(path.parent.name for path in data.glob(f"*/{QUESTIONS}"))
    try:
        known(name, list(dict.fromkeys([*TASKS, *own])), "task")
    except ValueError as error:
        raise ValueError(f"{error}; questions of your own would be in {data / name / QUESTIONS}") from None
    raise AssertionError(f"{name} is known, and was not found")


def refuse_almost_known(name: str) -> None:
    """ValueError if a task of one's own is called almost as a benchmark: that would be a mistyped benchmark."""
    near = get_close_matches(name, TASKS, n=1, cutoff=0.8)
    if near and near[0] != name:
        raise ValueError(f"did you mean the task {near[0]}? {name!r} is too near for a name of your own")


def file_of(question_path: str) -> Path:
    """The file of questions that a path means: itself, or the data.json of a folder."""
    path = Path(question_path)
    return path / QUESTIONS if (in_repository(path) / QUESTIONS).is_file() else path


def hub_dataset(name: str, split: str | None, subset: str | None, data: Path) -> HubDataset | None:
    """The HubDataset that is called so, copied into a folder of `data`; None if it is a file.

    Raises:
        ValueError: a split or a subset of a file.
    """
    path = in_repository(file_of(name))
    if path.is_file() or path.suffix in (".json", ".jsonl"):
        if split or subset:
            raise ValueError(f"--split and --subset are about a dataset of the hub, and {name} is a file")
        return None
    split = split or SPLIT
    return HubDataset(name, split, data / "_".join(map(safe_name, filter(None, (name, subset, split)))), subset)


# ---------------------------------------------------------------------------------------------------------- task.json
def read_task_file(path: Path) -> TaskFile:
    """What a task.json says; nothing, if there is none.

    Raises:
        ValueError: naming the file and the field: there is no such field, or it is not what it must be.
    """
    said = read_json(path) if path.exists() else {}
    for name in said if isinstance(said, dict) else ():
        known(name, [each.name for each in msgspec.structs.fields(TaskFile)], f"field in {path}:")
    return checked(said, TaskFile, str(path))


def metrics_of(name: str, metric: str | None, said: TaskFile, settings_file: Path) -> Mapping[str, str]:
    """{metric: grader}: what the command line says, or else task.json, or else a benchmark; else `exact`."""
    if metric is not None:
        return metrics_named([each.strip() for each in metric.split(",")])
    if said.metric is None:
        return TASKS[name]["metrics"] if name in TASKS else metrics_named([DEFAULT_METRIC])
    try:
        return metrics_named([said.metric] if isinstance(said.metric, str) else said.metric, settings_file.parent)
    except ValueError as error:
        raise ValueError(f"{settings_file}: metric: {error}") from None


# ---------------------------------------------------------------------------------------------------------- questions
def refuse_no_images(run: RunSettings) -> None:
    """FileNotFoundError if the folder of a run's images is not there."""
    if not in_repository(run.image_path).is_dir():
        raise FileNotFoundError(f"no image folder at {run.image_path}: --image_path names it")


def questions_of(run: RunSettings) -> list[dict]:
    """The records of a run's task, which are copied from the hub first, if they are to come from there.

    Raises:
        OSError, ValueError: as hub.HubDataset.fetch, dataset.load_task and with_ocr_tokens raise them.
    """
    if run.hub is not None:
        run.hub.fetch()
    records = load_task(run.question_path)
    return with_ocr_tokens(records, run.question_path) if run.ocr_tokens else records


def with_ocr_tokens(records: Sequence[dict], question_path: str) -> list[dict]:
    """The records, each with what is asked in place of its question: the question and its ocr_tokens.

    That is LLaVA's protocol for TextVQA (llava_textvqa_val_v051_ocr.jsonl); a record with no token gets an empty list.
    The map is made for the bare question: the tokens would draw it to all texts of the image.

    Raises:
        ValueError: naming the file and a record: it has none, or they are no list of texts.
    """
    found = []
    for record in records:
        tokens = record.get("ocr_tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            what = f"not {shown(tokens)}" if "ocr_tokens" in record else "and it has none"
            raise ValueError(f"{question_path}: --ocr_tokens needs ocr_tokens in every record, a list of texts: "
                             f"{name_of(record)}, {what}")  # fmt: skip
        question = record.get("question")
        asked = {ASKED: f"{question}\nReference OCR token: {', '.join(tokens)}"} if isinstance(question, str) else {}
        found.append(record | asked)
    return found


def notes_on_labels(run: RunSettings, records: Sequence[dict]) -> list[str]:
    """Sentences on what the labels of records mean for their scores, where these will surprise."""
    judged_by_labels = not set(run.metrics.values()) <= set(OF_BOXES)
    without = sum(not record.get("labels") for record in records) if judged_by_labels else 0
    said = [f"{without} of {len(records)} records have no labels: they are answered, and not scored"] if without else []
    return [*said, *filter(None, (note_on_few_labels(records, grader) for grader in run.metrics.values()))]
