"""Which token shows which part of an image, and which pixels a map covers: a function for each kind of layout.

Regions are xyxy pixels of the image, and may reach beyond it where a processor pads.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]  # (width, height) in pixels
Region = tuple[int, int, int, int]


class Layout(NamedTuple):
    """How the tokens of one image make a map.

    Attributes:
        num_tokens: tokens that stand for the image in a prompt.
        index: (h, w) int array: the token in each cell of the map, row 0 at the top. Where a connector is in between (a
            Q-Former), the patch in each cell.
        region: the rectangle of the image that the map covers.
        text: what stands for the image in a prompt, with the marks between its tokens; empty where there are none.
    """

    num_tokens: int
    index: np.ndarray
    region: Region
    text: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the map."""
        return self.index.shape


def whole(size: Size) -> Region:
    """The region of a map that covers all of an image."""
    return 0, 0, *size


# ------------------------------------------------------------------------------------------------------------- tokens
def raster(h: int, w: int, first: int = 0, after_row: int = 0) -> np.ndarray:
    """(h, w) token numbers, row by row from number `first`, with `after_row` further tokens (a newline) after each."""
    return first + np.arange(h)[:, None] * (w + after_row) + np.arange(w)


def thw(patch_grid: tuple[int, int], merge: int) -> np.ndarray:
    """(h, w) token numbers where merge x merge patches of a (rows, columns) grid become a token, row by row."""
    return raster(patch_grid[0] // merge, patch_grid[1] // merge)


def tiles(rows: int, columns: int, h: int, w: int, overview: int = 0) -> np.ndarray:
    """(rows * h, columns * w) token numbers of tiles, one after the other; `overview` tokens come first."""
    numbers = np.arange(rows * columns * h * w).reshape(rows, columns, h, w)
    return overview + numbers.transpose(0, 2, 1, 3).reshape(rows * h, columns * w)


def any_resolution(rows: int, columns: int, side: int, size: Size, overview: int) -> np.ndarray:
    """(h, w) token numbers of rows x columns tiles without their padding, a newline after each row; overview first.

    Args:
        side: cells of a tile's side; size: (width, height) of the image, which lies padded in the middle of the tiles.
    Raises:
        ValueError: the image is so narrow that no token of its tiles is left.
    """
    h, w, (width, height) = rows * side, columns * side, size
    if width / height > w / h:
        h -= 2 * ((h - int(round(height * (w / width), 7))) // 2)
    else:
        w -= 2 * ((w - int(round(width * (h / height), 7))) // 2)
    if not h or not w:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow: no token of its tiles is left")
    return raster(h, w, overview, after_row=1)


def at_most(h: int, w: int, cells: int) -> tuple[int, int]:
    """(h, w) of a grid once it is scaled down to about so many cells, which is done where it has over 1.21 as many."""
    ratio = math.sqrt(h * w / cells)
    return (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)


# ------------------------------------------------------------------------------------------------------------- regions
def square_region(size: Size) -> Region:
    """The region of an image padded to a square, in the middle of it."""
    side = max(size)
    left, top = (-((side - length) // 2) for length in size)
    return left, top, left + side, top + side


def any_resolution_region(rows: int, columns: int, side: int, cell: int, grid: tuple[int, int], size: Size) -> Region:
    """The region of an image that lies in the middle of rows x columns tiles, of which whole cells remain.

    Args:
        side: cells of a tile's side; cell: pixels of a cell's; grid: (h, w) of the cells that are left in the middle.
        size: (width, height) of the image.
    """
    canvas = columns * side * cell, rows * side * cell
    scale = min(whole_side / length for whole_side, length in zip(canvas, size, strict=True))
    edges = []
    for length, whole_side, cells in zip(size, canvas, reversed(grid), strict=True):
        shown = min(math.ceil(length * scale), whole_side)  # pixels that the image takes, padding beside it
        start = (whole_side - cells * cell) // 2 - (whole_side - shown) // 2
        edges.append((round(start * length / shown), round((start + cells * cell) * length / shown)))
    (x1, x2), (y1, y2) = edges
    return x1, y1, x2, y2


def center_crop_region(region: Region, resize: dict[str, int] | None, crop: Size) -> Region:
    """What a processor shows of a region when it resizes it and cuts the middle out.

    Args:
        region: what is resized; resize: {"shortest_edge"} or {"width", "height"} pixels, None where it is not.
        crop: (width, height) of what is cut out; larger than what is there where the processor pads.
    """
    left, top, right, bottom = region
    sides = right - left, bottom - top
    edges = []
    for length, small, wanted, origin in zip(sides, _resized(sides, resize), crop, (left, top), strict=True):
        start = (small - wanted) // 2  # negative where the processor pads
        first, last = round(start * length / small), round((start + wanted) * length / small)
        edges.append((origin + first, origin + max(first + 1, last)))
    (x1, x2), (y1, y2) = edges
    return x1, y1, x2, y2


def _resized(sides: Size, resize: dict[str, int] | None) -> Size:
    width, height = sides
    short = (resize or {}).get("shortest_edge")
    if short:
        scale = short / min(sides)
        return (short, int(scale * height)) if width <= height else (int(scale * width), short)
    return (resize["width"], resize["height"]) if resize else sides


# -------------------------------------------------------------------------------------------------------------- pixels
def unpatchify(values: "Tensor", grid: tuple[int, int], merge: int, copies: int, side: int) -> "Tensor":
    """(copies, 3, H, W) pictures from patches (patches, 3 * copies * side * side) that come token by token.

    Args:
        grid: (h, w) of the tokens, each of merge x merge patches; side: pixels of a patch's side.
    """
    h, w = grid
    values = values.reshape(h, w, merge, merge, 3, copies, side, side)
    pictures = values.permute(5, 4, 0, 2, 6, 1, 3, 7)  # (copies, 3, h, merge, side, w, merge, side)
    return pictures.reshape(copies, 3, h * merge * side, w * merge * side)


def cell_means(picture: "Tensor", grid: tuple[int, int], whole_cells: bool = True) -> "Tensor":
    """(h, w): means of a picture (H, W) over the cells of a grid.

    Args:
        whole_cells: cells are a whole number of pixels, and what is left over at the right and the bottom is not seen.
            If not, all of the picture is the grid's, and a pixel belongs to the cell in which its middle lies.
    """
    (h, w), (height, width) = grid, picture.shape
    if whole_cells:
        rows, columns = height // h, width // w
        return picture[: h * rows, : w * columns].reshape(h, rows, w, columns).mean((1, 3))
    down, across = ((np.arange(side) + 0.5) * cells // side for side, cells in ((height, h), (width, w)))
    cell = picture.new_tensor(down[:, None] * w + across).long().flatten()
    total, count = (picture.new_zeros(h * w).index_add(0, cell, each.flatten())
                    for each in (picture, picture.new_ones(picture.shape)))  # fmt: skip
    return (total / count.clamp(min=1)).view(h, w)


def join_tiles(values: "Tensor", rows: int, columns: int) -> "Tensor":
    """(1, 3, H, W): one picture from tiles (rows * columns, 3, side, side), row by row."""
    picture = values.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return picture.flatten(3).flatten(1, 2)[None]


def middle(picture: "Tensor", height: int, width: int) -> "Tensor":
    """The middle (..., height, width) of a picture (..., H, W)."""
    top, left = ((side - wanted) // 2 for side, wanted in zip(picture.shape[-2:], (height, width), strict=True))
    return picture[..., top : top + height, left : left + width]
