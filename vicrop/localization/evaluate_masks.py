"""How well masks match: cIoU, gIoU, and the shares above thresholds, in %.

python -m localization.evaluate_masks --dataset-jsonl GT.jsonl --pred-root OUTPUTS/MODEL --id-field question_id

Each line of GT.jsonl is an object with an id and `segmentation`: polygons or RLE, as COCO writes them (the extra
`masks` reads them), or the name of a PNG, as seen from GT.jsonl. Polygons need `width` and `height` besides. A
prediction is a file `<id>_mask.png`, or else `<id>_mask.json` with such a `segmentation`.

cIoU is the intersection of all samples by the union of all; gIoU is the mean of the samples' own.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.command_line import CommandParser
from vicrop.dataset import Truth, field_of
from vicrop.evaluation.statistics import bootstrap_interval
from vicrop.files import read_json
from vicrop.localization.coco_masks import NoReader, Size, mask_of
from vicrop.localization.evaluate_boxes import add_options, truth_records, wrong_lines
from vicrop.localization.storage import beside, safe_id

THRESHOLDS = (0.5, 0.7, 0.9)
ROUNDS, SEED = 10_000, 0  # of the bootstrap behind the intervals


# -------------------------------------------------------------------------------------------------------------- input
def true_mask(record: Mapping[str, Any], key: str, path: str | Path) -> np.ndarray:
    """(height, width) bool: the mask of a record of the ground truth.

    Raises:
        ValueError, FileNotFoundError: naming the file and the id: there is none, or it has no pixel.
    """
    what = f"{path}, {key!r}"
    if record.get("segmentation") is None:
        raise ValueError(f"{what} has no segmentation")
    mask = mask_of(record["segmentation"], size_of(record, what), what, Path(path).parent)
    if not mask.any():
        raise ValueError(f"{what}: its mask has no pixel")
    return mask


def size_of(record: Mapping[str, Any], what: str) -> Size | None:
    """(width, height) of a record's image; None if it does not tell them."""
    width, height = (field_of(dict(record), side, Truth, what) for side in ("width", "height"))
    return None if width is None or height is None else (int(width), int(height))


def predicted_mask(root: str | Path, key: str, size: Size) -> tuple[np.ndarray | None, str | None]:
    """(the predicted mask of an id, or None, what is wrong with it); `size` is that of its image.

    Raises:
        NoReader: it may be right, and cannot be read here.
    """
    stem = Path(root) / safe_id(key)
    picture, code = beside(stem, "_mask.png"), beside(stem, "_mask.json")
    try:
        if picture.is_file():
            return mask_of(picture.name, size, key, picture.parent), None
        if not code.is_file():
            return None, "missing"
        found = read_json(code)
        return mask_of(found.get("segmentation") if isinstance(found, dict) else found, size, key, root), None
    except NoReader:
        raise
    except (ValueError, OSError) as error:
        return None, str(error).removeprefix(f"{key}: ")


# ----------------------------------------------------------------------------------------------------------- measures
def overlap(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """(pixels of the intersection, pixels of the union) of two masks."""
    return int((one & other).sum()), int((one | other).sum())


def judged(truth_path: str | Path, root: str | Path, id_field: str) -> dict[str, Any]:
    """{"both", "either": (n,) pixels, "images": (n,), "wrong": {id: why}} of the predictions in `root`.

    A prediction that is missing or broken has no pixel.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root} with predictions")
    overlaps, images, wrong = [], [], {}
    for record in truth_records(truth_path, id_field):
        key = str(record[id_field])
        truth = true_mask(record, key, truth_path)
        found, why = predicted_mask(root, key, (truth.shape[1], truth.shape[0]))
        wrong |= {key: why} if why else {}
        overlaps.append(overlap(truth, np.zeros_like(truth) if found is None else found))
        images.append(str(record.get("image_path", key)))
    both, either = np.array(overlaps, dtype=float).T
    return {"both": both, "either": either, "images": images, "wrong": wrong}


def evaluate(
    truth_path: str | Path, root: str | Path, id_field: str = "id", thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, Any]:
    """What the command prints, as a dict; see its options. All figures are in %."""
    found = judged(truth_path, root, id_field)
    both, either, images = found["both"], found["either"], found["images"]
    own = both / either
    shares = {f"pr@{threshold:g}": 100 * float((own >= threshold).mean()) for threshold in thresholds}
    intervals = {
        "cIoU": bootstrap_interval(100 * both, images, ROUNDS, SEED, either),
        "gIoU": bootstrap_interval(100 * own, images, ROUNDS, SEED),
    }
    return {"predictions": str(root), "samples": len(own), "cIoU": 100 * float(both.sum() / either.sum()),
            "gIoU": 100 * float(own.mean()), **shares, "intervals": intervals, "wrong": found["wrong"]}  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The dict of `evaluate` as text."""
    lines = [f"{report['predictions']}: {report['samples']} masks, in % (95 % interval over images)"]
    for name, value in report.items():
        if isinstance(value, float):
            low, high = report["intervals"].get(name, (None, None))
            lines.append(f"  {name:8} {value:7.2f}" + ("" if low is None else f"  {low:.2f} to {high:.2f}"))
    return "\n".join([*lines, *wrong_lines(report["wrong"], "masks without a pixel")])


# ------------------------------------------------------------------------------------------------------- command line
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(None, __doc__)
    add_options(parser, THRESHOLDS, "mask")
    args = parser.parse_args(argv)
    try:
        report = evaluate(args.dataset_jsonl, args.pred_root, args.id_field, args.iou_thresholds)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_masks: {error}")
    print(json.dumps(report, indent=1) if args.format == "json" else table(report))


if __name__ == "__main__":
    main()
