"""Masks in files: polygons and RLE, as COCO writes them (`pycocotools`, the extra `masks`, reads these), and PNG.

mask = mask_of([[2, 2, 12, 2, 2, 12]], (40, 30), "record '7'")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vicrop.dataset import numbers_of, shown

Size = tuple[int, int]  # width, height in pixels


class NoReader(ValueError):
    """Masks are in a form whose package is not installed: that is no fault of any of them."""


def mask_of(segmentation: Any, size: Size | None, what: str, folder: str | Path = ".") -> np.ndarray:
    """(height, width) bool: a mask at its image's resolution.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...] in pixels; RLE {"size": [height, width], "counts"}, in numbers
            or compressed; or the name of a PNG, of which all pixels count that are not 0.
        size: of the image, if it is known; polygons need it.
        what: the beginning of an error's sentence; folder: from which the PNG is seen.
    Raises:
        FileNotFoundError, ValueError: no such PNG; it is no mask, or one of another size.
        NoReader: there is no `pycocotools`, and it is needed.
    """
    if isinstance(segmentation, str):
        return _png(Path(folder) / segmentation, size, what)
    if isinstance(segmentation, dict):
        return _rle(segmentation, size, what)
    if isinstance(segmentation, list) and segmentation and all(map(_is_polygon, segmentation)):
        if size is None:
            raise ValueError(f"{what}: polygons need the width and height of their image")
        codec, (width, height) = mask_codec(), size
        return codec.decode(codec.merge(codec.frPyObjects(segmentation, height, width))).astype(bool)
    raise ValueError(f"{what}: a mask is polygons [[x, y, x, y, x, y, ...], ...], RLE with size and counts, or the "
                     f"name of a PNG, not {shown(segmentation)}")  # fmt: skip


def _is_polygon(points: Any) -> bool:
    return (isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
            and numbers_of(points, len(points)) is not None)  # fmt: skip


def mask_codec() -> Any:
    """`pycocotools.mask`.

    Raises:
        NoReader: it is not installed.
    """
    try:
        from pycocotools import mask  # an extra: most users evaluate no masks
    except ImportError as error:
        raise NoReader("polygons and RLE need pycocotools: pip install 'vicrop[masks]'") from error
    return mask


def _rle(code: dict[str, Any], size: Size | None, what: str) -> np.ndarray:
    sides, counts = numbers_of(code.get("size"), 2), code.get("counts")
    if sides is None or min(sides) < 1 or not isinstance(counts, list | str | bytes):
        raise ValueError(f"{what}: RLE is {{'size': [height, width], 'counts': ...}}, not {shown(code)}")
    height, width = map(int, sides)
    _refuse_other_size((width, height), size, what)
    codec = mask_codec()
    if isinstance(counts, list):
        if numbers_of(counts, len(counts)) is None or min(counts) < 0 or sum(counts) != height * width:
            raise ValueError(f"{what}: the counts of RLE must be the {height * width} pixels of its image together")
        whole = codec.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    else:
        whole = {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    return codec.decode(whole).astype(bool)


def _png(path: Path, size: Size | None, what: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no mask at {path}")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image if len(image.getbands()) == 1 else image.convert("RGB").convert("L"))
    except OSError as error:
        raise ValueError(f"{what}: cannot read {path} as an image: {error}") from error
    _refuse_other_size((pixels.shape[1], pixels.shape[0]), size, what)
    return pixels != 0


def _refuse_other_size(own: Sequence[float], size: Size | None, what: str) -> None:
    if size is not None and tuple(own) != tuple(size):
        raise ValueError(f"{what}: its mask is of an image of {own[0]:g} x {own[1]:g}, not {size[0]:g} x {size[1]:g}")
