"""Boxes that no map chooses: baselines for a data record (see tables.METHODS).

They take windows of the sizes that the methods choose from, so that the comparison is one of place; only the true place
goes beyond where its box does not fit. The functions in the plural give up to `most` boxes, as methods do with regions.

    gt_crops(record, image.size, 336, most=2)

Their arguments: `record`, a record of the dataset; `image_size`, (width, height) in pixels; `bbox_size`, the base side
of a model's windows in pixels of the image. Boxes are (x1, y1, x2, y2) ints, pixels, inside the image.
"""

import math
from typing import Any

import numpy as np

from vicrop.boxes import WINDOW_RATIOS, square_around
from vicrop.dataset import box_of
from vicrop.layouts import Region, Size


def gt_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """The smallest of the methods' windows around `gt_bbox` that holds it (or the square that does).

    Raises:
        ValueError: the record has no gt_bbox, or one that cannot lie in its image.
    """
    if not record.get("gt_bbox"):
        whose = f"record {record['id']!r}" if "id" in record else "a single picture"
        raise ValueError(f"gt_crop crops at the gt_bbox of a dataset's record, and {whose} has none")
    x1, y1, x2, y2 = box_of(record, image_size=image_size)
    longest = max(x2 - x1, y2 - y1)
    side = next((bbox_size * ratio for ratio in WINDOW_RATIOS if bbox_size * ratio >= longest), longest)
    return square_around(int(x1 + x2) // 2, int(y1 + y2) // 2, side, image_size)


def gt_crops(record: dict[str, Any], image_size: Size, bbox_size: float, most: int) -> list[Region]:
    """A `gt_crop` around each of a record's `gt_bboxes`, if there are no more than `most`; else around all of them.

    Raises:
        ValueError: as `gt_crop`.
    """
    places = record.get("gt_bboxes") or []
    if not 1 < len(places) <= most:
        return [gt_crop(record, image_size, bbox_size)]
    return list(dict.fromkeys(gt_crop(record | {"gt_bbox": box}, image_size, bbox_size) for box in places))


def center_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """The base window in the middle of the image."""
    return square_around(image_size[0] // 2, image_size[1] // 2, bbox_size, image_size)


def center_crops(record: dict[str, Any], image_size: Size, bbox_size: float, most: int) -> list[Region]:
    """`center_crop` alone: an image has one middle."""
    return [center_crop(record, image_size, bbox_size)]


def random_crop(record: dict[str, Any], image_size: Size, bbox_size: float) -> Region:
    """A window of random size and place; the same one for the same record id."""
    return random_crops(record, image_size, bbox_size, 1)[0]


def random_crops(record: dict[str, Any], image_size: Size, bbox_size: float, most: int) -> list[Region]:
    """So many windows of random sizes and places; the same ones for the same record id, the first of them first."""
    rng, found = np.random.default_rng(list(str(record.get("id", "")).encode()) or 0), []
    for _ in range(most):
        side = bbox_size * rng.choice(WINDOW_RATIOS)
        half = side / 2
        x, y = (int(rng.uniform(min(half, size / 2), max(size - half, size / 2))) for size in image_size)
        found.append(square_around(x, y, side, image_size))
    return list(dict.fromkeys(found))


def grid_crops(record: dict[str, Any], image_size: Size, bbox_size: float, most: int) -> list[Region]:
    """The image in `most` equal parts, row by row: of all grids that with the least oblong parts.

    Raises:
        ValueError: the image has too few pixels for so many parts.
    """
    width, height = image_size
    grids = [(rows, most // rows) for rows in range(1, most + 1) if most % rows == 0]
    rows, columns = min(grids, key=lambda grid: abs(math.log(width / grid[1]) - math.log(height / grid[0])))
    xs, ys = ([round(part * side / parts) for part in range(parts + 1)]
              for side, parts in ((width, columns), (height, rows)))  # fmt: skip
    parts = [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(rows) for i in range(columns)]
    if any(x1 == x2 or y1 == y2 for x1, y1, x2, y2 in parts):
        raise ValueError(f"an image of {width} x {height} pixels has no {most} parts")
    return parts
