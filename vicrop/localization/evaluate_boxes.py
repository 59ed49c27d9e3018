"""How well boxes match: IoU, the share above thresholds, and pointing accuracy.

python -m localization.evaluate_boxes --dataset-jsonl GT.jsonl --pred-root OUTPUTS/MODEL --id-field question_id

Each line of GT.jsonl is an object with an id and `bbox`, [x, y, width, height] in pixels. A prediction is a file
`<id>_bbox.json` with `bbox`, [x1, y1, x2, y2] in pixels, and `peak`, [x, y] of the map's maximum.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.command_line import CommandParser
from vicrop.dataset import EDGE, box_of_truth, iou, numbers_of, refuse_bad_ids
from vicrop.evaluation.statistics import bootstrap_interval
from vicrop.files import read_json, read_rows
from vicrop.localization.storage import beside, safe_id

CENTER = "center"  # --baseline: a box of half the image's sides in its middle
SHOWN_IDS = 10  # so many wrong predictions are named

Truth = dict[str, Any]  # "id", "box" (xyxy), "image", "size": (width, height) or None
Sides = Sequence[float]  # a box [x1, y1, x2, y2], a point [x, y] or a size [width, height]
Prediction = tuple[Sides | None, Sides | None, Sides | None, str | None]  # box, peak, image's size, what is wrong


def inside(point: Sides, box: Sides) -> bool:
    """Does a point [x, y] lie in a box, xyxy?"""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


# -------------------------------------------------------------------------------------------------------------- input
def truth_records(path: str | Path, id_field: str) -> list[dict[str, Any]]:
    """The records in a file of JSON lines, each with an id of its own in the field `id_field`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no ground truth at {path}: --dataset-jsonl must be a file of JSON lines")
    records = read_rows(Path(path))
    if not records:
        raise ValueError(f"{path} has no record")
    refuse_bad_ids(records, f"{path} (--id-field names the id)", id_field, range(1, len(records) + 1))
    return records


def ground_truth(path: str | Path, id_field: str) -> list[Truth]:
    """The truths in a file of JSON lines; `id_field` is the field with the id."""
    rows = []
    for record in truth_records(path, id_field):
        key = record[id_field]
        box, size = box_of_truth({**record, "id": key}, f"{path}, {key!r}")
        rows.append({"id": str(key), "box": box, "image": str(record.get("image_path", key)), "size": size})
    return rows


def prediction(root: str | Path, key: str, size: Sides | None = None) -> Prediction:
    """The Prediction of an id in the folder `root`; `size` is that of its image in the ground truth, if known."""
    path = beside(Path(root) / safe_id(key), "_bbox.json")
    if not path.is_file():
        return None, None, None, "missing"
    try:
        found = read_json(path)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return None, None, None, "broken"
    fields = (("bbox", 4), ("peak", 2), ("image_size", 2))
    box, peak, own_size = (numbers_of(found.get(name), count) for name, count in fields)
    if size and own_size and tuple(size) != own_size:  # the box is in other pixels than the truth
        return None, None, own_size, f"of an image of {own_size[0]:g} x {own_size[1]:g}, not {size[0]:g} x {size[1]:g}"
    wrong = None if box and box[0] < box[2] and box[1] < box[3] else "degenerate"
    beyond = box and own_size and (min(box) < -EDGE or box[2] > own_size[0] + EDGE or box[3] > own_size[1] + EDGE)
    if not wrong and own_size and beyond:
        wrong = f"outside of its image of {own_size[0]:g} x {own_size[1]:g}"
    return None if wrong else box, peak, own_size, wrong


def center_of(truth: Truth) -> Prediction:
    """The Prediction of the baseline that always takes the middle of the image."""
    if truth["size"] is None:
        raise ValueError(f"--baseline {CENTER} needs width and height in the ground truth: {truth['id']!r} has none")
    width, height = truth["size"]
    return [width / 4, height / 4, width * 3 / 4, height * 3 / 4], [width / 2, height / 2], truth["size"], None


# ----------------------------------------------------------------------------------------------------------- measures
def judged(truths: Sequence[Truth], root: str | Path) -> dict[str, Any]:
    """{"iou": (n,), "pointing": (n,) or None, "wrong": {id: why}} of the predictions in `root`, or of CENTER."""
    if root != CENTER and not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root} with predictions")
    found = [center_of(truth) if root == CENTER else prediction(root, truth["id"], truth["size"]) for truth in truths]
    overlaps = [iou(each[0], truth["box"]) if each[0] else 0.0 for truth, each in zip(truths, found, strict=True)]
    points = [bool(each[1]) and inside(each[1], truth["box"]) for truth, each in zip(truths, found, strict=True)]
    wrong = {truth["id"]: each[3] for truth, each in zip(truths, found, strict=True) if each[3]}
    saved = any(each[1] for each in found)
    return {"iou": np.array(overlaps), "pointing": np.array(points, dtype=float) if saved else None, "wrong": wrong}


def measures(judgement: Mapping[str, Any], thresholds: Sequence[float]) -> dict[str, np.ndarray]:
    """{name: (n,) values whose mean is the score}, from the result of `judged`."""
    overlaps, found = judgement["iou"], {}
    for threshold in thresholds:
        found[f"acc@{threshold:g}"] = (overlaps >= threshold).astype(float)
    if judgement["pointing"] is not None:
        found["pointing"] = judgement["pointing"]
    return {"mean_iou": overlaps} | found


def summary(judgement: Mapping[str, Any], thresholds: Sequence[float]) -> dict[str, Any]:
    """{name: value}: all scores of one set of predictions."""
    means = {name: float(values.mean()) for name, values in measures(judgement, thresholds).items()}
    return {"samples": len(judgement["iou"]), "median_iou": float(np.median(judgement["iou"])), **means}


def compared(
    one: Mapping[str, Any], other: Mapping[str, Any], truths: Sequence[Truth], thresholds: Sequence[float],
    rounds: int = 10000, seed: int = 0,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """{name: (mean difference of pairs, low, high)}, with the 95 % interval of a bootstrap over images."""
    rows, images = {}, [truth["image"] for truth in truths]
    others = measures(other, thresholds)
    for name, values in measures(one, thresholds).items():
        if name in others:
            difference = values - others[name]
            rows[name] = (float(difference.mean()), *bootstrap_interval(difference, images, rounds, seed))
    return rows


def large_enough(truths: Sequence[Truth], least: float, root: str | Path) -> list[Truth]:
    """The truths whose boxes cover at least the share `least` of their image; `root` may know the image's size."""
    kept = []
    for truth in truths:
        size = truth["size"] or prediction(root, truth["id"])[2]
        if size is None:
            raise ValueError(f"--min-area needs an image's size: {truth['id']!r} has no width and height")
        x1, y1, x2, y2 = truth["box"]
        if (x2 - x1) * (y2 - y1) >= least * size[0] * size[1]:
            kept.append(truth)
    if not kept:
        raise ValueError(f"no box covers {least} of its image: --min-area is a share, from 0 to 1")
    return kept


# ------------------------------------------------------------------------------------------------------- command line
def evaluate(
    truth_path: str, root: str, id_field: str = "id", thresholds: Sequence[float] = (0.25, 0.5, 0.75),
    min_area: float = 0.0, baselines: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What the command prints, as a dict; see its options."""
    truths = ground_truth(truth_path, id_field)
    if min_area:
        truths = large_enough(truths, min_area, root)
    own = judged(truths, root)
    report = {"predictions": str(root), **summary(own, thresholds), "wrong": own["wrong"], "baselines": {}}
    for other_root in baselines:
        other = judged(truths, other_root)
        differences = compared(own, other, truths, thresholds)
        report["baselines"][other_root] = {**summary(other, thresholds), "difference": differences}
    return report


def table(report: Mapping[str, Any]) -> str:
    """The dict of `evaluate` as text."""
    names = [name for name, value in report.items() if isinstance(value, int | float) and name != "samples"]
    lines = [f"{report['predictions']}: {report['samples']} boxes"]
    lines += [f"  {name:12} {report[name]:8.4f}" for name in names]
    for root, other in report["baselines"].items():
        lines.append(f"against {root} (difference, 95 % interval over images):")
        for name, (mean, low, high) in other["difference"].items():
            lines.append(f"  {name:12} {other[name]:8.4f}  {mean:+8.4f}  {low:+.4f} to {high:+.4f}")
    return "\n".join([*lines, *wrong_lines(report["wrong"], "IoU 0")])


def wrong_lines(wrong: Mapping[str, str], count_as: str) -> list[str]:
    """A line with the first predictions that could not be used, and why; none if all could."""
    if not wrong:
        return []
    named = ", ".join(f"{key} ({why})" for key, why in list(wrong.items())[:SHOWN_IDS])
    more = f" and {len(wrong) - SHOWN_IDS} more" if len(wrong) > SHOWN_IDS else ""
    return [f"{len(wrong)} predictions count as {count_as}: {named}{more}"]


def add_options(parser: CommandParser, thresholds: Sequence[float], what: str) -> None:
    """The options that boxes and masks have in common; `what` is "box" or "mask"."""
    add = parser.add_argument
    add("--dataset-jsonl", required=True, help="ground truth")
    add("--pred-root", required=True, help="folder of the predictions")
    add("--id-field", default="id", help="field of the ground truth that names a prediction")
    add("--iou-thresholds", type=float, nargs="+", default=list(thresholds),
        help=f"a {what} is right from so much overlap on")  # fmt: skip
    add("--format", choices=("table", "json"), default="table", help="of what is printed")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(None, __doc__)
    add = parser.add_argument
    add_options(parser, (0.25, 0.5, 0.75), "box")
    add("--min-area", type=float, default=0.0, help="only boxes that cover at least this share of their image")
    add("--baseline", nargs="+", default=[], metavar="ROOT",
        help=f'other predictions to compare with, record by record, or "{CENTER}"; default: none')  # fmt: skip
    args = parser.parse_args(argv)
    try:
        report = evaluate(args.dataset_jsonl, args.pred_root, args.id_field, args.iou_thresholds, args.min_area,
                          args.baseline)  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_boxes: {error}")
    print(json.dumps(report, indent=1) if args.format == "json" else table(report))


if __name__ == "__main__":
    main()
