"""LLaVA-NeXT (LLaVA-1.6): what its look is, and the three ViCrop methods over it.

The model sees an image twice: squashed to one tile, and cut into several high-resolution tiles, whose tokens come back
row by row without the padding and with a newline token after each row. The map is read from the latter.
"""

import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from attention import brought_in
from look import Look
from maps import MapFunction, gradient_attention, pure_gradient, relative_attention

ATT_LAYER = 14
PROMPT = "USER: <image>\n{question} Answer the question using a single word or phrase. ASSISTANT:"
MODEL_CLASS, load_processor = LlavaNextForConditionalGeneration, AutoProcessor.from_pretrained


class LlavaNextLook(Look):
    """What a LLaVA-NeXT model has seen of some images (see `look.Look`).

    Args:
        images: PIL images or paths; those of one look have one size. A map covers the whole image.
        model, processor: a loaded LlavaNextForConditionalGeneration and its LlavaNextProcessor.
        geometry: "exact", or "upstream" for the published edge mask of pure_grad.
    """

    def __init__(self, images, model, processor, geometry="exact"):
        super().__init__(images, model, processor, geometry)
        sizes = {image.size for image in self.images}
        if len(sizes) > 1:
            raise ValueError(f"the images of one look have maps of one size, not of several: {sorted(sizes)} pixels")
        vision = model.config.vision_config
        self._base = (vision.image_size // vision.patch_size) ** 2  # tokens of the squashed image
        self.grid = self._grid(self.inputs)
        self.bbox_size = vision.image_size

    @property
    def vision(self):
        return self.model.model.vision_tower

    def preprocess(self, images):
        return dict(self.processor.image_processor(images=images, return_tensors="pt"))

    def _tile_grid(self, inputs):
        """(rows, columns) of the high-resolution tiles."""
        side = self.model.config.vision_config.image_size
        return get_anyres_image_grid_shape(inputs["image_sizes"][0], self.model.config.image_grid_pinpoints, side)

    def _grid(self, inputs):
        """(h, w) of the tokens that are left of the high-resolution tiles without their padding."""
        side = int(self._base**0.5)
        rows, columns = self._tile_grid(inputs)
        return tuple(unpad_image(torch.empty(1, rows * side, columns * side), inputs["image_sizes"][0]).shape[1:])

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", ATT_LAYER)

    def prompt(self, question):
        return PROMPT.format(question=question)

    def token_count(self, inputs):
        h, w = self._grid(inputs)
        return self._base + h * (w + 1)

    def image_span(self, ids):
        start = int((ids[0] == self.model.config.image_token_id).nonzero()[0]) + self._base
        return start, start + self.grid[0] * (self.grid[1] + 1)

    def see(self, inputs):
        with brought_in(self.model.model):  # the newline is a parameter of its own
            return super().see(inputs)

    def cells(self, rows, found):
        return rows.unflatten(-1, (self.grid[0], self.grid[1] + 1))[..., :-1]  # without the newlines

    def canvas(self, values):
        """The high-resolution tiles (batch, 1 + tiles, 3, side, side) as one picture without padding."""
        rows, columns = self._tile_grid(self.inputs)
        tiles = values[:, 1 : 1 + rows * columns].unflatten(1, (rows, columns))
        pictures = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (batch, 3, H, W)
        patch = self.model.config.vision_config.patch_size
        (h, w), (height, width) = self.grid, pictures.shape[2:]
        top, left = (height - h * patch) // 2, (width - w * patch) // 2
        return pictures[:, None, :, top : top + h * patch, left : left + w * patch]


rel_att = rel_attention_llava_next = MapFunction("rel_attention_llava_next", LlavaNextLook, relative_attention)
grad_att = gradient_attention_llava_next = MapFunction(
    "gradient_attention_llava_next", LlavaNextLook, gradient_attention
)
pure_grad = pure_gradient_llava_next = MapFunction("pure_gradient_llava_next", LlavaNextLook, pure_gradient)
