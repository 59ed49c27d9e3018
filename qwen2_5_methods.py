"""ViCrop on Qwen2.5-VL, under the names that notebooks import: this is the module vicrop/models/qwen2_5_vl.py.

    from qwen2_5_methods import rel_attention_qwen2_5
    att_map = rel_attention_qwen2_5(image, prompt, general_prompt, model, processor)        # float32 (h, w)

The layer to read is ATT_LAYER; it is read when a function is called, so changing it here changes the map.
"""

import sys

from vicrop.models import qwen2_5_vl
from vicrop.models.qwen2_5_vl import (
    ATT_LAYER,
    BBOX_SIZE,
    PROMPT,
    encode_base64,
    grad_att,
    gradient_attention_qwen2_5,
    loc_att,
    localization_attention_qwen2_5,
    prepare_qwen2_5_input,
    pure_grad,
    pure_gradient_qwen2_5,
    question_att,
    question_attention_qwen2_5,
    rel_att,
    rel_attention_qwen2_5,
)

__all__ = [
    "ATT_LAYER",
    "BBOX_SIZE",
    "PROMPT",
    "encode_base64",
    "grad_att",
    "gradient_attention_qwen2_5",
    "loc_att",
    "localization_attention_qwen2_5",
    "prepare_qwen2_5_input",
    "pure_grad",
    "pure_gradient_qwen2_5",
    "question_att",
    "question_attention_qwen2_5",
    "rel_att",
    "rel_attention_qwen2_5",
]

sys.modules[__name__] = qwen2_5_vl  # one module under both names: a constant that is set here is set there
