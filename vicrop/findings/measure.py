"""One question at a time through a model. Each measurement is kept at once, so that a killed finding can go on."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vicrop.crop import QuestionBatch
from vicrop.dataset import check_record, pick
from vicrop.evaluation.metrics import graded as grade
from vicrop.evaluation.provenance import common_settings, method_settings
from vicrop.evaluation.result_files import result_path
from vicrop.evaluation.results import Results, with_outputs
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import questions_of
from vicrop.failures import recoverable_message
from vicrop.files import in_repository
from vicrop.loaded import load_chosen
from vicrop.session import layer_numbers

NO_CROP, MEAN = "no crop", "mean"


class TaskModel:
    """A loaded model that is asked one record at a time, and the grader of its task."""

    def __init__(self, run: RunSettings):
        self.loaded = load_chosen(run.model, run.how)
        self.model, self.methods = self.loaded.model, self.loaded.methods
        self.grade, self.folder = partial(grade, grader=run.grader), in_repository(run.image_path)
        self.layers = layer_numbers(self.model, MEAN)  # all of the language model's

    def ask(self, record: dict) -> QuestionBatch:
        """A record's question, in a fresh session of its image."""
        session = self.loaded.session([check_record(record, self.folder)])
        short = [record.get("short_question")]
        return QuestionBatch(session, [record["question"]], short_questions=short, records=[record])

    def answer(self, batch: QuestionBatch) -> str:
        """The answer to a question without crop; its first pass also reads what maps of any layer will need."""
        (answer,) = batch.session.answer(
            batch.prompts, layers=self.layers if batch.prompts == batch.map_prompts else ()
        )
        return answer


Measure = Callable[[TaskModel, dict], dict[str, Any]]  # (task_model, record) -> {field: value} for JSON


def measured(
    run: RunSettings, out: Path, finding: str, measure: Measure, warm_up: bool = False, **more: Any
) -> list[dict]:
    """The task's records, each with its measured fields; what an earlier call has measured is not asked again.

    A record that cannot be measured is named and left out.

    Args:
        warm_up: measure the first record twice, and ignore the first time: some things are slow only once.
        more: settings, besides those of the run, that must be the same as in the earlier call.
    """
    dataset = questions_of(run)
    records = pick(dataset, run.ids, run.limit)
    results = Results(file_of(run, out, finding, ".records.json"), settings_of(run) | more)
    done = {} if run.overwrite else results.done(run.retry_errors)
    todo = [record for record in records if record["id"] not in done]
    if todo:
        how_many = f"{len(todo)} of {len(records)} questions to measure, one at a time"
        print(
            f"{run.model.name} {finding}: {how_many}; after the first the bar says how long it takes", file=sys.stderr
        )
        task_model = TaskModel(run)
        if run.overwrite:  # old results are deleted only now that the model is loaded and can make new ones
            results.clear()
        for record in tqdm(todo, desc=f"{run.model.name} {finding}", unit="question"):
            try:
                if warm_up:
                    measure(task_model, record)
                    warm_up = False
                fields = measure(task_model, record)
            except Exception as error:
                fields = {"error": recoverable_message(error)}
            results.append(with_outputs(record, fields))
    _, errors = results.merge(records, dataset)
    for key, error in errors.items():
        print(f"{key}: {error}", file=sys.stderr)
    finished = results.done()
    kept = [finished[record["id"]] for record in records if record["id"] not in errors]
    if not kept:
        raise ValueError("no record could be measured")
    return kept


def with_methods(run: RunSettings, names: Sequence[str]) -> RunSettings:
    """The run with these methods, each once, instead of its own."""
    return replace(run, how=replace(run.how, names=tuple(dict.fromkeys(names))))


def graded(records: Sequence[dict]) -> list[dict]:
    """The records that the benchmark counts; a ValueError if there are none."""
    found = [record for record in records if record["score"] is not None]
    if not found:
        raise ValueError(f"the benchmark must count at least one record, and counts none of these {len(records)}")
    return found


def settings_of(run: RunSettings) -> dict[str, Any]:
    """All settings that a finding depends on, for JSON."""
    return common_settings(run) | {"methods": [method_settings(run, method) for method in run.how.names]}


def file_of(run: RunSettings, out: Path, finding: str, ending: str) -> Path:
    """The path MODEL-TASK-FINDING with an ending, in the folder of the findings."""
    return result_path(out, run.model.name, run.task, finding).with_suffix(ending)


def images_of(records: Sequence[dict]) -> list[str]:
    """The images of the records: intervals are bootstrapped over images."""
    return [record["image_path"] for record in records]
