"""Gemma 4: a grid of patches, k x k of which are a token, in an image that keeps its aspect ratio."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.layouts import Layout, Region, Size, raster, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401

BBOX_SIZE = 224


class Gemma4Adapter(ChatAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        settings = processor.image_processor
        self.merge, self.side, self.bbox_size = settings.pooling_kernel_size, settings.patch_size, BBOX_SIZE

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        columns, rows = (inputs["image_position_ids"][number].amax(0) + 1).tolist()
        return raster(rows // self.merge, columns // self.merge), whole(size)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The patches (1, patches and padding, side x side x 3), row by row, as a picture."""
        rows, columns = (cells * self.merge for cells in layout.grid)
        side = self.side
        patches = values[0, : rows * columns].reshape(rows, columns, side, side, 3)
        return patches.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * side, columns * side)


ADAPTER = Gemma4Adapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("gemma4")
