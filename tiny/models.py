"""The embedded models before training: tokenizer, processor, real transformers models of a few million parameters."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tiny.scenes import COLORS, NUMBER_QUESTIONS, PRESENCE_QUESTIONS

RESOLUTION, PATCH = 112, 8  # a 14 x 14 map
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}


def make_tokenizer(prompts):
    """A byte-level BPE tokenizer: every word of the scenes' language is one token, any other text falls into bytes.

    Args:
        prompts: the texts around the questions (templates already filled in), so that their words become tokens too.
    """
    questions = [q.format(color=color) for q in NUMBER_QUESTIONS + PRESENCE_QUESTIONS for color in COLORS]
    answers = [f" {color} {digit}, yes no" for color in COLORS for digit in range(10)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((questions + answers + list(prompts)) * 5, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    special = {name: token for name, token in SPECIAL.items() if name != "image_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": SPECIAL["image_token"]},
        padding_side="left",
        **special,
    )


def fan_in_init(module, generator):
    """Weights with std 1/sqrt(fan_in), half of that into the residual stream.

    The library's constant 0.02 is meant for wide models: at a width of 128 it left training at chance.
    """
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            into_stream = any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2"))
            std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5 * (0.5 if into_stream else 1.0)
            weight.data.normal_(std=std, generator=generator)


def make_llava(prompts):
    """An untrained tiny LLaVA-1.5: CLIP vision tower, two-layer projector, Llama with 6 layers of 8 heads.

    Its processor squashes the whole image to a square (no centre crop), so its map covers the whole image.
    Returns:
        (LlavaForConditionalGeneration, LlavaProcessor)
    """
    tokenizer = make_tokenizer(prompts)
    side = {"height": RESOLUTION, "width": RESOLUTION}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=RESOLUTION, patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=128, intermediate_size=304, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(RESOLUTION // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    fan_in_init(model, generator)
    model.lm_head.weight.data.normal_(std=0.02, generator=generator)
    return model, processor


MODELS = {"llava": make_llava}
