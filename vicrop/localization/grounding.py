"""From the maps of a few heads to a mask and a box (arXiv 2503.06287, section 3.4): numpy and scipy, no model in here.

A map is (h, w) with row 0 at the top and covers `region`, a rectangle of the image in xyxy pixels.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from vicrop.heads import NEIGHBOURS, Criteria, Measures, heads_map, selected

SLIVER = 0.01  # pixels: boxes are rounded to that, so less of a cell is nothing


def mean_relu(att_map):
    """(h, w) bool: what exceeds the map's mean."""
    return att_map > att_map.mean()


MASKS = {"mean_relu": mean_relu}  # logic.mask.method -> its function


def largest_component(mask):
    """(h, w) bool: the 8-connected part of a mask with most cells; the topmost on ties; nothing of an empty one."""
    labels, count = ndimage.label(mask, NEIGHBOURS)
    if not count:
        return np.zeros_like(mask, dtype=bool)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def convex_hull(mask):
    """(n, 2) corners (x, y), in cells, of the convex hull around a mask's cells, each a unit square; empty of none."""
    rows, columns = np.nonzero(mask)
    corners = np.concatenate([np.stack([columns + x, rows + y], 1) for x in (0, 1) for y in (0, 1)])
    if not len(corners):
        return corners
    return corners[ConvexHull(corners).vertices]


def hull_box(mask):
    """(x1, y1, x2, y2) in cells around the hull of a mask's largest component; None of an empty mask."""
    hull = convex_hull(largest_component(mask))
    return None if not len(hull) else (*hull.min(0).tolist(), *hull.max(0).tolist())


def to_pixels(points, shape, region):
    """Points (n, 2) as (x, y) in cells of a map (h, w), in pixels of the image."""
    (h, w), (left, top, right, bottom) = shape, region
    return np.asarray(points, dtype=np.float64) * ((right - left) / w, (bottom - top) / h) + (left, top)


def box_in_image(mask, region, image_size):
    """[x1, y1, x2, y2] pixels of the image around a mask (h, w) over `region`, clipped to it; None of an empty mask."""
    box = hull_box(mask)
    if box is None:
        return None
    corners = to_pixels([box[:2], box[2:]], mask.shape, region)
    return [round(float(side), 2) for side in corners.clip((0, 0), image_size).ravel()]


def mask_in_image(mask, region, image_size):
    """(height, width) bool: a mask (h, w) over `region` at the image's resolution; nothing where no map reaches."""
    width, height = image_size
    left, top, right, bottom = region
    rows = np.floor((np.arange(height) + 0.5 - top) * mask.shape[0] / (bottom - top)).astype(int)
    columns = np.floor((np.arange(width) + 0.5 - left) * mask.shape[1] / (right - left)).astype(int)
    inside = [(each >= 0) & (each < cells) for each, cells in zip((rows, columns), mask.shape, strict=True)]
    full = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)]
    return full & inside[0][:, None] & inside[1]


def cells_in_image(shape, region, image_size):
    """(h, w) bool: the cells of a map over `region` that see a part of the image; others see what pads it."""

    def seen(cells, start, end, side):
        edges = np.linspace(start, end, cells + 1)
        return (edges[1:] >= SLIVER) & (edges[:-1] <= side - SLIVER)

    (h, w), (left, top, right, bottom) = shape, region
    return seen(h, top, bottom, image_size[1])[:, None] & seen(w, left, right, image_size[0])


def peak_in_image(att_map, region, image_size):
    """[x, y] pixels of the image: the middle, as far as it is in the image, of the map's largest cell there."""
    shown = np.where(cells_in_image(att_map.shape, region, image_size), att_map, -np.inf)
    row, column = np.unravel_index(np.argmax(shown), shown.shape)  # the first one on ties
    corners = to_pixels([(column, row), (column + 1, row + 1)], att_map.shape, region).clip((0, 0), image_size)
    return [round(float(each), 2) for each in corners.mean(0)]


# ------------------------------------------------------------------------------------------------- all of it, for one
@dataclass(frozen=True)
class Grounding:
    """What the heads of one sample say about its query; boxes and points in pixels of the image."""

    measures: Measures
    heads: list  # [(layer, head)] that made the map
    note: str | None  # what has to be said about their choice, and the box
    att_map: np.ndarray  # (h, w)
    mask: np.ndarray  # (h, w) bool; only where cells see the image
    box: list | None  # xyxy
    peak: list  # [x, y], the map's maximum in the image
    shown: np.ndarray  # (height, width) bool, the mask at the image's resolution


def ground(attention, region, image_size, logic, manual=None):
    """A Grounding: from the attention of all heads to a mask and a box.

    Args:
        attention: (layers, heads, h, w) of one text token.
        region: xyxy pixels of the image that the map covers; image_size: (width, height).
        logic: a config.Logic; manual: the fixed heads [(layer, head)], if there are any.
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


def criteria_of(logic):
    """The heads.Criteria of a config.Logic."""
    entropy = logic.entropy
    rest = logic.threshold.min_keep, entropy.binarize_threshold, entropy.weight.name
    return Criteria(logic.top_k, logic.count_k, *rest)
