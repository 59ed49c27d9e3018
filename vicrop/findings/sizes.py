"""Right answers by object size (the ViCrop paper's section 3)."""

from pathlib import Path

from vicrop.dataset import pick
from vicrop.evaluation.result_files import place_of_size, read_results, result_path, say, size_of
from vicrop.evaluation.runner import run_task
from vicrop.evaluation.scores import pair_or_reason
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import questions_of
from vicrop.files import in_repository
from vicrop.findings.measure import NO_CROP, TRUE_CROP, where_places_are_true, with_methods
from vicrop.findings.table import Table, estimate


def sizes(run: RunSettings, out: Path) -> Table:
    """Right answers by the share of the image that the object covers: small ones are misread (the paper's section 3).

    Like the paper, it also crops at the true place: if the answer is then right, the size was the reason. That row is
    left out where a record with a size has no place.

    Raises:
        ValueError: no record has a size and a score.
    """
    records = pick(questions_of(run), run.ids, run.limit)
    wanted = {record["id"] for record in records}
    sized = [record for record in records if record.get("gt_bbox") or "size" in record]
    names, notes = where_places_are_true(sized, [*run.how.names, TRUE_CROP])
    run = with_methods(run, names)
    run_task(run)  # uses results that exist, or refuses them if their settings differ
    grader, images = run.grader, in_repository(run.image_path)
    scores: dict[str, dict[str, dict]] = {}  # size or "all" -> {method: {record id: (score, image)}}
    for method in run.how.names:
        path = result_path(run.save_path, run.model.name, run.task, method)
        for record in read_results(path):
            size, pair = size_of(record, images), pair_or_reason(record, grader)
            if isinstance(pair, str) and record["id"] in wanted:
                say(f"{path}: {pair}: it cannot be scored, and is left out")
            elif record["id"] in wanted and size and pair:
                for part in (size, "all"):
                    own = scores.setdefault(part, {})
                    own.setdefault(method, {})[record["id"]] = pair[1], record["image_path"]
                    without = own.setdefault(NO_CROP, {})
                    if "error" not in record or record["id"] not in without:  # another method may have answered it
                        without[record["id"]] = pair[0], record["image_path"]
    if not scores:
        raise ValueError(f"{run.question_path}: at least one record must have a gt_bbox and be scored, and none does")
    order = sorted(scores, key=lambda part: (part == "all", place_of_size(part)))
    shown = (NO_CROP, *run.how.names)
    rows = {part: {name: estimate(*zip(*scores[part][name].values(), strict=True)) for name in shown} for part in order}
    smallest, largest = order[0], order[-2]
    fall = rows[largest][NO_CROP]["mean"] - rows[smallest][NO_CROP]["mean"]
    if smallest != largest:
        notes.append(f"without crop, {fall:.1f} points fewer are right for {smallest} objects than for {largest} ones")
    return Table("right answers by object size", "size", "% right", rows, notes)
