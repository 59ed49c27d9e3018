"""Mistral 3 and Pixtral: rows of tokens of an image of any size, a mark after each row in the prompt."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.layouts import Layout, Region, Size, raster, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401

BBOX_SIZE = 224


class PixtralAdapter(ChatAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.cell, self.bbox_size = processor.patch_size * processor.spatial_merge_size, BBOX_SIZE

    def processor_options(self) -> dict[str, Any]:
        return super().processor_options() | {"patch_size": self.cell}

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        height, width = inputs["image_sizes"][number].tolist()
        return raster(height // self.cell, width // self.cell), whole(size)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """Without what pads it beside larger images."""
        height, width = inputs["image_sizes"][0].tolist()
        return values[..., :height, :width]


ADAPTER = PixtralAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("pixtral")
