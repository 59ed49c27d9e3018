"""LLaVA-1.5: what is peculiar to it, and the ViCrop methods over it. Works with any checkpoint of the family.

To add a family of your own, write a module like this one and name it in adapter.REGISTRY and tables.MODELS.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel

from vicrop import processors
from vicrop.adapter import Adapter
from vicrop.images import pad_to_square
from vicrop.layouts import Layout, Region, Size, center_crop_region, raster, square_region, whole
from vicrop.methods import family_methods

ATT_LAYER = 14
PROMPT = "<image>\nUSER: {question} Answer the question using a single word or phrase.\nASSISTANT:"
MODEL_CLASS, load_processor = LlavaForConditionalGeneration, AutoProcessor.from_pretrained
prepare = processors.prepare


class LlavaAdapter(Adapter):
    """LLaVA-1.5 (see adapter.Adapter).

    Options:
        image_fit: "processor", as the checkpoint's processor does; "pad", the image in a square of the mean colour.
    """

    options = {"geometry": "exact", "image_fit": "processor"}

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.pads, settings = self.given["image_fit"] == "pad", processor.image_processor
        self.square_tiles = self.given["geometry"] == "exact" and (settings.do_center_crop or self.pads)
        # Tokens before the patches: a CLS feature, unless the checkpoint drops it as LLaVA-1.5 does.
        has_class = any(name.endswith("class_embedding") for name, _ in self.vision.named_parameters())
        self.num_leading_tokens = int(has_class and model.config.vision_feature_select_strategy == "full")

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        if self.pads:
            mean = tuple(int(255 * channel) for channel in self.processor.image_processor.image_mean)
            images = [pad_to_square(image, mean) for image in images]
        return super().preprocess(images)

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        *_, height, width = inputs["pixel_values"].shape
        patch, first = self.model.config.vision_config.patch_size, self.num_leading_tokens
        index = raster(height // patch, width // patch, first)
        return [Layout(first + index.size, index, self.region(size)) for size in sizes]

    def region(self, size: Size) -> Region:
        """The rectangle of a (width, height) image that the model's input shows, in xyxy pixels of the image."""
        if self.given["geometry"] == "upstream":
            return whole(size)
        region, settings = square_region(size) if self.pads else whole(size), self.processor.image_processor
        if not settings.do_center_crop:
            return region
        crop = settings.crop_size["width"], settings.crop_size["height"]
        return center_crop_region(region, settings.size if settings.do_resize else None, crop)


ADAPTER = LlavaAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("llava")
rel_attention_llava, gradient_attention_llava = rel_att, grad_att
pure_gradient_llava, localization_attention_llava = pure_grad, loc_att
question_attention_llava = question_att
