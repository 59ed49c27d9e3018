"""Qwen2.5-VL: what is peculiar to it, and the ViCrop methods over it. For all sizes (3B, 7B, 72B).

An image keeps its aspect ratio, so grids vary; 2 x 2 patches become one token; positions have three axes (mrope).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from vicrop import processors
from vicrop.adapter import Adapter, EncodedImage
from vicrop.layouts import Layout, Size, thw, unpatchify, whole
from vicrop.methods import family_methods
from vicrop.processors import ImageTextProcessor as ImageTextProcessor  # saved and built by this name
from vicrop.qwen_input import encode_base64 as encode_base64  # notebooks import both from here, too
from vicrop.qwen_input import multiple_size, pixel_range, refuse_bad_pixel_range, resize_to_multiple
from vicrop.qwen_input import prepare_qwen2_5_input as prepare_qwen2_5_input

ATT_LAYER = 22
BBOX_SIZE = 224
PROMPT = "{question} Answer the question using a single word or phrase."
MODEL_CLASS, load_processor = Qwen2_5_VLForConditionalGeneration, processors.load_qwen_processor
prepare = processors.prepare_qwen


class QwenAdapter(Adapter):
    """Qwen2.5-VL (see adapter.Adapter). A map covers the whole image.

    A prompt is the filled in chat template (`prompt`); a text without it is taken as the user's message.

    Options:
        min_pixels, max_pixels: every image and crop is scaled into this range; default: the processor's, but at most
            256 * 28 * 28.
    """

    options = {"geometry": "exact", "min_pixels": None, "max_pixels": None}

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.size = pixel_range(processor, self.given["min_pixels"], self.given["max_pixels"])
        self.merge, self.bbox_size = model.config.vision_config.spatial_merge_size, BBOX_SIZE

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        super().check(model, **options)
        refuse_bad_pixel_range(options.get("min_pixels"), options.get("max_pixels"))

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.model.visual

    @property
    def image_placeholder(self) -> str:
        return "<|vision_start|><|image_pad|><|vision_end|>"

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """As published: both sides to the nearest multiple of a token's side, then to a size within the limits."""
        settings = self.processor.image_processor
        images = [resize_to_multiple(image, settings.patch_size * settings.merge_size) for image in images]
        return dict(settings(images=images, size=self.size, return_tensors="pt"))

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        indices = [thw((rows, columns), self.merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]
        return [Layout(index.size, index, whole(size)) for index, size in zip(indices, sizes, strict=True)]

    def one_image(self, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        counts = inputs["image_grid_thw"].prod(1)
        first = int(counts[:number].sum())
        patches = inputs["pixel_values"][first : first + int(counts[number])]
        return {"pixel_values": patches, "image_grid_thw": inputs["image_grid_thw"][number : number + 1]}

    def prompt(self, question: str) -> str:
        return processors.chat_prompt(self.processor, super().prompt(question))

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        if self.processor.image_token not in prompt:
            prompt = processors.chat_prompt(self.processor, prompt)
        return super().tokenize(prompt, layouts)

    def rope_inputs(self, ids: Tensor, grids: Tensor) -> dict[str, Tensor]:
        """What positions of three axes are made of; without the types there would be none, silently."""
        return {"image_grid_thw": grids, "mm_token_type_ids": (ids == self.model.config.image_token_id).int()[None]}

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        grids = torch.cat([image.inputs["image_grid_thw"] for image in images])
        return super().forward_inputs(prompt, ids, images) | self.rope_inputs(ids, grids)

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().stock_inputs(prompt, ids, inputs) | self.rope_inputs(ids, inputs["image_grid_thw"])

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """A row of `values` is a patch: 3 colours x 2 copies in time; rows come by tokens, of 2 x 2 patches each."""
        vision = self.model.config.vision_config
        return unpatchify(values, layout.grid, self.merge, vision.temporal_patch_size, vision.patch_size)

    def record_fields(self, layout: Layout, crops: Sequence[Image.Image]) -> dict[str, Any]:
        """`num_img_tokens`: the image tokens of the prompt with image and crops."""
        settings, tokens = self.processor.image_processor, layout.num_tokens
        limits = {"min_pixels": self.size["shortest_edge"], "max_pixels": self.size["longest_edge"]}
        for crop in crops:
            width, height = multiple_size(crop.size, settings.patch_size * settings.merge_size)
            tokens += settings.get_number_of_image_patches(height, width, limits) // self.merge**2
        return {"num_img_tokens": tokens}


ADAPTER = QwenAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("qwen2_5")
rel_attention_qwen2_5, gradient_attention_qwen2_5 = rel_att, grad_att
pure_gradient_qwen2_5, localization_attention_qwen2_5 = pure_grad, loc_att
question_attention_qwen2_5 = question_att
