"""Idefics3 and SmolVLM: tiles of the whole image, each behind marks of its own in the prompt, then an overview."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vicrop.layouts import Layout, Region, Size, join_tiles, tiles, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401


class Idefics3Adapter(ChatAdapter):
    """A map covers the whole image, which is stretched to whole tiles; it is read from these."""

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        found = self.processor.image_processor(images=[[image] for image in images], **self.processor_options())
        return {name: torch.as_tensor(value) for name, value in found.items()}

    def tile_grid(self, inputs: dict[str, Tensor], number: int) -> tuple[int, int]:
        """(rows, columns) of the tiles of one of several images; (1, 1) where it was not cut."""
        rows, columns = (max(1, int(inputs[name].flatten()[number])) for name in ("rows", "cols"))
        return rows, columns

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        side = round(self.processor.image_seq_len**0.5)
        return tiles(*self.tile_grid(inputs, number), side, side), whole(size)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The tiles (1, tiles and an overview, 3, side, side) as one picture, without the overview."""
        rows, columns = self.tile_grid(inputs, 0)
        return join_tiles(values[0, : rows * columns], rows, columns)


ADAPTER = Idefics3Adapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("idefics3")
