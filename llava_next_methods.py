"""ViCrop on LLaVA-NeXT, under the names that notebooks import: this is the module vicrop/models/llava_next.py.

    from llava_next_methods import rel_attention_llava_next
    att_map = rel_attention_llava_next(image, prompt, general_prompt, model, processor)        # float32 (h, w)

The layer to read is ATT_LAYER; it is read when a function is called, so changing it here changes the map.
"""

import sys

from vicrop.models import llava_next
from vicrop.models.llava_next import (
    ATT_LAYER,
    PROMPT,
    grad_att,
    gradient_attention_llava_next,
    loc_att,
    localization_attention_llava_next,
    pure_grad,
    pure_gradient_llava_next,
    question_att,
    question_attention_llava_next,
    rel_att,
    rel_attention_llava_next,
)

__all__ = [
    "ATT_LAYER",
    "PROMPT",
    "grad_att",
    "gradient_attention_llava_next",
    "loc_att",
    "localization_attention_llava_next",
    "pure_grad",
    "pure_gradient_llava_next",
    "question_att",
    "question_attention_llava_next",
    "rel_att",
    "rel_attention_llava_next",
]

sys.modules[__name__] = llava_next  # one module under both names: a constant that is set here is set there
