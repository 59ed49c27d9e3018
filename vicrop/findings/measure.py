"""One question at a time through a model. Each measurement is kept at once, so that a killed finding can go on."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vicrop.crop import QuestionBatch
from vicrop.dataset import check_record
from vicrop.decoding import Answer
from vicrop.evaluation.batching import question_batch
from vicrop.evaluation.metrics import graded as grade
from vicrop.evaluation.own_metrics import kept as name_and_hash
from vicrop.evaluation.provenance import common_settings, method_settings
from vicrop.evaluation.result_files import result_path
from vicrop.evaluation.results import Results, with_outputs
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import questions_of, refuse_no_images
from vicrop.failures import recoverable_message
from vicrop.files import in_repository
from vicrop.findings.sample import chosen
from vicrop.layouts import Region
from vicrop.loaded import load_chosen
from vicrop.session import layer_numbers

NO_CROP, MEAN, TRUE_CROP = "no crop", "mean", "gt_crop"
RETRY = "--retry_errors tries them again"
TRIALS = 2  # questions after which it is told how long the others take: the first one alone is slower than any other


class TaskModel:
    """A loaded model that is asked one record at a time, and the grader of its task."""

    def __init__(self, run: RunSettings):
        self.loaded = load_chosen(run.model, run.how)
        self.model, self.methods = self.loaded.model, self.loaded.methods
        self.grade, self.folder = partial(grade, grader=run.grader), in_repository(run.image_path)
        self.layers = layer_numbers(self.model, MEAN)  # all of the language model's

    def ask(self, record: dict, **options: Any) -> QuestionBatch:
        """A record's question, in a fresh session of its image; `options` of the adapter go before those of the run."""
        session = self.loaded.session([check_record(record, self.folder)], **options)
        return question_batch([record], session, [0])

    def answer(self, batch: QuestionBatch) -> str:
        """The answer to a question without crop; its first pass also reads what maps of any layer will need."""
        (answer,) = batch.session.answer(
            batch.prompts, layers=self.layers if batch.prompts == batch.map_prompts else ()
        )
        return answer

    def scores_with(self, batch: QuestionBatch, boxes: Sequence[Region], original: Answer) -> dict[Region, Any]:
        """{box: the score of the answer with its crop}; the answer without one is a draft of each."""
        scores, (image,) = {}, batch.session.images
        for box in dict.fromkeys(boxes):
            (answer,) = batch.session.answers(batch.prompts, crops=[image.crop(box)], drafts=[original.tokens])
            scores[box] = self.grade(answer.text, batch.records[0])
        return scores


Measure = Callable[[TaskModel, dict], dict[str, Any]]  # (task_model, record) -> {field: value} for JSON


class Measured(list):
    """Records, each with its measured fields; `left_out` is how many could not be measured."""

    def __init__(self, records: Iterable[dict], left_out: int):
        super().__init__(records)
        self.left_out = left_out

    @property
    def notes(self) -> list[str]:
        """A sentence on those that are left out, if any are."""
        return [f"{self.left_out} records could not be measured and are left out ({RETRY})"] if self.left_out else []


def measured(
    run: RunSettings, out: Path, finding: str, measure: Measure, warm_up: bool = False,
    records: Sequence[dict] | None = None, dataset: Sequence[dict] | None = None,
    check: Callable[[TaskModel], object] = lambda _: None, **more: Any,
) -> Measured:  # fmt: skip
    """The finding's records, each with its measured fields; what an earlier call has measured is not asked again.

    A record that cannot be measured is named and left out.

        records = measured(run, out, "attention", ratios_of)

    Args:
        warm_up: measure the first record twice, and ignore the first time: some things are slow only once.
        records: those that it is about; None: what sample.chosen takes of the dataset.
        dataset: all that any call may be about, whose measurements are kept; None: the questions of the task.
        check: raises what is wrong with the model itself, before it is asked anything.
        more: settings, besides those of the run, that must be the same as in the earlier call.
    Raises:
        FileNotFoundError: there is no image folder.
        ValueError: no record could be measured; the earlier call had other settings.
    """
    dataset = questions_of(run) if dataset is None else dataset
    refuse_no_images(run)
    records = chosen(dataset, finding, run.ids, run.limit) if records is None else list(records)
    results = Results(file_of(run, out, finding, ".records.json"), settings_of(run, out) | more)
    done = {} if run.overwrite else results.done(run.retry_errors)
    todo = [record for record in records if record["id"] not in done]
    if todo:
        name = f"{run.model.name} {finding}"
        of_all = "" if len(records) == len(dataset) else f"; the task has {len(dataset)}, and --limit takes others"
        print(f"{name}: {len(todo)} of {len(records)} questions to measure, one at a time{of_all}", file=sys.stderr)
        task_model = TaskModel(run)
        check(task_model)
        if run.overwrite:  # old results are deleted only now that the model is loaded and can make new ones
            results.clear()
        if warm_up:
            fields_of(measure, task_model, todo[0])
        measure_all(todo, partial(fields_of, measure, task_model), results, name)
    _, errors = results.merge(records, dataset)
    for key, error in errors.items():
        print(f"{key}: {error}", file=sys.stderr)
    finished = results.done()
    kept = [finished[record["id"]] for record in records if record["id"] not in errors]
    if not kept:
        raise ValueError(f"no record could be measured ({RETRY})")
    return Measured(kept, len(errors))


def measure_all(todo: Sequence[dict], fields: Callable[[dict], dict], results: Results, name: str) -> None:
    """Measure records and append them to results; after the first ones it is printed how long the others will take."""
    took = 0.0
    for record in todo[:TRIALS]:
        began = time.perf_counter()
        results.append(with_outputs(record, fields(record)))
        took = time.perf_counter() - began
    rest = todo[TRIALS:]
    if rest:
        print(f"{name}: {len(rest)} more will take about {duration(took * len(rest))}", file=sys.stderr)
        for record in tqdm(rest, desc=name, unit="question"):
            results.append(with_outputs(record, fields(record)))


def fields_of(measure: Measure, task_model: TaskModel, record: dict) -> dict[str, Any]:
    """What a measurement says of a record, or its error."""
    try:
        return measure(task_model, record)
    except Exception as error:
        return {"error": recoverable_message(error)}


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def with_methods(run: RunSettings, names: Sequence[str]) -> RunSettings:
    """The run with these methods, each once, instead of its own."""
    return replace(run, how=replace(run.how, names=tuple(dict.fromkeys(names))))


def where_places_are_true(records: Sequence[dict], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(methods without gt_crop where a record has no gt_bbox, which it cannot answer, notes: a sentence on that)."""
    missing = sum(not record.get("gt_bbox") for record in records)
    if TRUE_CROP not in names or not missing:
        return list(names), []
    note = f"{missing} of {len(records)} records have no gt_bbox, so there is no {TRUE_CROP}"
    return [name for name in names if name != TRUE_CROP], [note]


def refuse_methods(names: Sequence[str], fits: Callable[[str], Any], what: str, must: str) -> None:
    """ValueError, naming the first method that does not fit a finding: what it does, and what it must."""
    for name in names:
        if not fits(name):
            raise ValueError(f"{name} {what}, and every method of this finding must {must}")


def graded(records: Measured) -> Measured:
    """The records that the benchmark counts; a ValueError if there are none."""
    found = [record for record in records if record["score"] is not None]
    if not found:
        raise ValueError(f"the benchmark must count at least one record, and counts none of these {len(records)}")
    return Measured(found, records.left_out)


def settings_of(run: RunSettings, out: Path) -> dict[str, Any]:
    """All settings that a finding in the folder `out` depends on, for JSON; its grader is one: scores are kept."""
    graded_by = name_and_hash({"grader": run.grader}, out)
    return common_settings(run) | {
        **graded_by["metrics"], **({"grader_sha256": graded_by["sha256"]} if graded_by["sha256"] else {}),
        "methods": [method_settings(run, method) for method in run.how.names],
    }  # fmt: skip


def file_of(run: RunSettings, out: Path, finding: str, ending: str) -> Path:
    """The path MODEL-TASK-FINDING with an ending, in the folder of the findings."""
    return result_path(out, run.model.name, run.task, finding).with_suffix(ending)


def images_of(records: Sequence[dict]) -> list[str]:
    """The images of the records: intervals are bootstrapped over images."""
    return [record["image_path"] for record in records]


def halved(records: Sequence[dict], seed: int = 0) -> list[list[dict]]:
    """Two lists of records about different images, with equally many images: one to choose by, the other to judge.

    Raises:
        ValueError: all records are about one image.
    """
    images = np.random.default_rng(seed).permutation(sorted(set(images_of(records))))
    first = set(images[: (len(images) + 1) // 2].tolist())
    parts = [[r for r in records if (r["image_path"] in first) is half] for half in (True, False)]
    if not all(parts):
        raise ValueError("one half of the images is to choose by and the other to judge: at least 2 images are needed")
    return parts
