"""ERNIE 4.5-VL: as Qwen-VL; experts of their own read an image's tokens and the marks around them."""

import torch
from torch import Tensor

from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.merged_patches import MergedPatchesAdapter


class ErnieAdapter(MergedPatchesAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are an image's, and which go to the experts for images: that is the processor's own table."""
        experts = self.processor.create_moe_mm_token_type_ids(ids[None].tolist())
        return super().types(ids) | {"moe_mm_token_type_ids": torch.tensor(experts, device=ids.device)}


ADAPTER = ErnieAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("ernie4_5_vl")
