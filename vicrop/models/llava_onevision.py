"""LLaVA-OneVision: as LLaVA-NeXT (an overview, then unpadded tiles, a newline after each row), scaled down where large.

LLaVA-NeXT-Video, of images, is the same without being scaled down.

Beside a crop an image is seen as by itself, in tiles. (Its processor shows only the overviews of images that are given
as those of one conversation; given one by one, as here, each has its tiles.)
"""

import numpy as np
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vicrop.layouts import (
    Layout,
    Region,
    Size,
    any_resolution,
    any_resolution_region,
    at_most,
    join_tiles,
    middle,
    raster,
)
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401


class LlavaOnevisionAdapter(ChatAdapter):
    """A map covers what the tokens show: the image, or a little more or less where padding ends within a cell."""

    whole_cells, square_tiles = False, True

    def tile_grid(self, inputs: dict[str, Tensor], number: int) -> tuple[int, int]:
        """(rows, columns) of the high-resolution tiles of one of several images."""
        config, size = self.model.config, inputs["image_sizes"][number]
        return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)

    @property
    def tile_side(self) -> int:
        """Tokens of a tile's side, before large images are scaled down."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def cell(self) -> int:
        """Pixels of such a token's side."""
        return self.model.config.vision_config.image_size // self.tile_side

    def unpadded(self, inputs: dict[str, Tensor], number: int) -> tuple[int, int]:
        """(h, w) tokens of the tiles without their padding."""
        height, width = inputs["image_sizes"][number].tolist()
        return any_resolution(*self.tile_grid(inputs, number), self.tile_side, (width, height), 0).shape

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        side, (h, w) = self.tile_side, self.unpadded(inputs, number)
        limit = getattr(self.model.config, "vision_aspect_ratio", None)
        shown = at_most(h, w, int(limit.removeprefix("anyres_max_")) * side**2) if limit else (h, w)
        index = raster(*shown, first=side**2, after_row=1)
        return index, any_resolution_region(*self.tile_grid(inputs, number), side, self.cell, (h, w), size)

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The high-resolution tiles (1, 1 + tiles, 3, side, side) as one picture without padding."""
        rows, columns = self.tile_grid(inputs, 0)
        height, width = (cells * self.cell for cells in self.unpadded(inputs, 0))
        return middle(join_tiles(values[0, 1 : 1 + rows * columns], rows, columns), height, width)


ADAPTER = LlavaOnevisionAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("llava_onevision")
