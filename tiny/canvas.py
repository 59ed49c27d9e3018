"""What both editions of the world are drawn with: colours, and the shapes and sizes of pictures and signs."""

import math
import random

from tiny.drawing import Paint

COLORS = {
    "red": (214, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (236, 206, 40),
    "purple": (140, 50, 170), "orange": (240, 130, 30), "white": (245, 245, 245), "black": (22, 22, 22),
}  # fmt: skip
DARK_INK = ("yellow", "orange", "white")  # signs of these colours carry black characters, the others white ones
ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)  # width / height of pictures
SIDES = (0.035, 0.45)  # sqrt(width * height) of signs, relative to that of the picture


def ink_of(color: str) -> Paint:
    """The colour of what is written on a sign of that colour."""
    return (10, 10, 10) if color in DARK_INK else (250, 250, 250)


def canvas_size(rng: random.Random, side: float, aspect: float | None = None) -> tuple[int, int]:
    """(width, height) in pixels of a canvas with sqrt(width * height) = `side`; its `aspect` is drawn if None."""
    aspect = aspect or rng.choice(ASPECTS)
    return round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
