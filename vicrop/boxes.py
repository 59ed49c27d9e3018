"""From an importance map to the box of a crop: numpy only, no model in here.

Conventions: an image size is (width, height) in pixels, a box is (x1, y1, x2, y2) in pixels with x2 and y2 exclusive, a
map is (h, w) with row 0 at the top.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vicrop.dataset import box_of
from vicrop.layouts import Region, Size

WINDOW_RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


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
    att_map = np.asarray(att_map, dtype=np.float64)
    if att_map.ndim != 2 or att_map.size == 0:
        raise ValueError(f"an importance map has shape (h, w) with at least one cell, not {att_map.shape}")
    broken = int(np.count_nonzero(~np.isfinite(att_map)))
    if broken:
        raise ValueError(f"{broken} of the importance map's {att_map.size} cells are NaN or inf")
    width, height = image_size
    if width < 1 or height < 1 or bbox_size <= 0:
        raise ValueError(f"image size {image_size} and bbox_size {bbox_size} must be positive")
    rows, columns = att_map.shape
    cell_w, cell_h = width / columns, height / rows
    # Sums from an integral image carry rounding noise that grows with the total; below it, two windows are equal.
    noise = 1e-12 * np.abs(att_map).sum()
    best = None
    for ratio in ratios:
        n_x = max(1, min(int(bbox_size * ratio / cell_w), columns))
        n_y = max(1, min(int(bbox_size * ratio / cell_h), rows))
        if (n_x, n_y) == (columns, rows):
            if ratio == ratios[0]:
                return 0, 0, int(width), int(height)
            continue
        sums = window_sums(att_map, n_x, n_y)
        x, y = np.argwhere(sums.max() - noise <= sums.T)[0]  # smallest x first, then smallest y
        neighbours = [sums[j, i] for i, j in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
                      if 0 <= i < sums.shape[1] and 0 <= j < sums.shape[0]]  # fmt: skip
        sharpness = (sums[y, x] - np.mean(neighbours)) / (n_x * n_y)
        if best is None or sharpness > best[0] + noise:
            best = sharpness, ratio, int(x * cell_w + cell_w * n_x / 2), int(y * cell_h + cell_h * n_y / 2)
    assert best is not None  # the first size proposes a window, or is returned
    _, ratio, x, y = best
    return square_around(x, y, bbox_size * ratio, image_size)


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
    x1, y1, x2, y2 = bbox_from_att_image_adaptive(att_map, (right - left, bottom - top), bbox_size, ratios)
    return clip_box((x1 + left, y1 + top, x2 + left, y2 + top), image_size)


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


# Boxes that no map chooses: baselines for a data record (see info.METHODS). They take windows of the sizes that the
# methods choose from, so that the comparison is one of place; only gt_crop goes beyond where its box does not fit.
def gt_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """The smallest of the methods' windows around `gt_bbox` that holds it (or the square that does)."""
    if not record.get("gt_bbox"):
        whose = f"record {record['id']!r}" if "id" in record else "a single picture"
        raise ValueError(f"gt_crop crops at the gt_bbox of a dataset's record, and {whose} has none")
    x1, y1, x2, y2 = box_of(record, image_size=image_size)
    longest = max(x2 - x1, y2 - y1)
    side = next((bbox_size * ratio for ratio in WINDOW_RATIOS if bbox_size * ratio >= longest), longest)
    return square_around(int(x1 + x2) // 2, int(y1 + y2) // 2, side, image_size)


def center_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """The base window in the middle of the image."""
    return square_around(image_size[0] // 2, image_size[1] // 2, bbox_size, image_size)


def random_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """A window of random size and place; the same one for the same record id."""
    rng = np.random.default_rng(list(str(record.get("id", "")).encode()) or 0)
    side = bbox_size * rng.choice(WINDOW_RATIOS)
    half = side / 2
    x, y = (int(rng.uniform(min(half, size / 2), max(size - half, size / 2))) for size in image_size)
    return square_around(x, y, side, image_size)
