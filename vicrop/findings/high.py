"""Right answers with the map of the whole image and with that of its tiles (`_high`), by how many tiles it has."""

from pathlib import Path
from typing import Any

from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import NO_CROP, TaskModel, graded, images_of, measured, refuse_methods, with_methods
from vicrop.findings.table import Table, difference, estimate, in_words
from vicrop.tables import METHODS
from vicrop.tiles import tile_grid

TILED = "{}_high"  # the name of a method's variant with tiles
ONE, SEVERAL = "one tile", "several tiles"


def scores_by_tiles(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "tiles", "with_crop": {method: score}} of a record."""
    batch = task_model.ask(record)
    (image,), originals = batch.session.images, batch.original_answers(task_model.methods)
    rows, columns = tile_grid(image.size)
    found = {name: batch.results(method, originals)[0] for name, method in task_model.methods.items()}
    scores = {name: task_model.grade(each.crop_answer, record) for name, each in found.items()}
    return {"score": task_model.grade(originals[0].text, record), "tiles": rows * columns, "with_crop": scores}


def high(run: RunSettings, out: Path) -> Table:
    """Right answers with tiles on and off, for images that are one tile and for those that are several."""
    names = run.how.names
    refuse_methods(names, lambda name: TILED.format(name) in METHODS, "has no variant with tiles", "have one")
    pairs = {name: TILED.format(name) for name in names}
    run = with_methods(run, [each for pair in pairs.items() for each in pair])
    records = graded(measured(run, out, "high", scores_by_tiles))
    groups = {ONE: [record for record in records if record["tiles"] == 1]}
    groups |= {SEVERAL: [record for record in records if record["tiles"] > 1], "all": records}
    rows, notes = {}, records.notes
    for name, group in groups.items():
        images, crops = images_of(group), [record["with_crop"] for record in group]
        rows[name] = {NO_CROP: estimate([record["score"] for record in group], images)}
        rows[name] |= {each: estimate([scores[each] for scores in crops], images) for each in run.how.names}
        if not group:
            notes.append(f"no image here is {name}")
            continue
        for plain, tiled in pairs.items():
            gain = difference([scores[tiled] for scores in crops], [scores[plain] for scores in crops], images)
            notes.append(f"{name}: tiles change {plain} by {in_words(gain)} points")
    return Table("right answers with the map of the whole image and of its tiles", "image", "% right", rows, notes)
