"""From the maps of a few heads to a mask and a box (arXiv 2503.06287, section 3.4): numpy and scipy, no model needed.

A map is (h, w) with row 0 at the top and covers `region`, a rectangle of the image in xyxy pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.spatial import ConvexHull

from vicrop.heads import NEIGHBOURS, Criteria, Head, Measures, heads_map, selected
from vicrop.localization.config import Logic
from vicrop.localization.masks import MASKS

SLIVER = 0.01  # pixels: boxes are rounded to this, so a cell with less of the image shows nothing of it


def largest_component(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool: the 8-connected part of a mask with most cells, of equal ones the topmost; empty if the mask is."""
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(mask, NEIGHBOURS))
    if not count:
        return np.zeros_like(mask, dtype=bool)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def convex_hull(mask: np.ndarray) -> np.ndarray:
    """(n, 2) corners (x, y) of the convex hull of a mask's cells, which are unit squares; none if the mask is empty."""
    rows, columns = np.nonzero(mask)
    corners = np.concatenate([np.stack([columns + x, rows + y], 1) for x in (0, 1) for y in (0, 1)])
    if not len(corners):
        return corners
    return corners[ConvexHull(corners).vertices]


def hull_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2) in cells around the hull of a mask's largest component; None if the mask is empty."""
    hull = convex_hull(largest_component(mask))
    if not len(hull):
        return None
    (x1, y1), (x2, y2) = hull.min(0).tolist(), hull.max(0).tolist()
    return x1, y1, x2, y2


def to_pixels(points: ArrayLike, shape: tuple[int, ...], region: Sequence[float]) -> np.ndarray:
    """Points (n, 2), given as (x, y) in cells of a map (h, w), in pixels of the image."""
    (h, w), (left, top, right, bottom) = shape, region
    return np.asarray(points, dtype=np.float64) * ((right - left) / w, (bottom - top) / h) + (left, top)


def box_in_image(mask: np.ndarray, region: Sequence[float], image_size: Sequence[int]) -> list[float] | None:
    """[x1, y1, x2, y2] pixels around a mask (h, w) over `region`, clipped to the image; None if the mask is empty."""
    box = hull_box(mask)
    if box is None:
        return None
    corners = to_pixels([box[:2], box[2:]], mask.shape, region)
    return [round(float(side), 2) for side in corners.clip((0, 0), image_size).ravel()]


def mask_in_image(mask: np.ndarray, region: Sequence[float], image_size: Sequence[int]) -> np.ndarray:
    """(height, width) bool: a mask (h, w) over `region` at the image's resolution; False outside of the region."""
    width, height = image_size
    left, top, right, bottom = region
    rows = np.floor((np.arange(height) + 0.5 - top) * mask.shape[0] / (bottom - top)).astype(int)
    columns = np.floor((np.arange(width) + 0.5 - left) * mask.shape[1] / (right - left)).astype(int)
    inside = [(each >= 0) & (each < cells) for each, cells in zip((rows, columns), mask.shape, strict=True)]
    full = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)]
    return full & inside[0][:, None] & inside[1]


def cells_in_image(shape: tuple[int, ...], region: Sequence[float], image_size: Sequence[int]) -> np.ndarray:
    """(h, w) bool: the cells of a map over `region` that see a part of the image; the others see only padding."""

    def seen(cells: int, start: float, end: float, side: int) -> np.ndarray:
        edges = np.linspace(start, end, cells + 1)
        return (edges[1:] >= SLIVER) & (edges[:-1] <= side - SLIVER)

    (h, w), (left, top, right, bottom) = shape, region
    return seen(h, top, bottom, image_size[1])[:, None] & seen(w, left, right, image_size[0])


def peak_in_image(att_map: np.ndarray, region: Sequence[float], image_size: Sequence[int]) -> list[float]:
    """[x, y] pixels: the middle of the map's largest cell among those in the image, clipped to the image."""
    shown = np.where(cells_in_image(att_map.shape, region, image_size), att_map, -np.inf)
    row, column = np.unravel_index(np.argmax(shown), shown.shape)  # the first one on ties
    corners = to_pixels([(column, row), (column + 1, row + 1)], att_map.shape, region).clip((0, 0), image_size)
    return [round(float(each), 2) for each in corners.mean(0)]


# ------------------------------------------------------------------------------------------------- all of it, for one
@dataclass(frozen=True)
class Grounding:
    """What the heads of one sample say about its query; boxes and points in pixels of the image."""

    measures: Measures
    heads: list[Head]  # those that made the map
    note: str | None  # a remark on the choice of heads or on the box, for the user
    att_map: np.ndarray  # (h, w)
    mask: np.ndarray  # (h, w) bool; only where cells see the image
    box: list[float] | None  # xyxy
    peak: list[float]  # [x, y], the map's maximum in the image
    shown: np.ndarray  # (height, width) bool, the mask at the image's resolution


def ground(
    attention: np.ndarray,
    region: Sequence[float],
    image_size: Sequence[int],
    logic: Logic,
    manual: Sequence[Head] | None = None,
) -> Grounding:
    """From the attention of all heads to a mask and a box.

    Args:
        attention: (layers, heads, h, w) of one text token.
        region: xyxy pixels of the image that the map covers; image_size: (width, height).
        logic: the settings; manual: the fixed heads, if there are any.
    """
    criteria = criteria_of(logic)
    measures = criteria.measure(attention)
    heads, note = selected(measures, criteria, logic.selection.name, manual)
    att_map = heads_map(np.stack([attention[head] for head in heads]), logic.smoothing.sigma)
    mask = MASKS[logic.mask.method.name](att_map) & cells_in_image(att_map.shape, region, image_size)
    box, peak = box_in_image(mask, region, image_size), peak_in_image(att_map, region, image_size)
    if box is None:
        note = "; ".join(filter(None, [note, "nothing in the image exceeds the map's mean: there is no box"]))
    return Grounding(measures, heads, note, att_map, mask, box, peak, mask_in_image(mask, region, image_size))


def criteria_of(logic: Logic) -> Criteria:
    """The heads.Criteria of a config.Logic."""
    entropy = logic.entropy
    rest = logic.threshold.min_keep, entropy.binarize_threshold, entropy.weight.name
    return Criteria(logic.top_k, logic.count_k, *rest)
