"""Models of no family that is known here: their chat template, their processor's own words, a layout that is measured.

Nobody has tried such a checkpoint before: it is compared with the stock model when it is first used (see guard.py), and
refused if anything differs. What differs can often be put right in a module like llava.py.
"""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vicrop import guard, processors
from vicrop.adapter import INSTRUCTION, REGISTRY, Adapter, EncodedImage, ImageFeatures
from vicrop.attention import brought_in
from vicrop.checkpoints import weights_of
from vicrop.layouts import Layout, Size
from vicrop.methods import family_methods
from vicrop.models.chat import said_layer
from vicrop.probe import Owners, pixels_of, probed_grid, token_owners

PROMPT, ATT_LAYER = INSTRUCTION, "mean"
BBOX_SIZE = 224
MODEL_CLASS = AutoModelForImageTextToText
TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "vision_backbone", "image_encoder")
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
FEW = 64  # inputs of fewer numbers are sizes and grids
# Of each model, whose pixels are whose, by the shapes of its inputs: measuring it takes some passes of its vision side.
_OWNERS: WeakKeyDictionary[PreTrainedModel, dict[Any, Owners]] = WeakKeyDictionary()
_WEIGHTS: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # processor -> what tells its checkpoint from others


def load_processor(source: str | Path, **where: Any) -> Any:
    """The processor of a checkpoint, once its twin has been compared with the stock model."""
    processor = processors.load_any(source, **where)
    weights = weights_of(str(source), None, where.get("revision"), where.get("cache_dir"))
    guard.admit_source(source, processor, weights, **where)
    _WEIGHTS[processor] = weights
    return processor


def prepare(model: PreTrainedModel, processor: Any) -> None:
    """The tokenizer fits the model, and the loaded model gives what the stock one gives."""
    processors.prepare(model, processor)
    guard.admit_model(model, processor, _WEIGHTS.get(processor))


class DefaultAdapter(Adapter):
    """A model of no known family (see adapter.Adapter)."""

    stacks_features = False  # until features have been seen
    knows_pixels = False

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.bbox_size = self.bbox_size if isinstance(self.bbox_size, int) else BBOX_SIZE
        self.makes: set[str] = set()  # names of what the processor makes
        self.written: dict[tuple, str] = {}  # what it writes for an image, by the kind of its inputs

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        super().check(model, **options)
        if not getattr(model, guard.ADMITTED, False):
            raise ValueError(f"no adapter knows {model.config.model_type} models: load it by load_model of vicrop, "
                             f"which compares it with the stock model; known are {', '.join(REGISTRY)}")  # fmt: skip

    @classmethod
    def default_layer(cls, model: PreTrainedModel) -> int | str:
        return said_layer(super().default_layer(model), model)

    # -- the model's parts
    @property
    def vision(self) -> PreTrainedModel:
        inner = getattr(self.model, "model", self.model)
        parts = (getattr(owner, name, None) for owner in (inner, self.model) for name in TOWERS)
        return next((part for part in parts if isinstance(part, PreTrainedModel)), inner)

    # -- text
    @property
    def image_placeholder(self) -> str:
        return self.processor.image_token

    def prompt(self, question: str) -> str:
        """The chat template, filled in with an image and the instruction."""
        given = self.given["prompt"]
        if given is not None and self.image_placeholder in given:
            return super().prompt(question)
        return processors.chat_prompt(self.processor, super().prompt(question))

    def phrase(self, text: str) -> str:
        return processors.chat_prompt(self.processor, text)

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        """See Adapter: an image is what the processor writes for it, in one place for all of them."""
        token, tokenizer = self.image_placeholder, self.processor.tokenizer
        if prompt.count(token) != 1:
            raise ValueError(f"a prompt holds {token} exactly once, this one {prompt.count(token)} times: {prompt!r}")
        written = prompt.replace(token, "".join(layout.text for layout in layouts))
        begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        return tokenizer(written, return_tensors="pt", add_special_tokens=not begun).input_ids[0]

    # -- images
    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Of one image what the processor makes in a prompt; of several the same of each, by "number/name"."""
        if len(images) > 1:
            each = [self.preprocess([image]) for image in images]
            return {f"{number}/{name}": value for number, one in enumerate(each) for name, value in one.items()}
        how = {"return_tensors": "pt", "return_text_replacement_offsets": True}
        made = self.processor(images=list(images), text=[self.image_placeholder], **how)
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        self.makes = set(tensors)
        inputs = {name: value for name, value in tensors.items() if name not in OF_TEXT}
        ((written,),) = made["text_replacement_offsets"]
        self.written[_kind_of(inputs)] = written["replacement"]
        return inputs

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
        index, edges = probed_grid(pixels_of(self, size), known[kind])
        left, top, right, bottom = (round(edge * side) for edge, side in zip(edges, (*size, *size), strict=True))
        return Layout(known[kind].count, index, (left, top, right, bottom), self.written[kind])

    def encode_images(self, inputs: dict[str, Tensor], count: int) -> list[ImageFeatures]:
        """Each by itself: features of an image that had company differ by rounding."""
        return [self.encode_image(self.one_image(inputs, number)) for number in range(count)]

    def encode_image(self, inputs: dict[str, Tensor]) -> ImageFeatures:
        """The features of one image, as a single row of tokens."""
        inner = getattr(self.model, "model", self.model)
        owner = self.model if hasattr(self.model, "get_image_features") else inner
        accepted = signature(owner.get_image_features).parameters
        with brought_in(inner):
            given = {name: value for name, value in inputs.items() if name in accepted}
            output = owner.get_image_features(**given, return_dict=True)
        pooled, self.stacks_features = output.pooler_output, isinstance(output.pooler_output, Tensor)
        parts = [pooled] if self.stacks_features else list(pooled)
        pooled = torch.cat([part.flatten(0, -2) for part in parts])
        return ImageFeatures(pooled, tuple(getattr(output, "deepstack_features", None) or ()))

    # -- what the model's forward is given
    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        further = self.further_inputs(ids, [image.inputs for image in images])
        further.pop("pixel_values", None)
        return super().forward_inputs(prompt, ids, images) | further

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len({name.partition("/")[0] for name in inputs if "/" in name}) or 1
        further = self.further_inputs(ids, [self.one_image(inputs, number) for number in range(count)])
        return super().stock_inputs(prompt, ids, further)

    def further_inputs(self, ids: Tensor, images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the processor makes besides ids and mask, as far as the model's forward takes it by name."""
        taken, found = signature(self.model.forward).parameters, {}
        for name in sorted(self.makes & taken.keys() - {"input_ids", "attention_mask"}):
            if name in OF_TEXT:
                found[name] = (ids == self.model.config.image_token_id).long()[None]
            else:
                found[name] = _stacked([image[name] for image in images])
        return found


def _kind_of(inputs: dict[str, Tensor]) -> tuple:
    """What the layout of an image's tokens depends on: the shapes of its inputs, and the few numbers among them."""
    numbers = {name: tuple(value.flatten().tolist()) for name, value in inputs.items() if value.numel() < FEW}
    return tuple((name, tuple(inputs[name].shape), numbers.get(name)) for name in sorted(inputs))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Inputs of several images, one after the other; shorter ones are padded at the end, as processors do."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - own for most, own in zip(shape, value.shape[1:], strict=True)]
        padded.append(functional.pad(value, [each for count in reversed(missing) for each in (0, count)]))
    return torch.cat(padded)


ADAPTER = DefaultAdapter
rel_att, grad_att, pure_grad, loc_att = family_methods("default")
