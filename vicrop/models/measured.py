"""Families whose layout no formula gives: it is measured. The processor's own words, the model's own vision side.

Which token shows which pixels is found by the probe, once for each kind of input. What a processor writes for an image
(marks, numbers) is taken from what it says that it has replaced.
"""

import copy
import functools
from collections.abc import Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from vicrop.adapter import EncodedImage, ImageFeatures
from vicrop.layouts import Layout, Size
from vicrop.models.chat import ChatAdapter, by_token, tower_of
from vicrop.probe import Owners, pixels_of, probed_grid, probed_picture, token_owners
from vicrop.processors import QUESTION

BBOX_SIZE = 224
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
OF_IMAGES = {"pooler_output", "last_hidden_state", "hidden_states", "attentions", "deepstack_features"}
FEW = 64  # inputs of fewer numbers are sizes and grids
HOW = {"return_tensors": "pt", "return_text_replacement_offsets": True}
# Of each model, whose pixels are whose, by the shapes of its inputs: measuring it takes some passes of its vision side.
_OWNERS: WeakKeyDictionary[PreTrainedModel, dict[Any, Owners]] = WeakKeyDictionary()


class MeasuredAdapter(ChatAdapter):
    """A family of which nothing is known beforehand (see adapter.Adapter).

    Attributes:
        written: what the processor writes for an image, by the kind of its inputs.
        pictures: (3, H, W) numbers of elements of `pixel_values`, by the kind of inputs; None where they are no
            pictures (patches in a row).
    """

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.bbox_size = self.bbox_size or BBOX_SIZE
        self.makes: set[str] = set()  # names of what the processor makes
        self.written: dict[tuple, str] = {}
        self.pictures: dict[tuple, np.ndarray | None] = {}
        self.begins: dict[int, tuple[str, str]] = {}
        self.output: Any = None  # what the model's vision side gave for an image, without what is that image's

    # -- the model's parts
    @property
    def vision(self) -> PreTrainedModel:
        return tower_of(getattr(self.model, "model", self.model))

    # -- text
    @functools.cached_property
    def lead(self) -> str:
        """What the processor writes before every prompt: a token of a beginning or an end (Molmo 2), mostly nothing."""
        tokenizer = self.processor.tokenizer
        try:
            made = self.processor(text=[QUESTION], return_tensors="pt")["input_ids"][0].tolist()
        except Exception:  # one that wants an image as well
            return ""
        leads = filter(None, (tokenizer.bos_token, tokenizer.eos_token))
        plain = tokenizer(QUESTION).input_ids
        return next((lead for lead in leads if made != plain and made == tokenizer(lead + QUESTION).input_ids), "")

    def token_ids(self, text: str) -> Tensor:
        return super().token_ids(text if text.startswith(self.lead) else self.lead + text)

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        """See Adapter; some processors number the images."""
        texts = [self.numbered(layout.text, number) for number, layout in enumerate(layouts)]
        return super().tokenize(prompt, [each._replace(text=text) for each, text in zip(layouts, texts, strict=True)])

    def numbered(self, text: str, number: int) -> str:
        """What the processor writes for an image that is not the first, given what it writes for it as the first."""
        first, own = self.beginnings(number) if number else ("", "")
        if not text.startswith(first):
            raise ValueError(f"its processor writes {first!r} for a first image, and here {text[: len(first) + 20]!r}")
        return own + text[len(first) :]

    def beginnings(self, number: int) -> tuple[str, str]:
        """How the text of a first image begins, and that of the same image in another place, up to where they agree."""
        if number not in self.begins:
            images = [Image.new("RGB", (BBOX_SIZE, BBOX_SIZE))] * (number + 1)
            made = self.processor(images=images, text=[self.image_placeholder * len(images)], **HOW)
            (written,) = made["text_replacement_offsets"]
            self.begins[number] = _unlike_beginnings(written[0]["replacement"], written[-1]["replacement"])
        return self.begins[number]

    # -- images
    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Of one image what the processor makes in a prompt; of several the same of each, by "number/name"."""
        if len(images) > 1:
            each = [self.preprocess([image]) for image in images]
            return {f"{number}/{name}": value for number, one in enumerate(each) for name, value in one.items()}
        made, written = self.read(images[0])
        self.makes = set(made)
        inputs = {name: value for name, value in made.items() if name not in OF_TEXT}
        inputs["pixel_values"] = inputs["pixel_values"].float()  # Llama 4's are bfloat16
        self.written[_kind_of(inputs)] = written
        return inputs

    def read(self, image: Image.Image) -> tuple[dict[str, Tensor], str]:
        """(what the processor makes of an image in a prompt, what it writes for the image there)."""
        made = self.processor(images=[image], text=[self.image_placeholder], **HOW)
        ((written,),) = made["text_replacement_offsets"]
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        return tensors, written["replacement"]

    def one_image(self, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        own = {name.partition("/")[2]: value for name, value in inputs.items() if name.startswith(f"{number}/")}
        return own or inputs

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        return [self.layout(self.one_image(inputs, number), size) for number, size in enumerate(sizes)]

    def layout(self, inputs: dict[str, Tensor], size: Size) -> Layout:
        """The measured Layout of one image."""
        known, kind = _OWNERS.setdefault(self.model, {}), _kind_of(inputs)
        if kind not in known:
            known[kind] = token_owners(self, self.placed(inputs))
        pixels = pixels_of(self, size)
        index, edges = probed_grid(pixels, known[kind])
        self.pictures[kind] = probed_picture(pixels, known[kind], index, edges)
        left, top, right, bottom = (round(edge * side) for edge, side in zip(edges, (*size, *size), strict=True))
        text = self.written[kind]
        return Layout(text.count(self.image_token), index, (left, top, right, bottom), text)

    def features(self, inputs: dict[str, Tensor]) -> ImageFeatures:
        """Those of one image, as a single row of tokens."""
        output = self.vision_output(inputs)
        pooled = getattr(output, "pooler_output", None)
        pooled = output.last_hidden_state if pooled is None else pooled
        self.stacks_features = isinstance(pooled, Tensor)
        deep = getattr(output, "deepstack_features", None) or ()
        self.output = copy.copy(output)
        for name in OF_IMAGES & set(output.keys()):
            setattr(self.output, name, None)
        return ImageFeatures(by_token(pooled), tuple(by_token(layer) for layer in deep))

    # -- what the model's forward is given
    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        given = super().forward_inputs(prompt, ids, images)
        made, output = given["mm_encoder_outputs"]["image"], copy.copy(self.output)
        seen = made.pooler_output
        parts = {"last_hidden_state": seen if isinstance(seen, Tensor) else None, "pooler_output": seen,
                 "deepstack_features": getattr(made, "deepstack_features", None)}  # fmt: skip
        for name, value in parts.items():
            setattr(output, name, value)
        further = self.further_inputs(ids, [image.inputs for image in images])
        further.pop("pixel_values", None)
        return given | further | {"mm_encoder_outputs": {"image": output}}

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len({name.partition("/")[0] for name in inputs if "/" in name}) or 1
        further = self.further_inputs(ids, [self.one_image(inputs, number) for number in range(count)])
        return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **further}

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        return {}  # among the further inputs

    def further_inputs(self, ids: Tensor, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the processor makes besides ids and mask, as far as the model's forward takes it by name."""
        taken, found = signature(self.model.forward).parameters, {}
        for name in sorted(self.makes & taken.keys() - {"input_ids", "attention_mask"}):
            if name == "mm_token_type_ids":  # the marks around an image may count as its tokens
                found[name] = ids.new_tensor(self.processor.create_mm_token_type_ids([ids.tolist()]))
            elif name in OF_TEXT:
                found[name] = (ids == self.model.config.image_token_id).long()[None]
            else:
                found[name] = _stacked([image[name] for image in images])
        return found

    # -- pixels
    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """(1, 3, H, W): what the map's tokens show, cell by cell; a line of all elements where they are no pictures."""
        picture = self.pictures[_kind_of(inputs)]
        if picture is None:
            return values.reshape(1, 1, 1, -1)
        return values.flatten()[torch.from_numpy(picture).to(values.device)][None]


def _unlike_beginnings(one: str, other: str) -> tuple[str, str]:
    """What two texts begin with, up to where they end alike."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[: len(one) - same], other[: len(other) - same]


def _kind_of(inputs: dict[str, Tensor]) -> tuple:
    """What the layout of an image's tokens depends on: the shapes of its inputs, and the few numbers among them."""
    few = {name: value for name, value in inputs.items() if value.numel() < FEW and not value.is_floating_point()}
    numbers = {name: tuple(value.flatten().tolist()) for name, value in few.items()}
    return tuple((name, tuple(inputs[name].shape), numbers.get(name)) for name in sorted(inputs))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Inputs of several images, one after the other; shorter ones are padded at the end, as processors do.

    Those of five axes are a prompt's images (1, images or tiles, 3, H, W).
    """
    if values[0].dim() == 5 and len({value.shape[2:] for value in values}) == 1:
        return torch.cat(list(values), 1)
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - own for most, own in zip(shape, value.shape[1:], strict=True)]
        padded.append(functional.pad(value, [each for count in reversed(missing) for each in (0, count)]))
    return torch.cat(padded)
