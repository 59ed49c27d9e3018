"""Qwen-VL, GLM-V and others with their image processors: a grid of patches, 2 x 2 of which are a token.

An image keeps its aspect ratio, so grids vary; most have positions of three axes (mrope). Qwen3-VL's features of the
tower's middle go into the decoder's first layers, and Qwen3.5 has attention in some layers only: see decoder_call.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.adapter import EncodedImage
from vicrop.layouts import Layout, Region, Size, thw, unpatchify, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare, taken_by  # noqa: F401
from vicrop.qwen_input import refuse_bad_pixel_range

BBOX_SIZE = 224


class MergedPatchesAdapter(ChatAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side.

    Options:
        min_pixels, max_pixels: every image and crop is scaled into this range; default: the processor's.
    """

    options = {"geometry": "exact", "min_pixels": None, "max_pixels": None}

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.merge, self.bbox_size = processor.image_processor.merge_size, BBOX_SIZE

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        super().check(model, **options)
        refuse_bad_pixel_range(options.get("min_pixels"), options.get("max_pixels"))

    def processor_options(self) -> dict[str, Any]:
        own, given = self.processor.image_processor.size, self.given
        low, high = (own[edge] if given[name] is None else given[name]
                     for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")))  # fmt: skip
        return super().processor_options() | {"size": {"shortest_edge": min(low, high), "longest_edge": high}}

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        _, rows, columns = inputs["image_grid_thw"][number].tolist()
        return thw((rows, columns), self.merge), whole(size)

    def one_image(self, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        grids = inputs["image_grid_thw"]
        patches = inputs["pixel_values"].split(grids.prod(1).tolist())[number]
        return super().one_image(inputs, number) | {"pixel_values": patches}

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        grids = {"image_grid_thw": torch.cat([image.inputs["image_grid_thw"] for image in images])}
        return super().forward_inputs(prompt, ids, images) | taken_by(self.model.model.forward, grids)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """A row of `values` is a patch: 3 colours x copies in time; rows come by tokens, of 2 x 2 patches each."""
        settings = self.processor.image_processor
        return unpatchify(values, layout.grid, self.merge, settings.temporal_patch_size, settings.patch_size)


ADAPTER = MergedPatchesAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("merged_patches")
