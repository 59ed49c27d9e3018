"""External croppers, the ViCrop paper's comparison (section 6): other models choose the box, by the bare question.

CLIP judges how similar a crop is to the question. `clip_crop` follows it from the whole image, a tenth at a time;
`detector_crop` and `sam_crop` take the most similar of the boxes that a detector or Segment Anything proposes.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from vicrop.layouts import Region, Size, whole
from vicrop.methods import Found, Method, Questions
from vicrop.outside import KINDS, loaded_once

STEPS, CUT = 20, 0.1  # of clip_crop: so many cuts, each so much of a side

Score = Callable[[Sequence[Region]], Sequence[float]]  # boxes of an image -> how similar each is to the question


# ----------------------------------------------------------------------------------------------------- the searches
def narrowed(size: Size, score: Score) -> Region:
    """The most similar of the boxes on a way into the image: at each of STEPS the best of the four `shorter` ones.

    Args:
        size: (width, height) of the image. Of equal scores the first one counts.
    """
    box, found = whole(size), []
    for _ in range(STEPS):
        boxes = shorter(box)
        if not boxes:
            break
        scores = score(boxes)
        best = int(np.argmax(scores))
        box = boxes[best]
        found.append((scores[best], box))
    return max(found, key=lambda each: each[0])[1] if found else box


def shorter(box: Region) -> list[Region]:
    """What is left of a box when a tenth is cut off its left, top, right or bottom: a whole pixel at least."""
    x1, y1, x2, y2 = box
    dx, dy = (max(1, round(CUT * side)) for side in (x2 - x1, y2 - y1))
    left = [(x1 + dx, y1, x2, y2), (x1, y1 + dy, x2, y2), (x1, y1, x2 - dx, y2), (x1, y1, x2, y2 - dy)]
    return [(a, b, c, d) for a, b, c, d in left if a < c and b < d]


def most_similar(boxes: Sequence[Sequence[float]], size: Size, score: Score) -> Region:
    """The box with the highest score, in whole pixels of the image; the whole image where there is no box."""
    inside = list(dict.fromkeys(filter(None, (whole_pixels(box, size) for box in boxes))))
    return inside[int(np.argmax(score(inside)))] if inside else whole(size)


def whole_pixels(box: Sequence[float], size: Size) -> Region | None:
    """The pixels of an image that a box touches; None where it touches none."""
    x1, y1 = (max(0, math.floor(side)) for side in box[:2])
    x2, y2 = (min(limit, math.ceil(side)) for side, limit in zip(box[2:], size, strict=True))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


# ------------------------------------------------------------------------------------------------------ the methods
class ExternalCrop(Method):
    """A crop that other models choose: CLIP alone, or CLIP among the boxes that another one proposes.

    Args:
        name: of the method.
        models: {name of outside.KINDS: its checkpoint, hub id or folder}; nothing is loaded before it is bound.
    """

    def __init__(self, name: str, models: Mapping[str, str]):
        self.__name__, self.models = name, models
        self.score: Any = None  # `(image, question, boxes) -> scores`, once it is bound to a model
        self.propose: Any = None  # `image -> boxes`, if anything proposes
        self.last: tuple[Image.Image | None, list] = (None, [])  # an image, and the boxes in it: questions share them

    def bind(self, model: PreTrainedModel, layer: Any = None, heads: Any = None) -> "ExternalCrop":
        """See Method; its own models are loaded, beside the model."""
        super().bind(model, layer, heads)
        bound = copy.copy(self)
        bound.last = (None, [])
        loaded = {kind: loaded_once(KINDS[kind], source, model.device) for kind, source in self.models.items()}
        bound.score = loaded.pop("clip")
        bound.propose = next(iter(loaded.values()), None)
        return bound

    def find(self, questions: Questions) -> list[Found]:
        """See Method."""
        images = [questions.session.images[number] for number in questions.of]
        return [Found((self.box(image, question),), None, whole(image.size))
                for image, question in zip(images, questions.questions, strict=True)]  # fmt: skip

    def box(self, image: Image.Image, question: str) -> Region:
        """The crop of an image for a question."""
        score = partial(self.score, image, question)
        if self.propose is None:
            return narrowed(image.size, score)
        if self.last[0] is not image:
            self.last = image, self.propose(image)
        return most_similar(self.last[1], image.size, score)
