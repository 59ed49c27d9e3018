"""ViCrop on LLaVA-1.5, under the names that notebooks import: this is the module vicrop/models/llava.py.

    from llava_methods import rel_attention_llava
    att_map = rel_attention_llava(image, prompt, general_prompt, model, processor)        # float32 (h, w)

The layer to read is ATT_LAYER; it is read when a function is called, so changing it here changes the map.
"""

import sys

from vicrop.models import llava
from vicrop.models.llava import (
    ATT_LAYER,
    PROMPT,
    grad_att,
    gradient_attention_llava,
    loc_att,
    localization_attention_llava,
    pure_grad,
    pure_gradient_llava,
    question_att,
    question_attention_llava,
    rel_att,
    rel_attention_llava,
)

__all__ = [
    "ATT_LAYER",
    "PROMPT",
    "grad_att",
    "gradient_attention_llava",
    "loc_att",
    "localization_attention_llava",
    "pure_grad",
    "pure_gradient_llava",
    "question_att",
    "question_attention_llava",
    "rel_att",
    "rel_attention_llava",
]

sys.modules[__name__] = llava  # one module under both names: a constant that is set here is set there
