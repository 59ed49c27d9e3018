"""Gemma 3 and 3n, VipLLaVA, FastVLM: a square of tokens, for an image that is squashed to a square or cut to one."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.layouts import Region, Size, center_crop_region, raster, whole
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, ChatAdapter, load_processor, prepare  # noqa: F401


class SquareAdapter(ChatAdapter):
    """A map covers what the image processor shows of the image; one that cuts it as well (pan and scan) is refused."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.square_tiles = getattr(processor.image_processor, "do_center_crop", None) is True

    def cells(self, inputs: dict[str, Tensor], number: int, size: Size) -> tuple[np.ndarray, Region]:
        if "num_crops" in inputs and inputs["num_crops"].any():
            raise ValueError("its processor cuts images by itself (do_pan_and_scan): maps are read without that")
        side = round(self.image_text(inputs, number).count(self.image_token) ** 0.5)
        return raster(side, side), self.region(size)

    def region(self, size: Size) -> Region:
        """The rectangle of a (width, height) image that the model's input shows, in xyxy pixels of the image."""
        settings = self.processor.image_processor
        if not self.square_tiles:
            return whole(size)
        crop = settings.crop_size["width"], settings.crop_size["height"]
        return center_crop_region(whole(size), settings.size if settings.do_resize else None, crop)


ADAPTER = SquareAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("squares")
