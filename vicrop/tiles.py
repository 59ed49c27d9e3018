"""Large images as tiles, and one map made of the maps of the tiles (ViCrop, section 5: high-resolution inputs)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vicrop.images import ImageSource, load_image

TILE_SIDE = 1024  # pixels, at most
TILE_ASPECT = 1.5  # longer side over shorter side, at most


def high_res_split_threshold(image: Image.Image, res_threshold: int = TILE_SIDE) -> tuple[list[Image.Image], int, int]:
    """Cut an image into a grid of equal tiles (ViCrop, section 5: high-resolution inputs).

    No overlap, no padding; tiles are at most `res_threshold` px on a side and at most 1.5 times as long as wide.
    Returns:
        (tiles, vertical_split, horizontal_split): PIL images row by row, number of rows, number of columns.
    """
    (width, height), (rows, columns) = image.size, tile_grid(image.size, res_threshold)
    xs = [round(column * width / columns) for column in range(columns + 1)]
    ys = [round(row * height / rows) for row in range(rows + 1)]
    tiles = [image.crop((xs[i], ys[j], xs[i + 1], ys[j + 1])) for j in range(rows) for i in range(columns)]
    return tiles, rows, columns


def tile_grid(size: tuple[int, int], res_threshold: int = TILE_SIDE) -> tuple[int, int]:
    """(rows, columns) of the tiles of an image of (width, height) pixels."""
    width, height = size
    columns, rows = math.ceil(width / res_threshold), math.ceil(height / res_threshold)
    while max(width / columns, height / rows) > TILE_ASPECT * min(width / columns, height / rows):
        if width / columns > height / rows:
            columns += 1
        else:
            rows += 1
    return rows, columns


def same_size(tiles: Sequence[Image.Image], square: bool = False) -> list[Image.Image]:
    """Tiles (PIL) resized to one common size, so that their maps fit together; `square` for centre-cropping models."""
    size = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    if square:
        size = (max(size), max(size))
    return [tile if tile.size == size else tile.resize(size, Image.Resampling.BICUBIC) for tile in tiles]


def join_maps(maps: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """(rows * h, columns * w) float32 from rows * columns maps (h, w), given row by row."""
    maps = np.stack(list(maps)).astype(np.float32)  # (tiles, h, w)
    h, w = maps.shape[1:]
    return maps.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def high_res(map_func: Callable[..., Any], image: ImageSource, prompt: str, general_prompt: str, model: Any,
             processor: Any, *, geometry: str = "exact", **options: Any) -> np.ndarray:  # fmt: skip
    """An importance map of the whole image made of one map per tile.

    Args:
        map_func: any `(image, prompt, general_prompt, model, processor) -> (h, w)`, e.g. `rel_attention_llava`. Ours
            take all tiles through the model together; any other function is called tile by tile.
        image: PIL image of any size.
        geometry: "exact" stretches tiles to squares where the processor would crop their centre; "upstream" does not.
        options: further keywords for map_func (`layer=`, ...).
    Returns:
        (rows * h, columns * w) float32 array that covers the image.
    """
    rest = (prompt, general_prompt, model, processor)
    own = getattr(map_func, "high_res", None)  # of a methods.MapMethod
    if own is not None:
        return own(load_image(image), *rest, geometry=geometry, **options)
    tiles, rows, columns = high_res_split_threshold(load_image(image))
    cuts = getattr(getattr(processor, "image_processor", None), "do_center_crop", False)
    tiles = same_size(tiles, square=geometry == "exact" and bool(cuts))
    return join_maps([map_func(tile, *rest, **options) for tile in tiles], rows, columns)
