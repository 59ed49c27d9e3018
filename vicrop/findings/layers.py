"""Right answers by the layer that is read: chosen on one half of the images, judged on the other."""

from pathlib import Path
from typing import Any

from vicrop.checkpoints import model_module
from vicrop.crop import method_of
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import MEAN, TaskModel, graded, halved, images_of, measured, refuse_methods
from vicrop.findings.table import Table, estimate, in_words


def scores_by_layer(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "with_crop": {method: {layer or MEAN: score}}} of a record; layers as texts."""
    batch, answers = task_model.ask(record), {}  # {boxes: answer}: layers with the same boxes share an answer
    score_of, scores = task_model.grade(task_model.answer(batch), record), {name: {} for name in task_model.methods}
    for name, method in task_model.methods.items():
        for choice in (
            MEAN,
            *task_model.layers,
        ):  # the mean comes first: it reads all layers at once, and the session keeps them
            ((boxes, *_),) = batch.find(method.bind(task_model.model, choice))
            if boxes not in answers:
                crops = [[batch.session.images[0].crop(box) for box in boxes]]
                (answers[boxes],) = batch.session.answer(batch.prompts, crops=crops)
            scores[name][str(choice)] = task_model.grade(answers[boxes], record)
    return {"score": score_of, "with_crop": scores}


def layers(run: RunSettings, out: Path) -> Table:
    """Right answers with the crop of each layer; the best is chosen on one half of the images, judged on the other.

    The notes also tell what the mean of all layers costs, which needs no data to choose a layer (the paper's ablation).
    """
    module = model_module(*run.model.checkpoint)
    refuse_methods(run.how.names, lambda name: "layers" in method_of(module, name).reads, "reads no layer", "read one")
    records = graded(measured(run, out, "layers", scores_by_layer))
    halves = dict(zip(("to choose", "to judge"), halved(records), strict=True))
    numbers = [int(choice) for choice in records[0]["with_crop"][run.how.names[0]] if choice != MEAN]
    rows = {
        choice: {
            f"{method}, {name}": estimate([r["with_crop"][method][str(choice)] for r in half], images_of(half))
            for method in run.how.names
            for name, half in halves.items()
        }
        for choice in (*numbers, MEAN)
    }
    judging, notes = halves["to judge"], records.notes
    for method in run.how.names:
        chosen_by = {layer: rows[layer][f"{method}, to choose"]["mean"] for layer in numbers}
        best = max(numbers, key=chosen_by.__getitem__)
        tied = [layer for layer in numbers if chosen_by[layer] == chosen_by[best]]
        choice = f"layer {best} is chosen" + (f" (the first of {len(tied)} that are equal)" if len(tied) > 1 else "")
        scores = [record["with_crop"][method] for record in judging]
        cost = in_words(estimate([each[str(best)] - each[MEAN] for each in scores], images_of(judging)))
        right = in_words(rows[best][f"{method}, to judge"])
        notes.append(f"{method}: {choice}; on the other half {right} % are right, "
                     f"and averaging all layers costs {cost} points")  # fmt: skip
    without = in_words(estimate([record["score"] for record in judging], images_of(judging)))
    notes.append(f"on the other half {without} % are right without a crop")
    judged = tuple(f"{method}, to judge" for method in run.how.names)
    return Table("right answers with the crop of each layer", "layer", "% right", rows, notes, judged, curves=True)
