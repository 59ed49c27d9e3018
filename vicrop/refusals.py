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
CHECKED = {
    "deepseek_ocr2": "not tried; by its source a token depends on all patches, so that no layout can be measured",
    "nemotron_h_omni": "refused: its processor does not say what it writes for an image in a prompt",
    "pp_chart2table": "refused: its processor names no image token, its template itself writes all places of an image",
    "step3p7": "not tried; by its source convolutions behind its tower let tokens overlap",
    "unlimited_ocr": "not tried; by its source convolutions behind its tower let tokens overlap",
}
