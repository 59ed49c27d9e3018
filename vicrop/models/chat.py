"""What chat models have in common: their processor fills in a template, and says which text stands for an image.

A family adds its layout (`cells`), and what else is its own. See models/squares.py for the shortest one.
"""

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vicrop.adapter import INSTRUCTION, Adapter, EncodedImage, ImageFeatures, place_of_image
from vicrop.attention import brought_in
from vicrop.layouts import Layout, Region, Size
from vicrop.processors import QUESTION, chat_prompt, load_any, prepare_chat

ATT_LAYER = "mean"  # of all layers that have attention, as the paper does it without data to choose one by
PROMPT = INSTRUCTION
MODEL_CLASS, load_processor, prepare = AutoModelForImageTextToText, load_any, prepare_chat
LARGEST_CROP = 448  # pixels of the crop window's base side, however large the images of the vision tower are
# What the module that encodes images may be called.
TOWERS = ("vision_tower", "visual", "vision_model", "image_tower", "vision_encoder", "vision_backbone", "image_encoder")


class ChatAdapter(Adapter):
    """A family whose processor has a chat template (see adapter.Adapter).

    A prompt is the filled in template (`prompt`); a text without an image's place is taken as the user's message.
    Images go through the model one by one.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.image_token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        side = np.ravel(self.bbox_size)[0]
        self.bbox_size = None if side is None else min(int(side), LARGEST_CROP)

    # -- the model's parts
    @property
    def vision(self) -> PreTrainedModel:
        return tower_of(self.model.model)

    @classmethod
    def default_layer(cls, model: PreTrainedModel) -> int | str:
        return said_layer(super().default_layer(model), model)

    # -- text
    def prompt(self, question: str) -> str:
        return self.chat(super().prompt(question))

    def chat(self, text: str, images: int = 1) -> str:
        """The whole prompt of a user's text about so many images."""
        return chat_prompt(self.processor, text, images)

    def phrase(self, text: str) -> str:
        block = self.image_placeholder
        return f"{block}{text}" if block.endswith("\n") else f"{block}\n{text}"

    @functools.cached_property
    def image_placeholder(self) -> str:
        """What the template writes for one image more: its marks belong to it, and a line's end behind it."""
        (one, two), place = (self.chat(QUESTION, images) for images in (1, 2)), place_of_image(self.processor)
        more, same = len(two) - len(one), next(n for n in range(len(two)) if two[n] != one[n : n + 1])
        block = one[same - more : same]
        whole = more > 0 and two == one[:same] + block + one[same:] and block.count(place) == 1
        return block if whole else place

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        if place_of_image(self.processor) not in prompt:
            prompt = self.chat(prompt)
        return super().tokenize(prompt, layouts)

    def token_ids(self, text: str) -> Tensor:
        """As processors do it: a template that begins with the token of a beginning brings its own special tokens."""
        begin = self.processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
        return self.processor.tokenizer(text, return_tensors="pt", **special).input_ids[0]

    # -- images
    def processor_options(self) -> dict[str, Any]:
        """What the processor's images are prepared with beside the image processor's own settings."""
        return {**getattr(self.processor, "images_kwargs", {}), "return_tensors": "pt"}

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        found = self.processor.image_processor(images=list(images), **self.processor_options())
        return {name: torch.as_tensor(value) for name, value in found.items()}

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        shown = {name: value.numpy() if value.dim() < 3 else value for name, value in inputs.items()}
        found = []
        for number, size in enumerate(sizes):
            text = self.image_text(shown, number)
            index, region = self.cells(inputs, number, size)
            found.append(Layout(text.count(self.image_token), index, region, text))
        return found

    def image_text(self, inputs: dict[str, Any], number: int) -> str:
        """What the processor writes in a prompt for one of several images."""
        return self.processor.replace_image_token(inputs, number)

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        """(index, region) of the layout of one of several images, of (width, height) `size`; see layouts.Layout."""
        raise NotImplementedError

    def encode_images(self, inputs: dict[str, Tensor], count: int) -> list[ImageFeatures]:
        return [self.features(self.one_image(inputs, number)) for number in range(count)]

    def features(self, inputs: dict[str, Tensor]) -> ImageFeatures:
        """Those of a single image, token by token."""
        output = self.vision_output(inputs)
        self.stacks_features = isinstance(output.pooler_output, Tensor)
        deep = getattr(output, "deepstack_features", None) or ()
        return ImageFeatures(by_token(output.pooler_output), tuple(by_token(layer) for layer in deep))

    def vision_output(self, inputs: dict[str, Tensor]) -> Any:
        """What the model's own vision side gives for an image."""
        inner = getattr(self.model, "model", self.model)
        owner = inner if hasattr(inner, "get_image_features") else self.model
        with brought_in(inner):
            return owner.get_image_features(**taken_by(owner.get_image_features, inputs), return_dict=True)

    # -- what the model's forward is given
    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        return super().forward_inputs(prompt, ids, images) | self.types(ids)

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        own = taken_by(self.model.model.forward, inputs)
        return super().stock_inputs(prompt, ids, own) | self.types(ids)

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are an image's, under the name by which the model is told, if it is."""
        shown = (ids == self.model.config.image_token_id).long()[None]
        return taken_by(self.model.model.forward, {"token_type_ids": shown, "mm_token_type_ids": shown})


def tower_of(inner: Any) -> PreTrainedModel:
    """The part of a model that encodes images; all of it where there is no such part."""
    parts = (getattr(inner, name, None) for name in TOWERS)
    return next((part for part in parts if isinstance(part, PreTrainedModel)), inner)


def taken_by(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that a function has arguments for, by name."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


def said_layer(layer: int | str, model: PreTrainedModel) -> int | str:
    """The layer; that it is the mean of all is said once."""
    if layer == "mean":
        say_once(f"{model.config.model_type}: no layer is known to be best, so maps are the mean of all layers")
    return layer


@functools.cache
def say_once(sentence: str) -> None:
    """A warning, the first time."""
    warnings.warn(sentence, stacklevel=4)


def by_token(values: Tensor | Sequence[Tensor]) -> Tensor:
    """(tokens, dim) of an image's features, in whatever parts they come."""
    parts = [values] if isinstance(values, Tensor) else list(values)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
