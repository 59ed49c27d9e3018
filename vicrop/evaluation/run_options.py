"""The options of a run on the command line, and the RunSettings that are made of them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from vicrop.command_line import CommandParser
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import DEFAULT_TASK, chosen_task
from vicrop.options import add_method_options, add_model_options, method_choice, model_choice
from vicrop.tables import TASKS


@dataclass(frozen=True)
class Picture:
    """One picture instead of a task: its file and the question about it."""

    path: str
    question: str


# -------------------------------------------------------------------------------------------------------- the parser
def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which questions are asked, and where results are written."""
    add = parser.add_argument
    add("--task", help=f"{', '.join(TASKS)}, or NAME of your own data/NAME/data.json, or the path of such a folder; "
        f"with --question_path, what the results are called; default: {DEFAULT_TASK}")  # fmt: skip
    add("--question_path", help="a file of questions, or a dataset of the Hugging Face hub (extra `hub`); default: the "
        "task's own")  # fmt: skip
    add("--split", help="of the dataset of the hub; default: test")
    add("--subset", help="of the dataset of the hub, if it has several; default: its only one")
    add("--image_path", help="folder of the images; default: images/ beside the questions")
    add("--metric", help="how answers are scored, one or several, comma-separated: names as in docs/scores.md, or "
        "FILE.py:function of your own; default: the benchmark's, or exact")  # fmt: skip
    add("--ocr_tokens", action="store_true", help="ask with the texts of each record's ocr_tokens, as LLaVA does for "
        "TextVQA: \"Reference OCR token: ...\"")  # fmt: skip
    add("--save_path", help="folder for the results; default: data/results, or the current folder for the pictures of "
        "--image")  # fmt: skip
    add("--batch_size", type=int, help="questions that go through the model together; default: 8 on CUDA, else 1")
    add("--total_chunks", type=int, default=1, help="cut the task into this number of parts")
    add("--chunk_id", type=int, default=0, help="and answer this one of them, from 0")
    add("--limit", type=int, help="only the first so many records; default: all")
    add("--ids", help="file with the ids of the records to ask about, one per line or a JSON list; default: all")
    add("--save_maps", action="store_true", help="keep the importance maps, as float16 in NAME.maps.npz (for the page)")
    add("--retry_errors", action="store_true", help="try records again that ended in an error")
    add("--overwrite", action="store_true", help="delete earlier results of the same name")


def parser_of_runs(prog: str, description: str | None, method: str = "rel_att") -> CommandParser:
    """The parser of a run; `method` is what --method is by default."""
    parser = CommandParser(prog, description)
    parser.add_argument("--image", help="ask about this one picture; default: about a task")
    parser.add_argument("--question", help="what to ask about --image; has no default")
    add_task_options(parser)
    add_method_options(parser, method)
    add_model_options(parser)
    return parser


# ------------------------------------------------------------------------------------- from what was typed to settings
def refuse_bad_counts(given: argparse.Namespace) -> None:
    """ValueError if a number of records or of a part is out of its range, or --overwrite is given for a part only."""
    for name in ("batch_size", "limit"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    if not 0 <= given.chunk_id < given.total_chunks:
        raise ValueError(f"--chunk_id must be 0 to --total_chunks - 1, {given.total_chunks - 1}, got {given.chunk_id}")
    if given.overwrite and (given.total_chunks > 1 or given.limit or given.ids):
        raise ValueError("--overwrite forgets all records, also those that this run does not ask about: use another "
                         "--save_path (of a finding: another --out)")  # fmt: skip


def picture_of(given: argparse.Namespace) -> Picture | None:
    """The Picture of --image and --question, or None; a ValueError names an option that only tasks have."""
    if given.question is not None and not given.image:
        raise ValueError("--question needs --image, the picture that it asks about")
    if not given.image:
        return None
    of_tasks = ("ids", "limit", "save_maps", "retry_errors", "overwrite", "ocr_tokens")
    wrong = [name for name in of_tasks if getattr(given, name)] + ["total_chunks"] * (given.total_chunks > 1)
    if wrong:
        raise ValueError(f"--{wrong[0]} is about the questions of a task, and --image asks about one picture")
    return Picture(given.image, given.question or "")


def settings_of(given: argparse.Namespace, results: Path = Path("data/results")) -> RunSettings:
    """The RunSettings of a command line.

    Args:
        results: where results are written without --save_path.
    Raises:
        ValueError, OSError: an option has a value that is not allowed.
    """
    refuse_bad_counts(given)
    task = chosen_task(given.task, given.question_path, given.image_path, given.metric, given.split, given.subset,
                       results.parent)  # fmt: skip
    for name in ("prompt", "max_new_tokens"):  # those of task.json, where nothing was typed
        if getattr(given, name) is None:
            setattr(given, name, getattr(task, name))
    same = ("batch_size", "total_chunks", "chunk_id", "limit", "ids", "save_maps", "retry_errors",
            "overwrite", "ocr_tokens")  # fmt: skip
    return RunSettings(
        model=model_choice(given), how=method_choice(given),
        task=task.name, question_path=task.question_path, image_path=task.image_path, metrics=task.metrics,
        hub=task.hub, save_path=Path(given.save_path or results),
        **{name: getattr(given, name) for name in same},
    )  # fmt: skip
