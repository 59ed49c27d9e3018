"""Drawings that can be rendered whole or through any window, at any scale, always sharp and smooth.

    drawing = Drawing((640, 480), backdrop, [Item("ellipse", [(10, 10), (60, 60)], (214, 40, 40), owner=0)])
    drawing.render()                                    # PIL, 640 x 480
    drawing.render((0, 0, 100, 100), scale=40)          # its top left corner, 4000 x 4000, as sharp
    drawing.labels() == 1                               # exact mask of what belongs to owner 0

All coordinates are canvas pixels (floats), x to the right, y down.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Paint = tuple[int, int, int]

BAND = 1024  # a large picture is drawn in bands of so many rows
CAP_HEIGHT = 0.71  # height of a capital or a digit, relative to the size of Pillow's own font


@dataclass(frozen=True)
class Item:
    """One thing that is painted over all before it.

    Attributes:
        kind: "polygon", "ellipse", "line", "rounded" (a rectangle with round corners) or "text".
        points: corners; two opposite ones of an ellipse or a rounded rectangle; the centre of a text.
        width: of a line; radius of round corners; font size of a text (all in canvas pixels).
        owner: number of the object that it belongs to; None: it belongs to none, and hides those behind it.
    """

    kind: str
    points: Sequence[Point]
    paint: Paint
    width: float = 0.0
    owner: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Drawing:
    """Items on a canvas, in the order in which they are painted.

    Attributes:
        size: (width, height) of the canvas.
        backdrop: a few pixels of colour, stretched over the canvas.
    """

    size: tuple[int, int]
    backdrop: Image.Image
    items: Sequence[Item] = field(default_factory=list)

    def render(self, window: Box | None = None, scale: float = 1.0, smooth: int = 2) -> Image.Image:
        """RGB picture of a window.

        Args:
            window: what is shown of the canvas; None: all of it.
            scale: pixels of the picture per pixel of the canvas.
            smooth: edges are drawn at so many times the scale and then averaged; 1 is fast and leaves them jagged.
        """
        x1, y1, x2, y2 = window or (0, 0, *self.size)
        width, height = (max(1, round(side * scale)) for side in (x2 - x1, y2 - y1))
        if smooth == 1 and height <= BAND:
            return self._paint((x1, y1), scale, (width, height))
        picture = Image.new("RGB", (width, height))
        for top in range(0, height, BAND):
            rows = min(BAND, height - top)
            band = self._paint((x1, y1 + top / scale), scale * smooth, (width * smooth, rows * smooth))
            picture.paste(band.reduce(smooth) if smooth > 1 else band, (0, top))
        return picture

    def labels(self, window: Box | None = None, scale: float = 1.0) -> np.ndarray:
        """(h, w) uint8: 1 + the number of the object that is seen at each pixel, 0 where there is none."""
        x1, y1, x2, y2 = window or (0, 0, *self.size)
        image = Image.new("L", tuple(max(1, round(side * scale)) for side in (x2 - x1, y2 - y1)))
        draw = ImageDraw.Draw(image)
        for item in self.items:
            if item.kind != "text":
                paint_item(draw, item, (x1, y1), scale, 0 if item.owner is None else 1 + item.owner)
        return np.asarray(image)

    def _paint(self, corner: Point, scale: float, size: tuple[int, int]) -> Image.Image:
        """RGB picture of that size, whose top left pixel lies at `corner` of the canvas."""
        (left, top), (width, height) = corner, self.size
        cells_w, cells_h = self.backdrop.size
        right, bottom = min(width, left + size[0] / scale), min(height, top + size[1] / scale)
        cells = (left / width * cells_w, top / height * cells_h, right / width * cells_w, bottom / height * cells_h)
        image = self.backdrop.resize(size, Image.Resampling.BILINEAR, box=cells)
        draw = ImageDraw.Draw(image)
        for item in self.items:
            paint_item(draw, item, corner, scale, item.paint)
        return image


def paint_item(draw: ImageDraw.ImageDraw, item: Item, corner: Point, scale: float, paint: Paint | int) -> None:
    """Paint an item onto a picture whose top left pixel lies at `corner` of the canvas."""
    points = [((x - corner[0]) * scale, (y - corner[1]) * scale) for x, y in item.points]
    if item.kind == "line":
        draw.line(points, fill=paint, width=max(1, round(item.width * scale)))
    elif item.kind == "text":
        size = max(2.0, item.width * scale)
        draw.text(points[0], item.text, fill=paint, font=font(size), anchor="mm", stroke_width=size / 42)
    elif item.kind == "rounded":
        draw.rounded_rectangle(points, radius=item.width * scale, fill=paint)
    else:
        getattr(draw, item.kind)(points, fill=paint)


def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font (no system font needed) at that size in pixels, to a quarter of a pixel."""
    return _font(round(4 * size) / 4)


@cache
def _font(size):
    return ImageFont.load_default(size)


@cache
def text_width(text: str) -> float:
    """Width of a text relative to its font's size."""
    return font(200).getlength(text) / 200 + 1 / 21


def fitting_size(text: str, width: float, height: float) -> float:
    """The font size at which a text of capitals and digits fills a box in one of the two directions."""
    return min(width / text_width(text), height / CAP_HEIGHT)


def rectangle(box: Box) -> list[Point]:
    x1, y1, x2, y2 = box
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def apart(a: Box, b: Box, gap: float = 0.0) -> bool:
    """Do two boxes keep at least that distance in one direction?"""
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def inside(box: Box, outer: Box) -> bool:
    return outer[0] <= box[0] and outer[1] <= box[1] and box[2] <= outer[2] and box[3] <= outer[3]


def outline(box: Box) -> tuple[int, int, int, int]:
    """The smallest box of whole pixels around a box."""
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])


def shaded(rng: random.Random, paint: Paint) -> Paint:
    """A colour as it looks in more or less light."""
    light = rng.uniform(0.85, 1.0)
    return tuple(int(light * channel) for channel in paint)
