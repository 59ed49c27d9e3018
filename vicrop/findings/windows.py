"""Right answers by the window that is cut out: the base size, and the six multiples that ViCrop chooses from."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.boxes import WINDOW_RATIOS, bbox_in_region
from vicrop.checkpoints import model_module
from vicrop.crop import QuestionBatch, method_of
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import TaskModel, graded, halved, images_of, measured, refuse_methods
from vicrop.findings.table import Table, difference, estimate, in_words
from vicrop.layouts import Region
from vicrop.methods import Method

BASES = (0.5, 1, 2)  # times the base size of the model
CHOSEN = "chosen of six"
CHOICES = {str(ratio): (ratio,) for ratio in WINDOW_RATIOS} | {CHOSEN: WINDOW_RATIOS}


def scores_by_window(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "with_crop": {method: {base in pixels: {multiple or CHOSEN: score}}}} of a record; keys as texts."""
    batch = task_model.ask(record)
    (original,) = batch.original_answers(task_model.methods)
    boxes = {name: boxes_of(batch, method) for name, method in task_model.methods.items()}
    every = [box for bases in boxes.values() for found in bases.values() for box in found.values()]
    scores = task_model.scores_with(batch, every, original)
    with_crop = {
        name: {base: {choice: scores[box] for choice, box in found.items()} for base, found in bases.items()}
        for name, bases in boxes.items()
    }
    return {"score": task_model.grade(original.text, record), "with_crop": with_crop}


def boxes_of(batch: QuestionBatch, method: Method) -> dict[str, dict[str, Region]]:
    """{base in pixels: {multiple or CHOSEN: box}} of one map."""
    (image,), own, (found,) = batch.session.images, batch.session.adapter.bbox_size, batch.find(method)
    assert found.att_map is not None  # `windows` refuses other methods
    return {
        f"{factor * own:g}": {
            choice: bbox_in_region(found.att_map, found.region, image.size, factor * own, ratios)
            for choice, ratios in CHOICES.items()
        }
        for factor in BASES
    }


def windows(run: RunSettings, out: Path) -> Table:
    """Right answers with windows of one multiple only, and with that chosen of the six, for half, one and two bases."""
    module = model_module(*run.model.checkpoint)
    refuse_methods(run.how.names, lambda name: method_of(module, name).makes_map, "makes no map", "make one")
    records = graded(measured(run, out, "windows", scores_by_window))
    images, bases = images_of(records), list(records[0]["with_crop"][run.how.names[0]])

    rows = {
        choice if choice == CHOSEN else float(choice): {
            f"{method}, base {base}": estimate(scores_of(records, method, base, choice), images)
            for method in run.how.names
            for base in bases
        }
        for choice in CHOICES
    }
    notes = [f"without a crop {in_words(estimate([record['score'] for record in records], images))} % are right"]
    notes += [*records.notes, *worth_of_choosing(records, bases[BASES.index(1)], run.how.names)]
    title = "right answers by the window's multiple of the base (pixels)"
    return Table(title, "multiple", "% right", rows, notes, curves=True)


def scores_of(records: Sequence[dict], method: str, base: str, choice: str) -> list[float]:
    """The scores of the answers with one window."""
    return [record["with_crop"][method][base][choice] for record in records]


def worth_of_choosing(records: Sequence[dict], base: str, methods: Sequence[str]) -> Iterator[str]:
    """Yield what it gives to choose among six windows: over the base, and over the best one of half of the images."""
    for method in methods:
        gain = partial(gain_over, method=method, base=base)
        told = f"{method}, base {base}: to choose among six gives"
        yield f"{told} {gain(records, choice='1')} points over always the base itself"
        if len(set(images_of(records))) > 1:
            choosing, judging = halved(records)
            best = max(map(str, WINDOW_RATIOS),
                       key=lambda choice: np.mean(scores_of(choosing, method, base, choice)))  # fmt: skip
            yield (f"{told} {gain(judging, choice=best)} points over always {best} times the base, which is best on "
                   "one half of the images, on the other half")  # fmt: skip


def gain_over(records: Sequence[dict], method: str, base: str, choice: str) -> str:
    """In words what choosing among six gives more than one of them."""
    chosen, fixed = (scores_of(records, method, base, each) for each in (CHOSEN, choice))
    return in_words(difference(chosen, fixed, images_of(records)))
