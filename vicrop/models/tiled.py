"""InternVL, Qianfan-OCR, Aya Vision, Command A Vision: tiles of the whole image, row by row, and it squashed to one."""

import sys

import numpy as np
from torch import Tensor

from vicrop.layouts import Layout, Region, Size, join_tiles, tiles, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401

RULE = "get_optimal_tiled_canvas"  # of the module of an image processor


class TiledAdapter(ChatAdapter):
    """A map covers the whole image, which is stretched to the tiles; it is read from these."""

    def tile_grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of the tiles of a (width, height) image, by the image processor's own rule."""
        settings, side = self.processor.image_processor, self.processor.image_processor.size
        limits = settings.min_patches, settings.max_patches
        modules = [sys.modules[kind.__module__] for kind in type(settings).__mro__]
        rule = next(module.get_optimal_tiled_canvas for module in modules if hasattr(module, RULE))
        columns, rows = rule(size[::-1], (side["height"], side["width"]), *limits)
        return rows, columns

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        count = int(inputs["num_patches"][number])
        rows, columns = self.tile_grid(size) if count > 1 else (1, 1)
        if count != rows * columns + (count > 1):
            raise ValueError(f"{count} tiles, an overview among them, are no {rows} x {columns} of them")
        side = self.tile_side
        return tiles(rows, columns, side, side), whole(size)

    @property
    def tile_side(self) -> int:
        """Tokens of a tile's side."""
        one = {"num_patches": [1]}
        return round(self.processor.replace_image_token(one, 0).count(self.image_token) ** 0.5)

    def one_image(self, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        counts = inputs["num_patches"]
        return {"pixel_values": inputs["pixel_values"].split(counts.tolist())[number],
                "num_patches": counts[number : number + 1]}  # fmt: skip

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The tiles as one picture, without the overview."""
        rows, columns = (cells // self.tile_side for cells in layout.grid)
        return join_tiles(values[: rows * columns], rows, columns)


ADAPTER = TiledAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("tiled")
