"""BLIP-2: as InstructBLIP, with a Q-Former that does not read the question. For decoder-only checkpoints (OPT).

Its own processor writes the places of one image only, however many it is given; a second one then goes unseen. Here a
crop has its places.
"""

import torch
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from vicrop import processors
from vicrop.methods import family_methods
from vicrop.models.instructblip import BlipAdapter

LM_LAYER = "mean"  # of all layers
PROMPT = "Question: {question} Short answer:"
MODEL_CLASS, load_processor = Blip2ForConditionalGeneration, AutoProcessor.from_pretrained
prepare = processors.prepare_queries


class Blip2Adapter(BlipAdapter):
    """A map covers the whole image, which is squashed to the model's square."""

    def qformer_inputs(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """Nothing: it reads no prompt."""
        return {}


ADAPTER = Blip2Adapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("blip2")
