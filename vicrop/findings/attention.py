"""How much more attention the true place gets than other places, by layer (the ViCrop paper's section 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.attribution import attention as attention_maps
from vicrop.dataset import box_of
from vicrop.evaluation.metrics import RIGHT
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import TaskModel, graded, images_of, measured, with_methods
from vicrop.findings.table import Table, estimate, in_words


def attention_ratio(att_map: np.ndarray, region: Sequence[float], box: Sequence[float]) -> np.ndarray:
    """How much more attention a box gets than a box of its size anywhere (the ViCrop paper's section 4).

    Args:
        att_map: (..., h, w) attention over `region` (xyxy pixels of the image).
        box: xyxy pixels of the image.
    Returns:
        (...) float64: attention inside the box, divided by the mean over all boxes of its size at whole-pixel
        positions. A cell that a box covers in part counts in part. 1 means no preference; nan if the box lies outside
        the region.
    """
    # The integral image has the attention left of and above each point, and is linear between cell edges. So the mean
    # over all boxes is exactly its product with the mean weights of their edges: no box need be summed up by itself.
    sums = np.asarray(att_map, dtype=np.float64).cumsum(-2).cumsum(-1)
    integral = np.pad(sums, [(0, 0)] * (sums.ndim - 2) + [(1, 0), (1, 0)])  # (..., h + 1, w + 1)
    inside, anywhere = [], []
    for axis in (1, 0):  # rows, then columns
        low, high = region[axis], region[axis + 2]
        start, stop = (min(max(box[axis + side], low), high) - low for side in (0, 2))
        length, edges = stop - start, np.linspace(0, high - low, integral.shape[-1 - axis])
        inside.append(edge_weights([stop], edges)[0] - edge_weights([start], edges)[0])
        starts = np.arange(int(high - low - length) + 1)
        anywhere.append((edge_weights(starts + length, edges) - edge_weights(starts, edges)).mean(0))
    share, mean = (rows @ integral @ columns for rows, columns in (inside, anywhere))
    return np.divide(share, mean, out=np.full_like(mean, np.nan), where=mean > 0)


def edge_weights(points: Sequence[float] | np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(points, edges) weights of linear interpolation: times the values at `edges`, they give those at `points`."""
    return np.stack([np.interp(points, edges, one) for one in np.eye(len(edges))], 1)


def ratios_of(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "ratio"} of a record: how right the answer is, and the attention ratio of each layer."""
    if not record.get("gt_bbox"):
        raise ValueError(f"record {record['id']!r} has no gt_bbox, and the attention ratio is about that box")
    batch = task_model.ask(record)
    (image,), (layout,) = batch.session.images, batch.session.layouts
    box, score_of = box_of(record, image_size=image.size), task_model.grade(task_model.answer(batch), record)
    (maps,) = attention_maps(batch.session, batch.map_prompts, task_model.layers)
    heads_mean = maps.mean(1).cpu().numpy()  # (layers, h, w)
    ratios = attention_ratio(heads_mean, layout.region, box).tolist()
    return {"score": score_of, "ratio": [None if np.isnan(ratio) else ratio for ratio in ratios]}


def attention(run: RunSettings, out: Path) -> Table:
    """The attention ratio of each layer, for right and for wrong answers apart (the paper's section 4)."""
    run = with_methods(run, [])  # crops are not needed
    records = graded(measured(run, out, "attention", ratios_of))
    groups: dict[str, list[dict]] = {"right answers": [], "wrong answers": []}
    for record in records:
        groups["right answers" if record["score"] >= RIGHT else "wrong answers"].append(record)
    rows = {}
    for layer in range(len(records[0]["ratio"])):
        seen = {name: [r for r in group if r["ratio"][layer] is not None] for name, group in groups.items()}
        rows[layer] = {
            name: estimate([r["ratio"][layer] for r in group], images_of(group)) for name, group in seen.items()
        }
    notes = records.notes
    if groups["wrong answers"]:
        best = max(rows, key=lambda layer: rows[layer]["wrong answers"]["mean"] or 0)
        found = in_words(rows[best]["wrong answers"])
        notes.append(f"on wrong answers layer {best} gives the true place {found} times the attention of an equal box")
    title = "attention to the true place, divided by that to a box of its size"
    return Table(title, "layer", "attention ratio", rows, notes, even=1, curves=True)
