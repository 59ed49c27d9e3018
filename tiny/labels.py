"""Labels for the vision tower: what is at each cell of the map that it makes of a picture."""

import math

import numpy as np
from PIL import Image

from tiny.boards import CHARACTERS, SHAPES, Thing
from tiny.canvas import COLORS
from tiny.drawing import CAP_HEIGHT, Box, text_width
from tiny.packing import IGNORE
from tiny.questions import ASKED_SHAPES, things_of
from tiny.scenes import Scene
from tiny.street import Street

# One character, several ones: lower than so many pixels they are not asked of the vision tower.
LEGIBLE = (4.5, 6.0)
HARDLY = (3.2, 5.0)  # the same for a tower that can read
FINE = 6  # label pixels per cell
# What is asked of the vision tower at each cell of the map: name -> classes. Slots are the characters of the sign
# there, `length` is how many there are, `glyph` is the character right there and `place` its place in the text.
TARGETS = {
    "color": ["", *COLORS], "shape": ["", *ASKED_SHAPES],
    "slot1": ["", *CHARACTERS], "slot2": ["", *CHARACTERS], "slot3": ["", *CHARACTERS], "glyph": list(CHARACTERS),
    "place": [1, 2, 3], "length": [1, 2, 3],
}  # fmt: skip
# After them: where the middle of the thing lies, in hundredths of the picture's width and height.
MIDDLE = ("x", "y")


def labels_of(scene: Street | Scene, window: Box, size: tuple[int, int]) -> np.ndarray:
    """(h, w): 1 + index of the thing at each pixel of a picture of that (width, height), stretched if need be."""
    x1, y1, x2, y2 = window
    if isinstance(scene, Street):
        drawn = scene.labels(window, max(size[0] / (x2 - x1), size[1] / (y2 - y1)))
        return np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.NEAREST))
    found = np.zeros(size[::-1], np.uint8)
    for number, thing in enumerate(things_of(scene), 1):
        a, b, c, d = (np.array(thing.box) - (x1, y1, x1, y1)) / (x2 - x1, y2 - y1, x2 - x1, y2 - y1) * (*size, *size)
        found[max(0, round(b)) : max(0, round(d)), max(0, round(a)) : max(0, round(c))] = number
    return found


def glyph_boxes(thing: Thing) -> list[Box]:
    """Where the characters of a sign are (roughly), canvas pixels."""
    x1, y1, x2, y2 = thing.box
    middle = y1 + SHAPES[thing.shape].middle * (y2 - y1)
    step = thing.cap / CAP_HEIGHT * text_width(thing.text) / len(thing.text)
    left = (x1 + x2) / 2 - step * len(thing.text) / 2
    return [
        (left + step * n, middle - thing.cap / 2, left + step * (n + 1), middle + thing.cap / 2)
        for n in range(len(thing.text))
    ]


def patch_labels(
    scene: Street | Scene,
    shape: tuple[int, int],
    cell: int,
    window: Box | None = None,
    limits: tuple[float, float] = LEGIBLE,
) -> np.ndarray:
    """Per map cell, (h, w, targets) int: the class of each of TARGETS, then MIDDLE; IGNORE where it is not asked."""
    window = window or (0, 0, *scene.size)
    h, w = (side // cell for side in shape)
    found = np.full((h, w, len(TARGETS) + len(MIDDLE)), IGNORE, np.int64)
    found[..., :2] = 0
    fine = labels_of(scene, window, (w * FINE, h * FINE)).reshape(h, FINE, w, FINE)
    scales = shape[1] / (window[2] - window[0]), shape[0] / (window[3] - window[1])
    for number, thing in enumerate(things_of(scene), 1):
        shown = (fine == number).sum((1, 3))  # label pixels of this thing in each cell
        most = max(shown.max(), 2)  # the cell that has most of it is always labelled
        cells = (shown > 0.4 * FINE**2) | (shown > 0.9 * most)
        if not cells.any():
            continue
        found[cells, 0] = TARGETS["color"].index(thing.color)
        found[cells, 1] = TARGETS["shape"].index(thing.shape)
        found[cells, 2 : len(TARGETS)] = IGNORE  # another thing may have been there
        found[cells, len(TARGETS) :] = middle(thing.box, window)
        if thing.text and legible(thing, window, min(scales), limits):
            slots = thing.text.ljust(3)
            found[cells, 2:5] = [0 if c == " " else 1 + CHARACTERS.index(c) for c in slots]
            found[cells, 7] = len(thing.text) - 1
            label_glyphs(found[..., 5:7], thing, window, np.array(scales) / cell)
    return found


def middle(box: Box, window: Box) -> list[int]:
    """[x, y] of the middle of a box in a window, in hundredths of its width and height; 0 to 99."""
    shares = [((box[axis] + box[axis + 2]) / 2 - window[axis]) / (window[axis + 2] - window[axis]) for axis in (0, 1)]
    return [min(99, max(0, int(100 * share))) for share in shares]


def legible(thing: Thing, window: Box, scale: float, limits: tuple[float, float]) -> bool:
    """Are a sign's characters large enough in the picture, and the sign almost wholly in it?"""
    x1, y1, x2, y2 = thing.box
    wide = min(x2, window[2]) - max(x1, window[0])
    high = min(y2, window[3]) - max(y1, window[1])
    whole = wide > 0 and high > 0 and wide * high > 0.93 * (x2 - x1) * (y2 - y1)
    return whole and thing.cap * scale > limits[len(thing.text) > 1]


def label_glyphs(found: np.ndarray, thing: Thing, window: Box, scale: np.ndarray) -> None:
    """Write the class of each character, and its place, into the cells that it fills, or that hold most of it."""
    h, w = found.shape[:2]
    for place, (character, box) in enumerate(zip(thing.text, glyph_boxes(thing), strict=True)):
        a, b, c, d = (np.array(box) - (*window[:2], *window[:2])) * (*scale, *scale)  # in cells
        for row in range(max(0, int(b)), min(h, math.ceil(d))):
            for column in range(max(0, int(a)), min(w, math.ceil(c))):
                overlap = (min(c, column + 1) - max(a, column)) * (min(d, row + 1) - max(b, row))
                if overlap > 0.35 or overlap > 0.4 * (c - a) * (d - b):
                    found[row, column] = CHARACTERS.index(character), place
