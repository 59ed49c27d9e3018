"""What a session has to know of a family: how its prompts and images are laid out. Defaults, and the registry.

An adapter never imitates a model: embeddings, positions, masks and features come from the model's own forward. It says
which text stands for an image, how many tokens that is, and which of them shows which part (see layouts.py).
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vicrop.attention import brought_in, device_of
from vicrop.layouts import Layout, Size
from vicrop.refusals import REFUSED
from vicrop.tables import GENERATION, OPTIONS

# A config's model_type -> the module whose ADAPTER knows the family; imported when it is needed. "whole+vision" is for
# configs of one kind around a vision tower of another, which lays out images differently.
REGISTRY = {
    "llava": "vicrop.models.llava",
    "llava_next": "vicrop.models.llava_next",
    "instructblip": "vicrop.models.instructblip",
    "blip-2": "vicrop.models.blip2",
    "idefics2": "vicrop.models.resampled",
    "qwen2_5_vl": "vicrop.models.qwen2_5_vl",
    "qwen2_vl": "vicrop.models.merged_patches",
    "qwen3_vl": "vicrop.models.merged_patches",
    "qwen3_vl_moe": "vicrop.models.merged_patches",
    "qwen3_5": "vicrop.models.merged_patches",
    "qwen3_5_moe": "vicrop.models.merged_patches",
    "glm4v": "vicrop.models.merged_patches",
    "glm46v": "vicrop.models.merged_patches",
    "glmga": "vicrop.models.merged_patches",
    "glm4v_moe": "vicrop.models.merged_patches",
    "glm_ocr": "vicrop.models.merged_patches",
    "exaone4_5": "vicrop.models.merged_patches",
    "hyperclovax_vision_v2": "vicrop.models.merged_patches",
    "lfm3_vl": "vicrop.models.merged_patches",
    "cosmos3_omni": "vicrop.models.merged_patches",
    "qwen4_exp": "vicrop.models.merged_patches",
    "cosmos3_edge": "vicrop.models.cosmos3_edge",
    "hunyuan_vl": "vicrop.models.hunyuan_vl",
    "cohere_compass": "vicrop.models.merged_patches",
    "qwen2_5_omni_thinker": "vicrop.models.merged_patches",
    "qwen3_omni_moe_thinker": "vicrop.models.merged_patches",
    "video_llama_3": "vicrop.models.merged_patches",
    "paddleocr_vl": "vicrop.models.patch_rows",
    "ernie4_5_vl_moe": "vicrop.models.ernie4_5_vl",
    "gemma4": "vicrop.models.gemma4",
    "gemma4_unified": "vicrop.models.gemma4_unified",
    "internvl": "vicrop.models.tiled",
    "aya_vision": "vicrop.models.tiled",
    "qianfan_ocr": "vicrop.models.tiled",
    "cohere2_vision": "vicrop.models.tiled",
    "idefics3": "vicrop.models.idefics3",
    "smolvlm": "vicrop.models.idefics3",
    "gemma3": "vicrop.models.squares",
    "vipllava": "vicrop.models.squares",
    "video_llava": "vicrop.models.video_llava",
    "gemma3n": "vicrop.models.squares",
    "fast_vlm": "vicrop.models.squares",
    "got_ocr2": "vicrop.models.got_ocr2",
    "deepseek_vl_hybrid": "vicrop.models.padded",
    "janus": "vicrop.models.padded",
    "paligemma": "vicrop.models.paligemma",
    "llava_onevision": "vicrop.models.llava_onevision",
    "llava_next_video": "vicrop.models.llava_onevision",
    "granite4_vision": "vicrop.models.granite4_vision",
    "mistral3": "vicrop.models.pixtral",
    "llava+pixtral": "vicrop.models.pixtral",
}

DEFAULT_MODULE = "vicrop.models.default"  # for all others: it admits what equals the stock model, once it was checked
COMMON = {"prompt": None, "generation": "greedy"}  # options that every adapter has
INSTRUCTION = "{question} Answer the question using a single word or phrase."


def module_for(kind: str, vision: str | None = None) -> str | None:
    """The module that knows models of a config's model_type and that of its vision_config; None where none does."""
    return REGISTRY.get(f"{kind}+{vision}", REGISTRY.get(kind))


def adapter_class(model: PreTrainedModel) -> type["Adapter"]:
    """The Adapter class for a model, by its config's class.

    Raises:
        ValueError: no adapter knows models of this kind; names those that are known, or the reason.
    """
    kind = model.config.model_type
    module = module_for(kind, getattr(getattr(model.config, "vision_config", None), "model_type", None))
    if module is None and kind in REFUSED:
        raise ValueError(f"{kind} models are not carried: {REFUSED[kind]}")
    if module is None and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"no adapter knows {kind} models: known are {', '.join(REGISTRY)}")
    return importlib.import_module(module or DEFAULT_MODULE).ADAPTER


class ImageFeatures(NamedTuple):
    """What a model's vision side makes of one image, as far as no question changes it."""

    pooled: Tensor  # as the model's get_image_features gives it for this image
    deepstack: tuple[Tensor, ...] = ()  # a layer each


class EncodedImage(NamedTuple):
    """One image, ready to be asked about."""

    inputs: dict[str, Tensor]  # of the vision side, on its device
    layout: Layout
    features: ImageFeatures


class Adapter:
    """A family's knowledge for one loaded model, with the defaults that fit most families.

    Args:
        model, processor: as loaded.
        geometry: "exact", the map covers what the processor shows the model; "upstream", as published.
        prompt: a template in place of the family's; generation: a name of tables.GENERATION.
        options: further keywords, those named in `options`.

    Attributes:
        bbox_size: base side of the crop window in image pixels.
        layer_constant: what the family's module calls the layer to read.
        square_tiles: would a tile that is not square lose something, or gain padding?
        knows_pixels: does `canvas` lay them out as pictures? pure_grad needs that.
        whole_cells: is a cell a whole number of pixels of the canvas? If not, a pixel belongs to the cell it lies in.
        connector: the attention module between image and decoder (a Q-Former's), and the model that holds it, if any.
    """

    model: Any  # a PreTrainedModel: the parts that it has are its family's
    options: dict[str, Any] = {"geometry": "exact"}  # option -> what it is where nothing is said
    layer_constant = "ATT_LAYER"
    square_tiles = False
    whole_cells = True
    knows_pixels = True
    connector: tuple[nn.Module, PreTrainedModel] | None = None

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        self.check(model, **options)
        self.model, self.processor = model, processor
        self.given = {**COMMON, **self.options, **options}
        self.bbox_size: Any = getattr(getattr(model.config, "vision_config", None), "image_size", None)

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        """Raises ValueError, before any image is loaded, for a model or an option that this adapter cannot have."""
        for name, value in options.items():
            if name == "prompt":
                refuse_bad_prompt(value)
                continue
            if name not in cls.options and name not in COMMON:
                raise ValueError(f"{cls.__name__} has no option {name!r}: it has {', '.join(cls.options)}")
            choices = GENERATION if name == "generation" else OPTIONS.get(name, {}).get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{name} is one of {choices}, not {value!r}")

    # -- the model's parts
    @property
    def vision(self) -> PreTrainedModel:
        """The module that encodes images."""
        return self.model.model.vision_tower

    @property
    def speaker(self) -> PreTrainedModel:
        """The innermost model around the decoder that makes logits; its generation config ends an answer as well."""
        return self.model

    @classmethod
    def attention_modules(cls, model: PreTrainedModel) -> dict[int, nn.Module]:
        """{layer: the decoder's attention module}, of the layers that have one."""
        decoder: Any = decoder_of(model)
        kinds = enumerate(getattr(decoder.config, "layer_types", None) or ())
        states = {number for number, kind in kinds if kind == "linear_attention"}  # some are called the same
        return {number: layer.self_attn for number, layer in enumerate(decoder.layers)
                if hasattr(layer, "self_attn") and number not in states}  # fmt: skip

    # -- text
    def prompt(self, question: str) -> str:
        """The whole prompt of a question about one image: the family's template, or the option `prompt`, filled in."""
        template, given = family_constant(type(self), "PROMPT"), self.given["prompt"]
        if given is not None:  # in place of the instruction, unless it is a whole template
            whole = INSTRUCTION not in template or self.image_placeholder in given
            template = given if whole else template.replace(INSTRUCTION, given)
        return template.replace("{question}", question)

    def phrase(self, text: str) -> str:
        """A prompt of an image and a text, without roles or instructions."""
        return f"{self.image_placeholder}\n{text}"

    @property
    def image_placeholder(self) -> str:
        """The text that stands for an image in a prompt; it holds `place_of_image` once."""
        return place_of_image(self.processor)

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        """(T,) token ids of a prompt about images of these layouts; it names one image.

        Raises:
            ValueError: the prompt has no place for an image, or several, or nothing after it.
        """
        block, place = self.image_placeholder, place_of_image(self.processor)
        _refuse_other_places(prompt, block, place)
        texts = [layout.text or self.processor.image_token * layout.num_tokens for layout in layouts]
        text = prompt.replace(block, "".join(block.replace(place, each) for each in texts))
        return self.token_ids(text)

    def token_ids(self, text: str) -> Tensor:
        """(T,) token ids of a prompt in which everything stands that the model reads of images."""
        return self.processor.tokenizer(text, return_tensors="pt").input_ids[0]

    # -- images
    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """{name: CPU tensor} of the vision side for PIL images, "pixel_values" among them."""
        return dict(self.processor.image_processor(images=list(images), return_tensors="pt"))

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        """How the tokens of each image make a map; `sizes` are (width, height) pixels of the images themselves."""
        raise NotImplementedError

    def one_image(self, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The vision side's inputs of one of several images."""
        return {name: value[number : number + 1] for name, value in inputs.items()}

    def placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs where the vision side wants them; floating ones in its dtype."""
        device, dtype = device_of(self.vision), self.vision.dtype
        floats = {name: dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
        return {name: value.to(device, floats[name]) for name, value in inputs.items()}

    def encode_images(self, inputs: dict[str, Tensor], count: int) -> list[ImageFeatures]:
        """The features of each of `count` images, by the model's own code."""
        owner = getattr(self.model, "model", self.model)
        with brought_in(owner):  # it may have a parameter of its own, such as a newline
            output = self.model.get_image_features(**inputs, return_dict=True)
        pooled = _by_image(output.pooler_output, count)
        layers = [_by_image(layer, count) for layer in getattr(output, "deepstack_features", None) or ()]
        deep = zip(*layers, strict=True) if layers else [()] * count
        return [ImageFeatures(*each) for each in zip(pooled, deep, strict=True)]

    # -- what the model's forward is given
    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """The arguments of the model's forward besides the ids, for a prompt about images that are encoded already.

        A connector between them and the decoder runs here.
        """
        features = [image.features for image in images]
        pooled: Any = [each.pooled for each in features]
        output = BaseModelOutputWithPooling(pooler_output=torch.cat(pooled) if self.stacks_features else pooled)
        if features[0].deepstack:
            output.deepstack_features = list(zip(*(each.deepstack for each in features), strict=True))
        return {"attention_mask": torch.ones_like(ids)[None], "mm_encoder_outputs": {"image": output}}

    stacks_features = False  # does the model's forward want the features of all images as one tensor?

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What transformers' own `generate` is given for a prompt about a single image, besides how to decode."""
        return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **inputs}

    # -- pixels and records
    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """(copies, 3, H, W): values laid out as a single image's pixels, as pictures; some models see copies."""
        return values

    def record_fields(self, layout: Layout, crops: Sequence[Image.Image]) -> dict[str, Any]:
        """What a result record about an image and its crops carries beside the answers."""
        return {}

    # -- layers
    @classmethod
    def default_layer(cls, model: PreTrainedModel) -> int | str:
        """The layer to read where none is given: the checkpoint's `config.att_layer`, else the family's constant.

        "mean" for all layers that have attention.
        """
        own = getattr(model.config, "att_layer", None)
        return family_constant(cls, cls.layer_constant) if own is None else own


def place_of_image(processor: Any) -> str:
    """The token in a prompt that a processor puts an image's tokens in place of; mostly that of the image itself."""
    return getattr(processor, "image_placeholder_token", processor.image_token)


def decoder_of(model: PreTrainedModel) -> Any:
    """The innermost decoder, a PreTrainedModel; `get_decoder` may give a language model with its head (Llama 4)."""
    decoder: Any = model.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder or hasattr(decoder, "lm_head"):
        decoder = decoder.model if inner is decoder else inner
    return decoder


def refuse_bad_prompt(template: Any) -> None:
    """ValueError unless a template has one place for the question; None is the family's own."""
    if template is not None and (not isinstance(template, str) or template.count("{question}") != 1):
        raise ValueError(f"prompt must hold {{question}} exactly once, got {template!r}")


def family_constant(adapter: type[Adapter], name: str) -> Any:
    """A constant of the module that an adapter is written in, as it is now: changing one changes what is read."""
    modules = [sys.modules[kind.__module__] for kind in adapter.__mro__]
    owner = next((module for module in modules if hasattr(module, name)), modules[0])
    return getattr(owner, name)


def _refuse_other_places(prompt: str, block: str, token: str) -> None:
    """ValueError unless a prompt holds the place of an image once, and ends with something else."""
    if prompt.count(block) != 1 or prompt.count(token) != 1:
        found = f"{prompt.count(block)} times, and {token} {prompt.count(token)} times"
        raise ValueError(f"a prompt holds {block} exactly once, this one {found}: {prompt!r}")
    if prompt.endswith(block):
        raise ValueError(f"a prompt ends with a question, not with the image: {prompt!r}")


def _by_image(values: Any, count: int) -> list[Tensor]:
    """Features of images as the model gives them, a list or stacked, image by image."""
    if isinstance(values, Tensor):
        return list(values.chunk(count))
    return list(values)
