"""Idefics2: a resampler, whose few latents attend to the patches of an image of any size, is between image and decoder.

So a map is the attention of the last token to the latents times that of the latents to the patches, as InstructBLIP's.
"""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from vicrop.adapter import EncodedImage, ImageFeatures
from vicrop.attention import replaced
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.measured import MeasuredAdapter


class ResampledAdapter(MeasuredAdapter):
    """A map covers what the patches show; one whose processor cuts the image as well is refused."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        if processor.image_processor.do_image_splitting:
            raise ValueError("its processor cuts images by itself (do_image_splitting): maps are read without that")
        resampler = self.model.model.connector.perceiver_resampler
        self.connector = resampler.layers[-1].self_attn, resampler

    def read(self, image: Image.Image) -> tuple[dict[str, Tensor], str]:
        made = self.processor.image_processor(images=[[image]], return_tensors="pt")
        mark = self.processor.fake_image_token
        return dict(made), f"{mark}{self.image_token * self.processor.image_seq_len}{mark}"

    def numbered(self, text: str, number: int) -> str:
        return text

    def token_ids(self, text: str) -> Tensor:
        """As its processor has it: images side by side have one mark between them, and a space parts it from a word."""
        mark = str(self.processor.fake_image_token)
        text = re.sub(rf"{re.escape(mark)}(?=[^\s<])", f"{mark} ", text.replace(mark * 2, mark))
        return super().token_ids(text)

    def features(self, inputs: dict[str, Tensor]) -> ImageFeatures:
        """Those of the patches: what the resampler is given."""
        with replaced(self.model.model.connector, "forward", lambda seen, **_: seen):
            return super().features(inputs)

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """The vision tower gives what it has given before, and the model's own code goes on from there."""
        resampled = [image._replace(features=self.resampled(image)) for image in images]
        return super().forward_inputs(prompt, ids, resampled)

    def resampled(self, image: EncodedImage) -> ImageFeatures:
        """The features of an image's latents."""
        tower = BaseModelOutput(last_hidden_state=image.features.pooled[None])
        with replaced(self.model.model.vision_model, "forward", lambda **_: tower):
            return super().features(image.inputs)


ADAPTER = ResampledAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("resampled")
