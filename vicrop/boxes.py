"""From an importance map to the box of a crop: numpy only, no model in here.

Conventions: an image size is (width, height) in pixels, a box is (x1, y1, x2, y2) in pixels with x2 and y2 exclusive, a
map is (h, w) with row 0 at the top.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vicrop.choices import ONE_REGION, Regions
from vicrop.layouts import Region, Size, whole

WINDOW_RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


class Window(NamedTuple):
    """A window on a map: its box in the image, its cells (rows, columns), and the sum over them."""

    box: Region
    cells: tuple[slice, slice]
    total: float


def bbox_from_att_image_adaptive(
    att_map: ArrayLike, image_size: Size, bbox_size: float = 336, ratios: Sequence[float] = WINDOW_RATIOS
) -> Region:
    """The crop window that stands out most from its neighbours (ViCrop, section 5: bounding box selection).

    Windows of `bbox_size` times 1 to 2 slide over the map cell by cell; each size proposes its largest sum; the size
    whose proposal exceeds its neighbours by most, per cell, wins.

    Args:
        att_map: (h, w) importance of the cells, row 0 at the top; it covers the whole image.
        image_size: (width, height) of the image in pixels.
        bbox_size: base side of the window in pixels of the image.
        ratios: the multiples of it that windows may have, ascending.
    Returns:
        (x1, y1, x2, y2) ints, pixels, inside the image.
    Raises:
        ValueError: the map is empty, not two-dimensional, or holds NaN or inf (says how many cells).
    """
    return bboxes_from_att_image(att_map, image_size, bbox_size, ratios=ratios)[0]


def bboxes_from_att_image(
    att_map: ArrayLike, image_size: Size, bbox_size: float = 336, regions: Regions = ONE_REGION,
    ratios: Sequence[float] = WINDOW_RATIOS,
) -> list[Region]:  # fmt: skip
    """Up to `regions.most` boxes, one after the other: the first is that of `bbox_from_att_image_adaptive`.

    What a window covers is set to the map's minimum before the next one is looked for. The search ends where nothing
    stands out any more, or where the next window's sum is less than `regions.share` of the first one's.

        bboxes_from_att_image(att_map, image.size, 336, Regions(most=2, share=0.5))

    Args:
        att_map, image_size, bbox_size, ratios: as of `bbox_from_att_image_adaptive`.
        regions: how many boxes there may be, and when a further one counts.
    Returns:
        [(x1, y1, x2, y2)] ints, pixels, all different and inside the image.
    Raises:
        ValueError: as `bbox_from_att_image_adaptive`; a size that is not positive.
    """
    left = valid_map(att_map)
    width, height = image_size
    if width < 1 or height < 1 or bbox_size <= 0:
        raise ValueError(f"image size {image_size} and bbox_size {bbox_size} must be positive")
    least = left.min()
    window = first = sharpest_window(left, image_size, bbox_size, ratios)
    boxes = [first.box]
    while len(boxes) < regions.most:
        left[window.cells] = least
        if left.max() == least:
            break
        window = sharpest_window(left, image_size, bbox_size, ratios)
        if window.total < regions.share * first.total or window.box in boxes:
            break
        boxes.append(window.box)
    return boxes


def valid_map(att_map: ArrayLike) -> np.ndarray:
    """A float64 copy of a map (h, w); a ValueError if it is empty, not two-dimensional, or holds NaN or inf."""
    values = np.array(att_map, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"an importance map has shape (h, w) with at least one cell, not {values.shape}")
    broken = int(np.count_nonzero(~np.isfinite(values)))
    if broken:
        raise ValueError(f"{broken} of the importance map's {values.size} cells are NaN or inf")
    return values


def sharpest_window(
    att_map: np.ndarray, image_size: Size, bbox_size: float, ratios: Sequence[float] = WINDOW_RATIOS
) -> Window:
    """The Window of `bbox_from_att_image_adaptive`, for a valid map."""
    (rows, columns), (width, height) = att_map.shape, image_size
    cell_w, cell_h = width / columns, height / rows
    # Sums from an integral image carry rounding noise that grows with the total; below it, two windows are equal.
    noise = 1e-12 * np.abs(att_map).sum()
    best = None
    for ratio in ratios:
        n_x = max(1, min(int(bbox_size * ratio / cell_w), columns))
        n_y = max(1, min(int(bbox_size * ratio / cell_h), rows))
        if (n_x, n_y) == (columns, rows):
            if ratio == ratios[0]:
                return Window(whole((int(width), int(height))), np.s_[:, :], float(att_map.sum()))
            continue
        sums = window_sums(att_map, n_x, n_y)
        x, y = np.argwhere(sums.max() - noise <= sums.T)[0]  # smallest x first, then smallest y
        neighbours = [sums[j, i] for i, j in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
                      if 0 <= i < sums.shape[1] and 0 <= j < sums.shape[0]]  # fmt: skip
        sharpness = (sums[y, x] - np.mean(neighbours)) / (n_x * n_y)
        if best is None or sharpness > best[0] + noise:
            centre = int(x * cell_w + cell_w * n_x / 2), int(y * cell_h + cell_h * n_y / 2)
            box = square_around(*centre, bbox_size * ratio, image_size)
            best = sharpness, Window(box, np.s_[y : y + n_y, x : x + n_x], float(sums[y, x]))
    assert best is not None  # the first size proposes a window, or is returned
    return best[1]


def window_sums(att_map: np.ndarray, n_x: int, n_y: int) -> np.ndarray:
    """Sum of every n_y x n_x window, (h - n_y + 1, w - n_x + 1), from one integral image."""
    integral = np.pad(att_map.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return integral[n_y:, n_x:] - integral[:-n_y, n_x:] - integral[n_y:, :-n_x] + integral[:-n_y, :-n_x]


def square_around(x: int, y: int, side: float, image_size: Size) -> Region:
    """(x1, y1, x2, y2) ints: a square of `side` around (x, y), moved into the image, clipped where it cannot fit."""
    width, height = image_size
    half = int(side // 2)
    x, y = min(max(x, half), width - half), min(max(y, half), height - half)
    return max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)


def bbox_in_region(att_map: ArrayLike, region: Region, image_size: Size, bbox_size: float,
                   ratios: Sequence[float] = WINDOW_RATIOS) -> Region:  # fmt: skip
    """`bbox_from_att_image_adaptive` for a map that covers `region` (xyxy pixels), clipped to the image."""
    left, top, right, bottom = region
    box = bbox_from_att_image_adaptive(att_map, (right - left, bottom - top), bbox_size, ratios)
    return placed(box, region, image_size)


def bboxes_in_region(
    att_map: ArrayLike, region: Region, image_size: Size, bbox_size: float, regions: Regions = ONE_REGION
) -> list[Region]:
    """`bboxes_from_att_image` for a map that covers `region` (xyxy pixels), each clipped to the image; all differ."""
    left, top, right, bottom = region
    found = bboxes_from_att_image(att_map, (right - left, bottom - top), bbox_size, regions)
    return list(dict.fromkeys(placed(box, region, image_size) for box in found))


def placed(box: Region, region: Region, image_size: Size) -> Region:
    """A box of a map's own region as one of the image, clipped."""
    left, top, *_ = region
    return clip_box((box[0] + left, box[1] + top, box[2] + left, box[3] + top), image_size)


def clip_box(box: Sequence[float], image_size: Size) -> Region:
    """The part of a box inside the image; a box wholly outside (in padding) is first moved to the nearest edge."""
    clipped = []
    for low, high, limit in ((box[0], box[2], image_size[0]), (box[1], box[3], image_size[1])):
        if high <= 0 or low >= limit:
            shift = -low if high <= 0 else limit - high
            low, high = low + shift, high + shift
        clipped.append((int(max(0, low)), int(min(limit, high))))
    (x1, x2), (y1, y2) = clipped
    return x1, y1, x2, y2
