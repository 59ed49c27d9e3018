"""What the embedded models are shown and asked in training: pictures, labels of their cells, questions, crops.

Both editions of the world are mixed (tiny.scenes, tiny.street). Each batch is a function of (seed, stage, step) alone.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from tiny.boards import CHARACTERS, SHAPES, Thing
from tiny.drawing import CAP_HEIGHT, Box, text_width
from tiny.packing import IGNORE
from tiny.questions import ASKED_SHAPES, RELATIONS, Question, describe, questions_about, things_of
from tiny.scenes import ASPECTS, COLORS, SIDES, Scene, make_scene
from tiny.street import Street, make_street
from vicrop.tables import GENERAL_PROMPT, SIZES

OLD_SHARE = 0.3  # of the scenes that are of the first edition
EASY = (0.16, 0.4)  # size of signs, relative to the canvas, that are read with ease in a picture of 112 pixels
LEGIBLE = (4.5, 6.0)  # one character, several ones: lower than so many pixels they are not asked of the vision tower
FINE = 6  # label pixels per cell
# What is asked of the vision tower at each cell of the map: name -> classes. Slots are the characters of the sign
# there, `length` is how many there are, `glyph` is the character right there and `place` its place in the text;
# `column` and `row` are the sevenths of the picture in which the middle of the thing lies.
TARGETS = {
    "color": ["", *COLORS], "shape": ["", *ASKED_SHAPES],
    "slot1": ["", *CHARACTERS], "slot2": ["", *CHARACTERS], "slot3": ["", *CHARACTERS], "glyph": list(CHARACTERS),
    "place": [1, 2, 3], "length": [1, 2, 3], "column": list(range(7)), "row": list(range(7)),
}  # fmt: skip
# How many turns of a kind are asked about a scene at most; the general prompt is asked of a share of the scenes.
QUOTAS = {"reading": 4, "attribute": 2, "presence": 2, "count": 1, "relation": 3, "two_places": 2, "comparison": 1}
DESCRIBED = 0.5


# ------------------------------------------------------------------------------------------------------------ pictures
def pixels(scene: Street | Scene, rng: random.Random, shape: tuple[int, int], window: Box | None = None) -> np.ndarray:
    """What the model sees of a scene: (height, width, 3) uint8 of that `shape`, resized as the processor resizes.

    The window is drawn at a random one to 2.6 times the resolution first, so that the model meets sharp and
    downscaled edges alike, as it will in photos of any size and in crops.
    """
    x1, y1, x2, y2 = window or (0, 0, *scene.size)
    height, width = shape
    times = rng.uniform(1.0, 2.6)
    scale = times * math.sqrt(height * width / ((x2 - x1) * (y2 - y1)))
    # The datasets' pictures have smooth edges; at more than twice the resolution, resizing makes them so.
    smooth = {"smooth": 2 if times < 2 else 1} if isinstance(scene, Street) else {}
    image = scene.render(window, scale, **smooth)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def window_around(scene: Street | Scene, rng: random.Random, box: Box, zoom: tuple[float, float] = (1.3, 7.0)) -> Box:
    """A near-square window (xyxy) of `zoom` times the box's longer side somewhere around it, inside the canvas."""
    width, height = scene.size
    side = max(box[3] - box[1], box[2] - box[0]) * math.exp(rng.uniform(*map(math.log, zoom)))
    wide, high = min(width, side * rng.uniform(0.87, 1.15)), min(height, side)
    x = (box[0] + box[2]) / 2 - wide / 2 + rng.uniform(-0.4, 0.4) * max(0, wide - (box[2] - box[0]))
    y = (box[1] + box[3]) / 2 - high / 2 + rng.uniform(-0.4, 0.4) * max(0, high - (box[3] - box[1]))
    x, y = min(max(0, x), width - wide), min(max(0, y), height - high)
    return x, y, x + wide, y + high


def window_anywhere(scene: Street | Scene, rng: random.Random) -> Box:
    """A near-square window of any size at any place of the canvas."""
    side = math.sqrt(scene.size[0] * scene.size[1]) * math.exp(rng.uniform(math.log(0.12), math.log(0.6)))
    x, y = (rng.uniform(0, length) for length in scene.size)
    return window_around(scene, rng, (x, y, x + 1e-3, y + 1e-3), (1e3 * side, 1e3 * side))


# -------------------------------------------------------------------------------------------------------------- labels
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


def patch_labels(scene: Street | Scene, shape: tuple[int, int], cell: int, window: Box | None = None) -> np.ndarray:
    """Per map cell, (h, w, targets) int: the class of each of TARGETS, IGNORE where it is not asked."""
    window = window or (0, 0, *scene.size)
    h, w = (side // cell for side in shape)
    found = np.full((h, w, len(TARGETS)), IGNORE, np.int64)
    found[..., :2] = 0
    fine = labels_of(scene, window, (w * FINE, h * FINE)).reshape(h, FINE, w, FINE)
    scales = shape[1] / (window[2] - window[0]), shape[0] / (window[3] - window[1])
    for number, thing in enumerate(things_of(scene), 1):
        seen = (fine == number).sum((1, 3))  # label pixels of this thing in each cell
        most = max(seen.max(), 2)  # the cell that has most of it is always labelled
        cells = (seen > 0.4 * FINE**2) | (seen > 0.9 * most)
        if not cells.any():
            continue
        found[cells, 0] = TARGETS["color"].index(thing.color)
        found[cells, 1] = TARGETS["shape"].index(thing.shape)
        found[cells, 8:10] = sevenths(thing.box, window)
        if thing.text and legible(thing, window, min(scales)):
            slots = thing.text.ljust(3)
            found[cells, 2:5] = [0 if c == " " else 1 + CHARACTERS.index(c) for c in slots]
            found[cells, 7] = len(thing.text) - 1
            label_glyphs(found[..., 5:7], thing, window, np.array(scales) / cell)
    return found


def sevenths(box: Box, window: Box) -> list[int]:
    """[column, row] of the middle of a box, if the window is cut into seven of each."""
    shares = [((box[axis] + box[axis + 2]) / 2 - window[axis]) / (window[axis + 2] - window[axis]) for axis in (0, 1)]
    return [min(6, max(0, int(7 * share))) for share in shares]


def legible(thing: Thing, window: Box, scale: float) -> bool:
    """Are a sign's characters large enough in the picture, and the sign almost wholly in it?"""
    x1, y1, x2, y2 = thing.box
    wide = min(x2, window[2]) - max(x1, window[0])
    high = min(y2, window[3]) - max(y1, window[1])
    whole = wide > 0 and high > 0 and wide * high > 0.93 * (x2 - x1) * (y2 - y1)
    return whole and thing.cap * scale > LEGIBLE[len(thing.text) > 1]


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


# ----------------------------------------------------------------------------------------------------------- questions
def size_of(question: Question, scene: Street | Scene) -> str:
    """Size class of the smallest thing that a question is about: what is asked of an absent thing has none."""
    if not question.targets:
        return "absent"
    areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in question.targets]
    share = min(areas) / (scene.size[0] * scene.size[1])
    return next(name for name, limit in SIZES.items() if share < limit)


def turns_about(
    scene: Street | Scene,
    rng: random.Random,
    most: int | None = None,
    relations: Sequence[str] = tuple(RELATIONS),
) -> list[tuple[str, str, str]]:
    """Independent single questions about one scene: [(question, answer, its kind and size)], at most `most`."""
    by_kind, turns = {}, []
    for question in questions_about(scene, rng, relations=relations):
        by_kind.setdefault(question.kind, []).append(question)
    for kind, found in by_kind.items():
        for question in rng.sample(found, min(QUOTAS[kind], len(found))):
            turns.append((question.text, question.answer, f"{kind} {size_of(question, scene)}"))
    if rng.random() < DESCRIBED:
        turns.append((GENERAL_PROMPT, describe(scene), "description"))
    return turns if most is None or len(turns) <= most else rng.sample(turns, most)


# ------------------------------------------------------------------------------------------------------------- batches
def draw_scene(rng, count, sides, aspect=None, crowded=False, plates=False) -> Street | Scene:
    """A scene of one of the editions; `crowded`: signs may look alike; `plates`: in a street, and many are plates."""
    if rng.random() < OLD_SHARE:
        return make_scene(rng, 640, count if crowded else min(count, len(COLORS)), sides, crowded, aspect=aspect)
    return make_street(rng, 640, count, sides, aspect=aspect, crowded=crowded or plates)


class Batches(torch.utils.data.Dataset):
    """Batch `step` of a stage, made from the random state (seed, stage, step): restartable, by any worker."""

    def __init__(self, stage, family, seed):
        self.stage, self.family, self.seed = stage, family, seed

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, step):
        return self.make(random.Random(f"{self.seed} {self.stage.name} {step}"), step / self.stage.steps)

    def make(self, rng: random.Random, progress: float) -> dict:
        """A batch for a stage of which `progress` (0 to 1) is done."""
        raise NotImplementedError

    def frame(self, rng):
        """(aspect ratio of a batch's scenes or None for any, shape of what the model is shown of them)."""
        aspect = rng.choice(ASPECTS) if self.family.keeps_aspect else None
        return aspect, self.family.shape(aspect or 1.0)


class PatchBatches(Batches):
    """Crowded scenes for the vision tower, large signs first."""

    def make(self, rng, progress):
        aspect, shape = self.frame(rng)
        images, labels = [], []
        for _ in range(self.stage.batch):
            scene = draw_scene(rng, *self.crowd(rng, progress), aspect, crowded=True)
            anchor = rng.choice(scene.signs).box
            window = window_around(scene, rng, anchor, (1.3, 5.0)) if rng.random() < 0.3 else None
            images.append(pixels(scene, rng, shape, window))
            labels.append(patch_labels(scene, shape, self.family.cell, window))
        return {"pixels": torch.from_numpy(np.stack(images)), "labels": torch.from_numpy(np.stack(labels))}

    @staticmethod
    def crowd(rng, progress):
        """(how many signs, range of their size): most often as many as fit that are read with ease, which teach most.

        Small ones come in later: what is hardly legible teaches nothing before its characters are known.
        """
        if rng.random() < 1 - 0.4 * progress:
            return 30, (rng.uniform(0.13, 0.25), 0.3)
        low = math.exp(rng.uniform(math.log(0.07), math.log(0.16)))
        return rng.randint(8, 22), (low, max(0.2, 2.5 * low))


class AnswerBatches(Batches):
    """Questions about single images; `crops` says how often a batch is about (image, that many crops)."""

    crops = (1.0,)  # weights of 0, 1, 2, ... crops
    easy = 1.0  # share of the scenes in which every sign is read with ease
    # Until which share of the stage which of the RELATIONS are asked about: of one of them, the answer is a plain
    # comparison of two places.
    relations = ((0.6, ("left of",)), (0.75, ("left of", "above")), (1.0, tuple(RELATIONS)))

    def scene(self, rng, progress, aspect):
        """Most often many signs that are read with ease, of which many are plates: a longer text teaches more."""
        if rng.random() > self.easy:
            return draw_scene(rng, rng.randint(2, 5), SIDES, aspect)
        most, low = (3, 0.24) if progress < 0.1 else (7, EASY[0])
        return draw_scene(rng, rng.randint(2, most), (low, EASY[1]), aspect, plates=True)

    def make(self, rng, progress):
        (number,) = rng.choices(range(len(self.crops)), self.crops)
        relations = next(words for until, words in self.relations if progress <= until)
        aspect, shape = self.frame(rng)
        shapes = [shape] + [self.family.shape()] * number
        images, crops, asked, kinds = [], [[] for _ in range(number)], [], []
        for _ in range(self.batch_of(number)):
            scene = self.scene(rng, progress, aspect)
            images.append(pixels(scene, rng, shape))
            for each in crops:  # drawn before any question is: never the method's, never for the asked thing
                sign = rng.choice(scene.signs).box
                window = window_around(scene, rng, sign) if rng.random() < 0.7 else window_anywhere(scene, rng)
                each.append(pixels(scene, rng, shapes[1], window))
            told = turns_about(scene, rng, self.family.turns_per_image, relations)
            turns = [(self.family.turn(question, answer), kind) for question, answer, kind in told]
            turns.sort(key=lambda turn: -sum(map(len, turn[0])))  # turns of one length are packed together
            asked.append([turn for turn, _ in turns])
            kinds.append([f"{'crop ' if number else ''}{kind}" for _, kind in turns])
        batch = {"pixels": stacked(images), "kinds": kinds, **self.family.collate(asked, shapes)}
        return batch | {"crops": [stacked(each) for each in crops]}

    def batch_of(self, number: int) -> int:
        """Images per step; fewer with several crops, which take several times as long."""
        return max(2, round(self.stage.batch * (1.0, 1.0, 0.66, 0.5)[number]))


class PairedAnswerBatches(AnswerBatches):
    """Half of the batches with one to three crops, half of the scenes with signs of any size."""

    crops = (0.45, 0.4, 0.08, 0.07)
    easy = 0.5
    relations = AnswerBatches.relations[-1:]


class MixedBatches(Batches):
    """Both at once, for stages in which everything learns: crowded scenes for the tower, questions with crops."""

    def __init__(self, stage, family, seed):
        super().__init__(stage, family, seed)
        self.parts = PatchBatches(stage, family, seed), PairedAnswerBatches(stage, family, seed)

    def make(self, rng, progress):
        patches, answers = (part.make(rng, max(progress, 0.1)) for part in self.parts)
        return {"patches": patches, "answers": answers}


def stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
