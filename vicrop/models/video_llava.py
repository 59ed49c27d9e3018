"""Video-LLaVA, of images: a square of tokens, row by row, for an image of which the middle square is cut out."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vicrop.adapter import EncodedImage
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.squares import SquareAdapter


class VideoLlavaAdapter(SquareAdapter):
    """A map covers what the image processor shows of the image."""

    def processor_options(self) -> dict[str, Any]:
        """Its processor calls pixels by an older name, unless it is told otherwise."""
        return super().processor_options() | {"return_legacy_image_output": False}

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        given = super().forward_inputs(prompt, ids, images)
        output = given["mm_encoder_outputs"]["image"]
        output.pooler_output = output.pooler_output[None]  # the model takes the first axis for images
        return given


ADAPTER = VideoLlavaAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("video_llava")
