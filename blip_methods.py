"""ViCrop on InstructBLIP, under the names that notebooks import: this is the module vicrop/models/instructblip.py.

    from blip_methods import rel_attention_blip
    att_map = rel_attention_blip(image, prompt, general_prompt, model, processor)        # float32 (h, w)

The layers to read are LM_LAYER and QFORMER_LAYER; they are read when a function is called, so changing them here
changes the map.
"""

import sys

from vicrop.models import instructblip
from vicrop.models.instructblip import (
    LM_LAYER,
    PROMPT,
    QFORMER_LAYER,
    grad_att,
    gradient_attention_blip,
    loc_att,
    localization_attention_blip,
    pure_grad,
    pure_gradient_blip,
    question_att,
    question_attention_blip,
    rel_att,
    rel_attention_blip,
)

__all__ = [
    "LM_LAYER",
    "PROMPT",
    "QFORMER_LAYER",
    "grad_att",
    "gradient_attention_blip",
    "loc_att",
    "localization_attention_blip",
    "pure_grad",
    "pure_gradient_blip",
    "question_att",
    "question_attention_blip",
    "rel_att",
    "rel_attention_blip",
]

sys.modules[__name__] = instructblip  # one module under both names: a constant that is set here is set there
