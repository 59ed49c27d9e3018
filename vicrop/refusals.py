"""Why some image-text architectures of transformers are not carried: what a refusal quotes, and the docs say.

Only what an architecture is, whatever the checkpoint, is a reason to refuse it unseen. All others that no test covers
are compared with the stock model at first use: right, or refused (see guard.py).
"""

AS_OF = "5.23"  # the version of transformers whose architectures are all accounted for; newer ones are unknown

_ENCODER_DECODER = "it is an encoder-decoder, whose answer looks at the image through an encoder, not within its prompt"
_CODES = "it makes an image discrete codes, through which no gradient leads to pixels: what a token shows is not told"
_CROSS = "its decoder looks at the image by cross-attention beside its prompt, without image tokens: not built here"
_INSIDE = "its decoder itself puts the image's features among the words, so what it is handed cannot be cut and shared"

# model_type -> the reason, which follows "... is not carried: "
REFUSED = {
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "chameleon": _CODES,
    "emu3": _CODES,
    "blip": _CROSS,
    "idefics": _CROSS,
    "mllama": _CROSS,
    "kosmos-2": _INSIDE,
    "kosmos-2.5": _INSIDE,
    "diffusion_gemma": "it writes blocks of text by diffusion: there is no next token whose attention could be read",
    "evolla": "it answers about proteins, not about images",
    "git": "it captions with an attention of its own, which no interface reads, and takes no chat about an image",
    "mistral4": "it is a language model alone, without images",
    "pi0": "it moves a robot: its output is actions, not words",
    "shieldgemma2": "it judges whether an image is safe, by the probabilities of two words: it answers no questions",
    "aria": "its resampler computes attention within torch (nn.MultiheadAttention), where it cannot be read",
    "inkling2": "its attention adds a bias of positions and sinks to the scores, which are not read here",
    "inkling_mm_model": "its attention adds a bias of positions to the scores, which is not read here",
    "instructblipvideo": "it takes videos, not images",
    "dots3_note": "its attention chooses tokens by an index of its own, which is not read here",
    "fuyu": "its processor puts one image's place before a text, without a template to which a crop could be added",
    "minimax_m3_vl": "its attention chooses blocks of tokens by an index of its own, which is not read here",
    "mistral_large4": "its attention chooses tokens by an index of its own, which is not read here",
}

# Neither carried nor refused unseen: model_type -> what the comparison at first use has to say, as far as is known.
_UNTRIED = "no small model of it is built in the tests"
CHECKED = {
    "cohere_compass": _UNTRIED,
    "cosmos3_edge": _UNTRIED,
    "cosmos3_omni": _UNTRIED,
    "deepseek_ocr2": "not tried; by its source a token depends on all patches, so that no layout can be measured",
    "deepseek_vl": _UNTRIED,
    "deepseek_vl_hybrid": _UNTRIED,
    "ernie4_5_vl_moe": _UNTRIED,
    "exaone4_5": _UNTRIED,
    "fast_vlm": _UNTRIED,
    "gemma3n": _UNTRIED,
    "gemma4": _UNTRIED,
    "gemma4_unified": _UNTRIED,
    "glm4v_moe": _UNTRIED,
    "glm5_next": "not tried",
    "glm_ocr": _UNTRIED,
    "glmga": _UNTRIED,
    "got_ocr2": _UNTRIED,
    "granite4_vision": _UNTRIED,
    "hunyuan_vl": _UNTRIED,
    "hyperclovax_vision_v2": _UNTRIED,
    "janus": _UNTRIED,
    "kimi_k25": _UNTRIED,
    "lfm3_vl": _UNTRIED,
    "lighton_ocr": _UNTRIED,
    "llava_next_video": _UNTRIED,
    "muse_glimmer": _UNTRIED,
    "muse_spark": _UNTRIED,
    "nemotron_h_omni": "refused: its processor does not say what it writes for an image in a prompt",
    "paddleocr_vl": _UNTRIED,
    "pp_chart2table": "refused: its processor names no image token, its template itself writes all places of an image",
    "qwen2_5_omni_thinker": _UNTRIED,
    "qwen3_omni_moe_thinker": _UNTRIED,
    "qwen4_exp": _UNTRIED,
    "step3p7": "not tried; by its source convolutions behind its tower let tokens overlap",
    "unlimited_ocr": "not tried; by its source convolutions behind its tower let tokens overlap",
    "video_llama_3": _UNTRIED,
    "video_llava": _UNTRIED,
}
