"""Video-LLaVA, of images: a square of tokens, row by row, for an image of which the middle square is cut out."""

from typing import Any

from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.squares import SquareAdapter


class VideoLlavaAdapter(SquareAdapter):
    """A map covers what the image processor shows of the image."""

    def processor_options(self) -> dict[str, Any]:
        """Its processor calls pixels by an older name, unless it is told otherwise."""
        return super().processor_options() | {"return_legacy_image_output": False}


ADAPTER = VideoLlavaAdapter
rel_att, grad_att, pure_grad, loc_att = family_methods("video_llava")
