"""HunYuan-VL: a grid of patches, 2 x 2 of which are a token; one more token after each row, and one at either end."""

import numpy as np
from torch import Tensor

from vicrop.layouts import Region, Size, raster, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.patch_rows import PatchRowsAdapter


class HunYuanAdapter(PatchRowsAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        _, rows, columns = inputs["image_grid_thw"][number].tolist()
        return raster(rows // self.merge, columns // self.merge, first=1, after_row=1), whole(size)


ADAPTER = HunYuanAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("hunyuan_vl")
