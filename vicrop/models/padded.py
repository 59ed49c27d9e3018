"""Janus, DeepSeek-VL hybrid: a square of tokens, row by row, with the image in the middle of it and padding around."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.layouts import Layout, Region, Size
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.squares import SquareAdapter


class PaddedAdapter(SquareAdapter):
    """Rows and columns of tokens that show nothing but padding are no part of a map; it covers what the others show."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        # One that sees an image in two sizes has two inputs of pixels, and the gradient of one is not the whole.
        self.knows_pixels = not hasattr(model.config, "high_res_vision_config")

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        index, _ = super().cells(inputs, number, size)
        cells = len(index)
        settings = self.processor.image_processor
        side = settings.size["height"]
        kept, edges = [], []
        for length in size:
            shown = max(round(length * side / max(size)), settings.min_size)  # pixels of the square
            start = (side - shown) // 2
            first, last = start * cells // side, cells - (side - shown - start) * cells // side
            kept.append(slice(first, last))
            edges.append([round((edge * side / cells - start) * length / shown) for edge in (first, last)])
        (columns, rows), ((x1, x2), (y1, y2)) = kept, edges
        return index[rows, columns], (x1, y1, x2, y2)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The square without what the map leaves out."""
        cell = self.model.config.vision_config.patch_size
        top, left = (cell * each for each in divmod(int(layout.index[0, 0]), values.shape[-1] // cell))
        height, width = (cell * cells for cells in layout.grid)
        return values[..., top : top + height, left : left + width]


ADAPTER = PaddedAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("padded")
