"""Scenes of coloured signs with a digit each: the first edition of the world in which the embedded models live.

    python -m tiny.scenes --seed 7 --per_size 1000 --out DIR     # a fresh test set: DIR/data.json, DIR/images/

A scene is a drawing, not a bitmap: it can be rendered whole or through any window, at any scale, always sharp.
"""

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tiny.canvas import COLORS, SIDES, canvas_size, ink_of
from tiny.dataset_folder import begin_folder, finish_folder
from tiny.drawing import Box, Paint, apart, outline, shaded
from vicrop.tables import SIZES, size_class

MIN_SIDE_PX = 22  # below this even a person who zooms in cannot read the digit
MIN_CANVAS_PX = 320  # of a dataset: on smaller ones no sign that can be read is small
TRIES = 100  # to place any sign at all

NUMBER_QUESTIONS = (
    "what number is on the {color} sign?",
    "which digit is on the {color} sign?",
    "what does the {color} sign say?",
)
PRESENCE_QUESTIONS = ("is there a {color} sign in the image?", "does the image show a {color} sign?")


@dataclass(frozen=True)
class Sign:
    color: str
    digit: str
    box: Box  # canvas pixels
    ink: Paint  # of the digit
    paint: Paint  # of the board


@dataclass(frozen=True)
class Scene:
    size: tuple[int, int]  # (width, height), canvas pixels
    signs: list[Sign]
    texture: Image.Image  # a few cells of muted colour, stretched over the canvas
    clutter: list[tuple]  # (kind, points, RGB, width), muted shapes behind the signs

    def render(self, window: Box | None = None, scale: float = 1.0) -> Image.Image:
        """RGB image of `window` (xyxy canvas pixels; None: the whole canvas), `scale` output pixels per one of its."""
        width, height = self.size
        x1, y1, x2, y2 = window or (0, 0, width, height)
        size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
        cells_w, cells_h = self.texture.size
        cells = (x1 / width * cells_w, y1 / height * cells_h, x2 / width * cells_w, y2 / height * cells_h)
        image = self.texture.resize(size, Image.Resampling.BILINEAR, box=cells)
        draw = ImageDraw.Draw(image)
        place = lambda points: [((x - x1) * scale, (y - y1) * scale) for x, y in points]  # noqa: E731
        for kind, points, paint, thickness in self.clutter:
            if kind == "line":
                draw.line(place(points), fill=paint, width=max(1, round(thickness * scale)))
            else:
                getattr(draw, kind)(place(points), fill=paint)
        for sign in self.signs:
            a, b, c, d = sign.box
            if c <= x1 or a >= x2 or d <= y1 or b >= y2:
                continue
            (left, top), (right, bottom) = place([(a, b), (c, d)])
            side = bottom - top
            draw.rounded_rectangle((left, top, right, bottom), radius=side / 7, fill=sign.paint)
            centre = ((left + right) / 2, (top + bottom) / 2)
            size = max(2, round(0.95 * side))  # the digit fills two thirds of the sign
            draw.text(centre, sign.digit, fill=sign.ink, font=font(size), anchor="mm", stroke_width=side / 40)
        return image


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: no system font is needed."""
    return ImageFont.load_default(size)


def classes_of(signs: tuple[float, float]) -> list[str]:
    """The size classes that signs of a range of sides (relative to the canvas) are in."""
    low, high = (side**2 for side in signs)
    below = [0, *list(SIZES.values())[:-1]]
    return [name for (name, limit), start in zip(SIZES.items(), below, strict=True) if low < limit and high > start]


def _background(rng, size):
    base, spread, cells = rng.uniform(50, 170), rng.uniform(10, 60), rng.choice((2, 4, 8, 16))
    noise = np.random.default_rng(rng.getrandbits(32)).uniform(0, spread, (cells, cells, 3))
    texture = Image.fromarray((base + noise).astype(np.uint8))
    clutter = []
    for _ in range(rng.randint(0, 9)):
        (x, y), reach = (rng.uniform(0, size[0]), rng.uniform(0, size[1])), rng.uniform(0.02, 0.4) * min(size)
        far = (x + rng.uniform(0.2, 1) * reach, y + rng.uniform(0.2, 1) * reach)
        grey = base + rng.uniform(-40, 80)
        paint = tuple(int(min(255, max(0, grey + rng.uniform(-14, 14)))) for _ in range(3))
        clutter.append((rng.choice(("line", "line", "ellipse", "rectangle")), [(x, y), far], paint, reach / 15))
    return texture, clutter


def make_scene(
    rng: random.Random,
    side: float = 640,
    count: int | None = None,
    sides: tuple[float, float] = SIDES,
    repeat_colors: bool = False,
    min_side_px: float = 0,
    aspect: float | None = None,
) -> Scene:
    """A random scene, a function of the state of `rng` alone.

    Args:
        side: sqrt of the canvas area in pixels.
        count: how many signs to try to place; 2 to 5 if None. Signs never overlap, so fewer may fit (never none).
        sides: range of the sign's side relative to `side`, sampled log-uniformly.
        repeat_colors: let several signs share a colour (for training the vision tower; questions need unique ones).
        min_side_px: no sign is smaller than this many canvas pixels.
        aspect: width / height of the canvas; drawn from ASPECTS if None.
    Raises:
        ValueError: no sign fits.
    """
    for _ in range(TRIES):
        size = canvas_size(rng, side, aspect)
        texture, clutter = _background(rng, size)
        number = count or rng.randint(2, 5)
        colors = rng.choices(list(COLORS), k=number) if repeat_colors else rng.sample(list(COLORS), number)
        if signs := place_signs(rng, size, side, colors, sides, min_side_px):
            return Scene(size, signs, texture, clutter)
    raise ValueError(f"no sign of {sides[0]:g} to {sides[1]:g} of the side, and at least {min_side_px} px, "
                     f"fits on a canvas of {side:g} px a side")  # fmt: skip


def place_signs(
    rng: random.Random,
    size: tuple[int, int],
    side: float,
    colors: Sequence[str],
    sides: tuple[float, float],
    min_side_px: float,
) -> list[Sign]:
    """Signs of some colours, one after the other, that do not overlap; one for which there is no room is left out."""
    signs = []
    for color in colors:
        for _ in range(25):
            high = max(min_side_px, side * math.exp(rng.uniform(math.log(sides[0]), math.log(sides[1]))))
            wide = high * rng.uniform(0.85, 1.15)
            if wide >= size[0] or high >= size[1]:
                continue
            x, y = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - high)
            box = (x, y, x + wide, y + high)
            if all(apart(box, other.box, 0.01 * side) for other in signs):
                paint = shaded(rng, COLORS[color])
                signs.append(Sign(color, str(rng.randrange(10)), box, ink_of(color), paint))
                break
    return signs


def write_dataset(
    out: Path | str,
    seed: int,
    per_size: int,
    side: float | None = None,
    signs: tuple[float, float] = SIDES,
    overwrite: bool = False,
) -> list[dict]:
    """Write `out`/data.json and `out`/images: `per_size` questions for each size class, several per image.

    Every fourth canvas is larger than 1024 px on its longer side. A question never depends on what a model can do.

    Args:
        side: sqrt of every canvas area in pixels, in place of those sizes.
        signs: range of a sign's side, relative to `side`; only size classes that it reaches are asked about.
        overwrite: replace a set that is there.
    Raises:
        FileExistsError: there is one. ValueError: an argument is out of its range.
    """
    if per_size < 1:
        raise ValueError(f"--per_size must be at least 1, got {per_size}")
    if side is not None and side < MIN_CANVAS_PX:
        raise ValueError(f"--side must be at least {MIN_CANVAS_PX}, got {side}")
    if not 0 < signs[0] < signs[1] < 1:
        raise ValueError(f"--signs must be two rising numbers between 0 and 1, got {signs[0]} {signs[1]}")
    out, rng = Path(out), random.Random(f"dataset {seed}")
    begin_folder(out, "scene_*.jpg", overwrite)
    open_slots, records, number = dict.fromkeys(classes_of(signs), per_size), [], 0
    with tqdm(total=sum(open_slots.values()), unit="question", desc=str(out)) as bar:
        while any(open_slots.values()):
            usual = rng.uniform(1080, 1300) if number % 4 == 3 else rng.uniform(450, 760)
            scene = make_scene(rng, side or usual, sides=signs, min_side_px=MIN_SIDE_PX)
            asked = []
            for sign in scene.signs:
                x1, y1, x2, y2 = sign.box
                kind = size_class((x2 - x1) * (y2 - y1) / (scene.size[0] * scene.size[1]))
                if open_slots.get(kind):
                    open_slots[kind] -= 1
                    asked.append((sign, kind))
            if not asked:
                continue
            name = f"scene_{number:05d}.jpg"
            scene.render().save(out / "images" / name, quality=92)
            for sign, kind in asked:
                records.append({
                    "id": f"{seed}-{number:05d}-{sign.color}",
                    "question": NUMBER_QUESTIONS[0].format(color=sign.color),
                    "labels": [sign.digit],
                    "image_path": name,
                    "gt_bbox": list(outline(sign.box)),
                    "size": kind,
                })  # fmt: skip
            number += 1
            bar.update(len(asked))
    finish_folder(out, records, phrases_about(out, records))
    return records


def phrases_about(out: Path, records: Sequence[dict]) -> list[dict]:
    """For the sign of each question a phrase and its box, [x, y, width, height]: lines of grounding.jsonl."""
    lines = []
    for record in records:
        color = record["id"].rpartition("-")[2]
        x1, y1, x2, y2 = record["gt_bbox"]
        with Image.open(out / "images" / record["image_path"]) as image:
            width, height = image.size
        lines.append({
            "id": record["id"], "prompt": f"the {color} sign", "image_path": f"images/{record['image_path']}",
            "bbox": [x1, y1, x2 - x1, y2 - y1], "width": width, "height": height,
        })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2025, help="any seed is disjoint from the training scenes")
    parser.add_argument("--per_size", type=int, default=120, help="questions per size class (small, medium, large)")
    parser.add_argument("--out", required=True, help="folder to write data.json, grounding.jsonl and images/ into")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    parser.add_argument("--side", type=int, help="side of every canvas, were it square; default: 450 to 1300, varied")
    parser.add_argument("--signs", type=float, nargs=2, metavar=("LOW", "HIGH"), default=SIDES,
                        help="range of a sign's side, relative to the canvas's")  # fmt: skip
    args = parser.parse_args()
    try:
        records = write_dataset(args.out, args.seed, args.per_size, args.side, tuple(args.signs), args.overwrite)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(records)} questions about {len({r['image_path'] for r in records})} images in {args.out}")


if __name__ == "__main__":
    main()
