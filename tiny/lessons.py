"""What the embedded models are shown and asked in training: pictures, questions, crops.

Both editions of the world are mixed (tiny.scenes, tiny.street). Each batch is a function of (seed, stage, step) alone.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from tiny.canvas import ASPECTS, COLORS, SIDES
from tiny.drawing import Box
from tiny.labels import HARDLY, LEGIBLE, middle, patch_labels
from tiny.questions import RELATIONS, Question, describe, questions_about, size_of, things_of
from tiny.scenes import Scene, make_scene
from tiny.street import Street, make_street
from vicrop.tables import GENERAL_PROMPT

OLD_SHARE, MORE_OLD = 0.3, 0.4  # of the scenes that are of the first edition; where most signs are small
EASY = (0.16, 0.4)  # size of signs, relative to the canvas, that are read with ease in a picture of 112 pixels
# How many turns of a kind are asked about a scene at most; the general prompt is asked of a share of the scenes.
QUOTAS = {"reading": 4, "attribute": 2, "presence": 2, "count": 1, "relation": 3, "two_places": 2, "comparison": 1}
DESCRIBED = 0.5
AROUND = 0.7  # of the crops: around some thing, whatever is asked; the others are anywhere
IMAGES = (1.0, 1.0, 0.66, 0.5)  # of a batch with 0 to 3 crops, relative to the stage's: several crops take longer


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
    side = max(box[3] - box[1], box[2] - box[0]) * math.exp(rng.uniform(*map(math.log, zoom)))
    wide, high = near_square(scene, rng, side)
    x = (box[0] + box[2]) / 2 + rng.uniform(-0.4, 0.4) * max(0, wide - (box[2] - box[0]))
    y = (box[1] + box[3]) / 2 + rng.uniform(-0.4, 0.4) * max(0, high - (box[3] - box[1]))
    return window_at(scene, x, y, wide, high)


def window_anywhere(scene: Street | Scene, rng: random.Random) -> Box:
    """A near-square window of any size at any place of the canvas."""
    side = math.sqrt(scene.size[0] * scene.size[1]) * math.exp(rng.uniform(math.log(0.12), math.log(0.6)))
    x, y = (rng.uniform(0, length) for length in scene.size)
    return window_at(scene, x, y, *near_square(scene, rng, side))


def near_square(scene: Street | Scene, rng: random.Random, side: float) -> tuple[float, float]:
    """(width, height) of a window of about that side, no larger than the canvas."""
    return min(scene.size[0], side * rng.uniform(0.87, 1.15)), min(scene.size[1], side)


def window_at(scene: Street | Scene, x: float, y: float, wide: float, high: float) -> Box:
    """The window of that size whose middle is as near to (x, y) as the canvas allows."""
    left = min(max(0, x - wide / 2), scene.size[0] - wide)
    top = min(max(0, y - high / 2), scene.size[1] - high)
    return left, top, left + wide, top + high


# ----------------------------------------------------------------------------------------------------------- questions
class Lesson(NamedTuple):
    """A question with its answer, and where the things lie that it names.

    Attributes:
        kind: of question, and the size of what it is about. name_ends: (place in the question where a name ends, x, y),
            x and y in hundredths of the picture, for each thing that it names.
    """

    question: str
    answer: str
    kind: str
    name_ends: Sequence[tuple[int, int, int]] = ()


def lesson_of(question: Question, scene: Street | Scene) -> Lesson:
    """A question about a scene as it is taught."""
    name_ends = [(end, *middle(thing.box, (0, 0, *scene.size))) for end, thing in question.mentions()]
    return Lesson(question.text, question.answer, f"{question.kind} {size_of(question, scene)}", name_ends)


def lessons_about(
    scene: Street | Scene,
    rng: random.Random,
    most: int | None = None,
    relations: Sequence[str] = tuple(RELATIONS),
) -> list[Lesson]:
    """Independent single questions about one scene, at most `most`."""
    by_kind, lessons = {}, []
    for question in questions_about(scene, rng, relations=relations):
        by_kind.setdefault(question.kind, []).append(question)
    for kind, found in by_kind.items():
        for question in rng.sample(found, min(QUOTAS[kind], len(found))):
            lessons.append(lesson_of(question, scene))
    if rng.random() < DESCRIBED:
        lessons.append(Lesson(GENERAL_PROMPT, describe(scene), "description"))
    return lessons if most is None or len(lessons) <= most else rng.sample(lessons, most)


# ------------------------------------------------------------------------------------------------------------- batches
def draw_scene(
    rng: random.Random,
    count: int,
    sides: tuple[float, float],
    aspect: float | None = None,
    crowded: bool = False,
    plates: bool = False,
    old: float = OLD_SHARE,
) -> Street | Scene:
    """A scene of one of the editions; `crowded`: signs may look alike; `plates`: in a street, and many are plates.

    `old`: how likely it is of the first edition.
    """
    if rng.random() < old:
        return make_scene(rng, 640, count if crowded else min(count, len(COLORS)), sides, crowded, aspect=aspect)
    return make_street(rng, 640, count, sides, aspect=aspect, crowded=crowded or plates)


class Batches(torch.utils.data.Dataset):
    """Batch `step` of a stage, made from the random state (seed, stage, step): restartable, by any worker."""

    old = OLD_SHARE

    def __init__(self, stage: Any, family: Any, seed: str):
        self.stage, self.family, self.seed = stage, family, seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> dict:
        return self.make(random.Random(f"{self.seed} {self.stage.name} {step}"), step / self.stage.steps)

    def make(self, rng: random.Random, progress: float) -> dict:
        """A batch for a stage of which `progress` (0 to 1) is done."""
        raise NotImplementedError

    def frame(self, rng: random.Random) -> tuple[float | None, tuple[int, int]]:
        """(aspect ratio of a batch's scenes or None for any, shape of what the model is shown of them)."""
        aspect = rng.choice(ASPECTS) if self.family.keeps_aspect else None
        return aspect, self.family.shape(aspect or 1.0)


class PatchBatches(Batches):
    """Crowded scenes for the vision tower, large signs first."""

    limits = LEGIBLE

    def make(self, rng: random.Random, progress: float) -> dict:
        aspect, shape = self.frame(rng)
        images, labels = [], []
        for _ in range(self.stage.batch):
            scene = draw_scene(rng, *self.crowd(rng, progress), aspect, crowded=True, old=self.old)
            anchor = rng.choice(scene.signs).box
            window = window_around(scene, rng, anchor, (1.3, 5.0)) if rng.random() < 0.3 else None
            images.append(pixels(scene, rng, shape, window))
            labels.append(patch_labels(scene, shape, self.family.cell, window, self.limits))
        return {"pixels": torch.from_numpy(np.stack(images)), "labels": torch.from_numpy(np.stack(labels))}

    @staticmethod
    def crowd(rng: random.Random, progress: float) -> tuple[int, tuple[float, float]]:
        """(how many signs, range of their size): most often as many as fit that are read with ease, which teach most.

        Small ones come in later: what is hardly legible teaches nothing before its characters are known.
        """
        if rng.random() < 1 - 0.4 * progress:
            return 30, (rng.uniform(0.13, 0.25), 0.3)
        low = math.exp(rng.uniform(math.log(0.07), math.log(0.16)))
        return rng.randint(8, 22), (low, max(0.2, 2.5 * low))


class SmallPatchBatches(PatchBatches):
    """Half of the scenes have signs at the edge of what can be read: for a tower that reads the others."""

    limits = HARDLY
    usual, smallest = 0.5, 0.04  # share of the others; size of the smallest signs, relative to the canvas

    @classmethod
    def crowd(cls, rng: random.Random, progress: float) -> tuple[int, tuple[float, float]]:
        if rng.random() < cls.usual:
            return PatchBatches.crowd(rng, 1.0)
        low = math.exp(rng.uniform(math.log(cls.smallest), math.log(0.08)))
        return rng.randint(12, 26), (low, 2 * low)


class SmallestPatchBatches(SmallPatchBatches):
    """More of such scenes, and smaller signs."""

    old = MORE_OLD
    usual, smallest = 0.4, 0.035


class AnswerBatches(Batches):
    """Questions about single images; `crops` says how often a batch is about (image, that many crops)."""

    crops = (1.0,)  # weights of 0, 1, 2, ... crops
    easy = 1.0  # share of the scenes in which every sign is read with ease
    # Until which share of the stage which of the RELATIONS are asked about: of one of them, the answer is a plain
    # comparison of two places.
    relations = ((0.6, ("left of",)), (0.75, ("left of", "above")), (1.0, tuple(RELATIONS)))

    def scene(self, rng: random.Random, progress: float, aspect: float | None) -> Street | Scene:
        """Most often many signs that are read with ease, of which many are plates: a longer text teaches more."""
        if rng.random() > self.easy:
            return draw_scene(rng, rng.randint(2, 5), SIDES, aspect, old=self.old)
        most, low = (3, 0.24) if progress < 0.1 else (7, EASY[0])
        return draw_scene(rng, rng.randint(2, most), (low, EASY[1]), aspect, plates=True, old=self.old)

    def make(self, rng: random.Random, progress: float) -> dict:
        (number,) = rng.choices(range(len(self.crops)), self.crops)
        relations = next(words for until, words in self.relations if progress <= until)
        aspect, shape = self.frame(rng)
        shapes = [shape] + [self.family.shape()] * number
        images, crops, asked, kinds = [], [[] for _ in range(number)], [], []
        for _ in range(self.batch_of(number)):
            scene = self.scene(rng, progress, aspect)
            images.append(pixels(scene, rng, shape))
            for each in crops:  # drawn before any question is: never the method's, never for the asked thing
                some = rng.choice(things_of(scene)).box
                window = window_around(scene, rng, some) if rng.random() < AROUND else window_anywhere(scene, rng)
                each.append(pixels(scene, rng, shapes[1], window))
            told = lessons_about(scene, rng, self.family.turns_per_image, relations)
            turns = [(self.family.turn(each.question, each.answer, each.name_ends), each.kind) for each in told]
            turns.sort(key=lambda turn: -len(turn[0]))  # turns of one length are packed together
            asked.append([turn for turn, _ in turns])
            kinds.append([f"{'crop ' if number else ''}{kind}" for _, kind in turns])
        batch = {"pixels": stacked(images), "kinds": kinds, **self.family.collate(asked, shapes)}
        return batch | {"crops": [stacked(each) for each in crops]}

    def batch_of(self, number: int) -> int:
        """Images per step with so many crops each."""
        return max(2, round(self.stage.batch * IMAGES[number]))


class PairedAnswerBatches(AnswerBatches):
    """Half of the batches with one to three crops, half of the scenes with signs of any size."""

    crops = (0.45, 0.4, 0.08, 0.07)
    easy = 0.5
    relations = AnswerBatches.relations[-1:]


class SmallAnswerBatches(PairedAnswerBatches):
    """A quarter of the scenes more are of the first edition, most of their signs small."""

    def scene(self, rng: random.Random, progress: float, aspect: float | None) -> Street | Scene:
        """As of the others, or one with a digit on each sign."""
        if rng.random() < 0.25:
            return make_scene(rng, 640, rng.randint(2, 7), (SIDES[0], 0.2), aspect=aspect)
        return super().scene(rng, progress, aspect)


class SmallestAnswerBatches(SmallAnswerBatches):
    """More scenes with signs of any size, and more of the first edition."""

    old = MORE_OLD
    easy = 0.4


class MixedBatches(Batches):
    """Both at once, for stages in which everything learns: crowded scenes for the tower, questions with crops."""

    def __init__(self, stage: Any, family: Any, seed: str):
        super().__init__(stage, family, seed)
        self.parts = self.parts_of(stage, family, seed)

    def parts_of(self, *given: Any) -> tuple[PatchBatches, AnswerBatches]:
        """What a batch consists of."""
        return SmallPatchBatches(*given), SmallAnswerBatches(*given)

    def make(self, rng: random.Random, progress: float) -> dict:
        patches, answers = (part.make(rng, max(progress, 0.1)) for part in self.parts)
        return {"patches": patches, "answers": answers}


class SmallestMixedBatches(MixedBatches):
    """The same with more small signs, and half as many crowded scenes: those take longer to draw than to learn from."""

    def parts_of(self, stage: Any, *given: Any) -> tuple[PatchBatches, AnswerBatches]:
        crowded = replace(stage, batch=max(1, stage.batch // 2))
        return SmallestPatchBatches(crowded, *given), SmallestAnswerBatches(stage, *given)


def stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
