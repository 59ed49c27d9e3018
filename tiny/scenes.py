"""Scenes of coloured signs with a digit each: the world in which the embedded models live.

    python -m tiny.scenes                                        # writes the demo dataset, data/demo
    python -m tiny.scenes --seed 7 --per_size 1000 --out DIR     # a fresh test set: DIR/data.json, DIR/images/

A scene is a drawing, not a bitmap: it can be rendered whole or through any window, at any scale, always sharp.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tiny.drawing import Paint, apart, outline, shaded
from vicrop.dataset import GROUNDING
from vicrop.files import write_atomically
from vicrop.tables import SIZES, size_class

COLORS = {
    "red": (214, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 215), "yellow": (236, 206, 40),
    "purple": (140, 50, 170), "orange": (240, 130, 30), "white": (245, 245, 245), "black": (22, 22, 22),
}  # fmt: skip
DARK_INK = ("yellow", "orange", "white")  # signs of these colours carry a black digit, the others a white one
ASPECTS = (1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16)  # width / height

SIDES = (0.035, 0.45)  # of signs, relative to sqrt(canvas area)
MIN_SIDE_PX = 22  # below this even a person who zooms in cannot read the digit

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
    box: tuple  # xyxy, canvas pixels (floats)
    ink: tuple  # RGB of the digit
    paint: tuple  # RGB of the board


@dataclass(frozen=True)
class Scene:
    size: tuple  # (width, height), canvas pixels
    signs: list
    texture: Image.Image  # a few cells of muted colour, stretched over the canvas
    clutter: list  # (kind, points, RGB, width), muted shapes behind the signs

    def render(self, window=None, scale=1.0):
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
            draw.text(centre, sign.digit, fill=sign.ink, font=font(side), anchor="mm", stroke_width=side / 40)
        return image


def ink_of(color: str) -> Paint:
    """The colour of what is written on a sign of that colour."""
    return (10, 10, 10) if color in DARK_INK else (250, 250, 250)


def font(sign_side):
    """Pillow's own font (no system font needed) at the size at which a digit fills two thirds of a sign."""
    return _font(max(2, round(0.95 * sign_side)))


@cache
def _font(size):
    return ImageFont.load_default(size)


def classes_of(signs):
    """The size classes that signs of a range of sides (relative to the canvas) are in."""
    low, high = (side**2 for side in signs)
    below = [0, *list(SIZES.values())[:-1]]
    return [name for (name, limit), start in zip(SIZES.items(), below, strict=True) if low < limit and high > start]


def _canvas(rng, side, aspect):
    aspect = aspect or rng.choice(ASPECTS)
    return round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))


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


def make_scene(rng, side=640, count=None, sides=SIDES, repeat_colors=False, min_side_px=0, aspect=None):
    """A random scene.

    Args:
        rng: random.Random; the scene is a function of its state alone.
        side: sqrt of the canvas area in pixels.
        count: how many signs to try to place; 2 to 5 if None. Signs never overlap, so fewer may fit (never none).
        sides: range of the sign's side relative to `side`, sampled log-uniformly.
        repeat_colors: let several signs share a colour (for training the vision tower; questions need unique ones).
        min_side_px: no sign is smaller than this many canvas pixels.
        aspect: width / height of the canvas; drawn from ASPECTS if None.
    """
    size = _canvas(rng, side, aspect)
    texture, clutter = _background(rng, size)
    count = count or rng.randint(2, 5)
    colors = rng.choices(list(COLORS), k=count) if repeat_colors else rng.sample(list(COLORS), count)
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
    if not signs:
        return make_scene(rng, side, count, sides, repeat_colors, min_side_px, aspect)
    return Scene(size, signs, texture, clutter)


def write_dataset(out, seed, per_size, side=None, signs=SIDES):
    """Write `out`/data.json and `out`/images: `per_size` questions for each size class, several per image.

    Every fourth canvas is larger than 1024 px on its longer side. A question never depends on what a model can do.

    Args:
        side: sqrt of every canvas area in pixels, in place of those sizes.
        signs: range of a sign's side, relative to `side`; only size classes that it reaches are asked about.
    """
    out, rng = Path(out), random.Random(f"dataset {seed}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "data.json").unlink(missing_ok=True)  # what is there of other scenes must not ask about these images
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
    write_grounding(out, records)
    write_atomically(out / "data.json", records)
    return records


def write_grounding(out, records):
    """Write `out`/grounding.jsonl: for the sign of each question a phrase and its box, [x, y, width, height].

    Input and ground truth of localization heads in one file (see localization/).
    """
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
    (out / GROUNDING).write_text("".join(json.dumps(line) + "\n" for line in lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2025, help="any seed is disjoint from the training scenes")
    parser.add_argument("--per_size", type=int, default=120, help="questions per size class (small, medium, large)")
    parser.add_argument("--out", default="data/demo", help="folder to write data.json and images/ into")
    parser.add_argument("--side", type=int, help="side of every canvas, were it square; default: 450 to 1300, varied")
    parser.add_argument("--signs", type=float, nargs=2, metavar=("LOW", "HIGH"), default=SIDES,
                        help="range of a sign's side, relative to the canvas's")  # fmt: skip
    args = parser.parse_args()
    if not 0 < args.signs[0] < args.signs[1] < 1:
        parser.error(f"--signs must be two rising numbers between 0 and 1, got {args.signs[0]} {args.signs[1]}")
    if args.per_size < 1:
        parser.error(f"--per_size {args.per_size} is not at least 1")
    records = write_dataset(args.out, args.seed, args.per_size, args.side, tuple(args.signs))
    print(f"{len(records)} questions about {len({r['image_path'] for r in records})} images in {args.out}")


if __name__ == "__main__":
    main()
