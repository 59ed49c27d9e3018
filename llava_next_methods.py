"""LLaVA-NeXT (LLaVA-1.6): what its look is, and the three ViCrop methods over it.

The model sees an image twice: squashed to one tile, and cut into several high-resolution tiles, whose tokens come back
row by row without the padding and with a newline token after each row. The map is read from the latter.
"""

import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from attention import brought_in
from look import Look
from maps import MapFunction, gradient_attention, localization_attention, pure_gradient, relative_attention

ATT_LAYER = 14
PROMPT = "USER: <image>\n{question} Answer the question using a single word or phrase. ASSISTANT:"
MODEL_CLASS, load_processor = LlavaNextForConditionalGeneration, AutoProcessor.from_pretrained


class LlavaNextLook(Look):
    """What a LLaVA-NeXT model has seen of some images (see `look.Look`).

    Args:
        images: PIL images or paths. A map covers the whole image.
        model, processor: a loaded LlavaNextForConditionalGeneration and its LlavaNextProcessor.
        geometry: "exact", or "upstream" for the published edge mask of pure_grad.
    """

    def __init__(self, images, model, processor, geometry="exact"):
        vision = model.config.vision_config
        self.before = (vision.image_size // vision.patch_size) ** 2  # tokens of the squashed image
        super().__init__(images, model, processor, geometry)
        self.bbox_size = vision.image_size

    @property
    def vision(self):
        return self.model.model.vision_tower

    def tile_grid(self, size):
        """(rows, columns) of the high-resolution tiles of an image of that (height, width)."""
        side = self.model.config.vision_config.image_size
        return get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, side)

    def grids_of(self, inputs):
        """Per image, the (h, w) of the tokens that are left of its high-resolution tiles without their padding."""
        side, grids = int(self.before**0.5), []
        for size in inputs["image_sizes"]:
            rows, columns = self.tile_grid(size)
            grids.append(tuple(unpad_image(torch.empty(1, rows * side, columns * side), size).shape[1:]))
            if 0 in grids[-1]:
                high, wide = size.tolist()
                raise ValueError(f"an image of {wide} x {high} pixels is too narrow: no token of its tiles is left")
        return grids

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", ATT_LAYER)

    def prompt(self, question):
        return PROMPT.format(question=question)

    def token_count(self, grid):
        return self.before + grid[0] * (grid[1] + 1)

    def see(self, inputs):
        with brought_in(self.model.model):  # the newline is a parameter of its own
            return super().see(inputs)

    def cells(self, rows, grid):
        return rows.unflatten(-1, (grid[0], grid[1] + 1))[..., :-1]  # without the newlines

    def canvas(self, values):
        """The high-resolution tiles (1, 1 + tiles, 3, side, side) as one picture without padding."""
        rows, columns = self.tile_grid(self.inputs["image_sizes"][0])
        tiles = values[0, 1 : 1 + rows * columns].unflatten(0, (rows, columns))
        picture = tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, H, W)
        patch = self.model.config.vision_config.patch_size
        (h, w), (height, width) = self.grids[0], picture.shape[1:]
        top, left = (height - h * patch) // 2, (width - w * patch) // 2
        return picture[None, :, top : top + h * patch, left : left + w * patch]


rel_att = rel_attention_llava_next = MapFunction("rel_attention_llava_next", LlavaNextLook, relative_attention)
grad_att = gradient_attention_llava_next = MapFunction(
    "gradient_attention_llava_next", LlavaNextLook, gradient_attention
)
pure_grad = pure_gradient_llava_next = MapFunction("pure_gradient_llava_next", LlavaNextLook, pure_gradient)
loc_att = localization_attention_llava_next = MapFunction(
    "localization_attention_llava_next", LlavaNextLook, localization_attention
)
