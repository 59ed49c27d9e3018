"""LLaVA-NeXT (LLaVA-1.6): what is peculiar to it, and the ViCrop methods over it.

The model sees an image twice: squashed to one tile, and cut into several high-resolution tiles, whose tokens come back
row by row without the padding and with a newline token after each row. The map is read from the latter.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vicrop import processors
from vicrop.adapter import Adapter
from vicrop.layouts import Layout, Size, any_resolution, any_resolution_region, join_tiles, middle, whole
from vicrop.methods import family_methods

ATT_LAYER = 14
PROMPT = "USER: <image>\n{question} Answer the question using a single word or phrase. ASSISTANT:"
MODEL_CLASS, load_processor = LlavaNextForConditionalGeneration, AutoProcessor.from_pretrained
prepare = processors.prepare


class LlavaNextAdapter(Adapter):
    """LLaVA-NeXT (see adapter.Adapter).

    A map covers what the tokens show: the image, or a little more or less where padding ends within a cell.
    """

    def tile_grid(self, size: Tensor) -> tuple[int, int]:
        """(rows, columns) of the high-resolution tiles of an image of that (height, width)."""
        side = self.model.config.vision_config.image_size
        return get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, side)

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        vision, found = self.model.config.vision_config, []
        side = vision.image_size // vision.patch_size
        for size, shape in zip(sizes, inputs["image_sizes"], strict=True):
            grid, (height, width), region = self.tile_grid(shape), shape.tolist(), whole(size)
            index = any_resolution(*grid, side, (width, height), overview=side**2)
            h, w = index.shape
            if self.given["geometry"] == "exact":
                region = any_resolution_region(*grid, side, vision.patch_size, (h, w), size)
            found.append(Layout(side**2 + h * (w + 1), index, region))
        return found

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The high-resolution tiles (1, 1 + tiles, 3, side, side) as one picture without padding."""
        rows, columns = self.tile_grid(inputs["image_sizes"][0])
        picture = join_tiles(values[0, 1 : 1 + rows * columns], rows, columns)
        height, width = (cells * self.model.config.vision_config.patch_size for cells in layout.grid)
        return middle(picture, height, width)


ADAPTER = LlavaNextAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("llava_next")
rel_attention_llava_next, gradient_attention_llava_next = rel_att, grad_att
pure_gradient_llava_next, localization_attention_llava_next = pure_grad, loc_att
question_attention_llava_next = question_att
