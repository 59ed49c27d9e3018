"""Sign boards: their shapes, their characters, and how they are drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tiny.canvas import ink_of
from tiny.drawing import CAP_HEIGHT, Box, Item, Paint, fitting_size

DIGITS = "0123456789"
LETTERS = "ACEFHJKLMNPRTUXY"  # as on number plates: none that is easily taken for a digit or for another letter
CHARACTERS = DIGITS + LETTERS


@dataclass(frozen=True)
class Board:
    """A shape of sign.

    Attributes:
        aspects: range of width / height.
        lengths: numbers of characters, as often as they shall occur.
        room: for 1, 2 and 3 characters the (width, height) that they may fill, relative to the board.
        middle: where the text's centre lies, relative to the board's height.
    """

    aspects: tuple[float, float]
    lengths: Sequence[int]
    room: Sequence[tuple[float, float]]
    middle: float = 0.5


SHAPES = {
    "square": Board((0.85, 1.15), (1, 2), ((0.72, 0.66), (0.8, 0.62))),
    "circle": Board((1.0, 1.0), (1, 2), ((0.62, 0.58), (0.74, 0.5))),
    "triangle": Board((1.0, 1.15), (1,), ((0.5, 0.46),), 0.655),
    "diamond": Board((0.9, 1.1), (1,), ((0.5, 0.46),)),
    "plate": Board((1.9, 2.3), (2, 3), ((0.8, 0.72), (0.82, 0.72), (0.84, 0.72))),
}


@dataclass(frozen=True)
class Thing:
    """What can be asked about: a sign, a car, a door.

    Attributes:
        shape: one of SHAPES, or "car", "door".
        box: xyxy, canvas pixels (floats).
        paint: RGB.
        text, cap: what is written on it, and the height of its characters in canvas pixels.
    """

    shape: str
    color: str
    box: Box
    paint: Paint
    text: str = ""
    cap: float = 0.0

    @property
    def is_sign(self) -> bool:
        return self.shape in SHAPES


def make_text(rng: random.Random, shape: str) -> str:
    """Characters for a board: two in three are digits."""
    alphabet = DIGITS if rng.random() < 0.45 else CHARACTERS
    return "".join(rng.choices(alphabet, k=rng.choice(SHAPES[shape].lengths)))


def text_size(shape: str, text: str, width: float, height: float) -> tuple[float, float]:
    """(font size, height of the characters) of a text on a board of that size."""
    room = SHAPES[shape].room[len(text) - 1]
    size = fitting_size(text, room[0] * width, room[1] * height)
    return size, CAP_HEIGHT * size


def board_items(sign: Thing, owner: int) -> list[Item]:
    """A board with a thin rim in the colour of its text."""
    x1, y1, x2, y2 = sign.box
    width, height = x2 - x1, y2 - y1
    ink, rim = ink_of(sign.color), 0.035 * min(width, height)
    items = [
        *silhouette(sign.shape, sign.box, sign.paint, owner),
        *silhouette(sign.shape, shrunk(sign.shape, sign.box, 1.1 * rim), ink, owner),
        *silhouette(sign.shape, shrunk(sign.shape, sign.box, 2.0 * rim), sign.paint, owner),
    ]
    size, _ = text_size(sign.shape, sign.text, width, height)
    centre = ((x1 + x2) / 2, y1 + SHAPES[sign.shape].middle * height)
    return [*items, Item("text", [centre], ink, size, owner, sign.text)]


def shrunk(shape: str, box: Box, by: float) -> Box:
    """The box of a board whose edge lies everywhere `by` inside that of `box`."""
    x1, y1, x2, y2 = box
    if shape == "diamond":
        by *= 1.41
    if shape == "triangle":
        return x1 + 1.75 * by, y1 + 2.1 * by, x2 - 1.75 * by, y2 - by
    return x1 + by, y1 + by, x2 - by, y2 - by


def silhouette(shape: str, box: Box, paint: Paint, owner: int) -> list[Item]:
    x1, y1, x2, y2 = box
    x, y, side = (x1 + x2) / 2, (y1 + y2) / 2, min(x2 - x1, y2 - y1)
    if shape == "circle":
        return [Item("ellipse", [(x1, y1), (x2, y2)], paint, owner=owner)]
    if shape == "triangle":
        return [Item("polygon", [(x, y1), (x2, y2), (x1, y2)], paint, owner=owner)]
    if shape == "diamond":
        return [Item("polygon", [(x, y1), (x2, y), (x, y2), (x1, y)], paint, owner=owner)]
    return [Item("rounded", [(x1, y1), (x2, y2)], paint, side / 7, owner)]
