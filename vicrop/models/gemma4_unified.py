"""Gemma 4 without a vision tower: its processor has put the k x k patches of a token together."""

from typing import Any

from transformers import PreTrainedModel

from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.gemma4 import Gemma4Adapter


class Gemma4UnifiedAdapter(Gemma4Adapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.side, self.merge = self.side * self.merge, 1


ADAPTER = Gemma4UnifiedAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("gemma4_unified")
