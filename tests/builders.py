"""Real models of every kind, small and with random weights, and pictures to show them."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.canvas import COLORS
from tiny.models import Qwen as TinyQwen
from tiny.models import bpe_tokenizer
from tiny.scenes import NUMBER_QUESTIONS, PRESENCE_QUESTIONS
from vicrop.models.llava import PROMPT
from vicrop.processors import ImageTextProcessor
from vicrop.tables import GENERAL_PROMPT

torch.set_num_threads(min(2, torch.get_num_threads()))

QUESTION = PROMPT.format(question="what number is on the red sign?")
GENERAL = PROMPT.format(question=GENERAL_PROMPT)
WORDS = [question.format(color=color) for question in NUMBER_QUESTIONS + PRESENCE_QUESTIONS for color in COLORS]
WORDS += [f" {color} {digit}, yes no" for color in COLORS for digit in range(10)]
SHARP = ("q_proj", "k_proj", "query", "key", "projector", "projection", "embed_tokens", "merger.mlp")


def make_tokenizer(prompts, **marks):
    """One that knows the words of the questions, whatever the drawn world's language grows to."""
    return bpe_tokenizer([*WORDS, *prompts], **marks)


def sharpened(model):
    """With larger weights where attention comes from, so that it is far from uniform."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and any(part in name for part in SHARP):
            weight.data.mul_(8)
    return model.eval()


def clip_vision(side, patch):
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=side, patch_size=patch, projection_dim=32,
    )  # fmt: skip


def llama(tokenizer, layers, heads=4, kv_heads=4):
    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def build_llava(layers=4, heads=4, kv_heads=4, side=56, patch=14, select="default", center_crop=True, **load):
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    size = {"shortest_edge": side} if center_crop else {"height": side, "width": side}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size={"height": side, "width": side}, do_center_crop=center_crop
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config=clip_vision(side, patch), text_config=llama(tokenizer, layers, heads, kv_heads),
        image_token_index=tokenizer.image_token_id, vision_feature_select_strategy=select,
        image_seq_length=(side // patch) ** 2 + (select == "full"),
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpened(LlavaForConditionalGeneration._from_config(config, **load)), processor


def build_llava_next(layers=3, side=28, patch=7, **load):
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    square = {"height": side, "width": side}
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    image_processor = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=pinpoints)
    processor = LlavaNextProcessor(
        image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=clip_vision(side, patch), text_config=llama(tokenizer, layers),
        image_token_index=tokenizer.image_token_id, image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpened(LlavaNextForConditionalGeneration._from_config(config, **load)), processor


def build_blip(layers=3, queries=32, qformer_layers=6, side=56, **load):
    tokenizer, reader = make_tokenizer([GENERAL]), make_tokenizer([GENERAL])
    square = {"height": side, "width": side}
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=square), tokenizer, reader, queries)
    config = InstructBlipConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": side, "patch_size": 14, "initializer_range": 0.1},
        qformer_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": qformer_layers,
                        "num_attention_heads": 2, "vocab_size": len(reader), "encoder_hidden_size": 32},
        text_config=llama(tokenizer, layers).to_dict(), num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration._from_config(config, **load)
    torch.nn.init.normal_(model.query_tokens)  # zeros at first: then all queries attend alike, and nothing is tested
    return sharpened(model), processor


def build_qwen2_5(layers=3, max_pixels=36 * 28 * 28, **load):
    tokenizer = make_tokenizer([GENERAL], bos=None, eos="<|im_end|>", pad="<|endoftext|>", **TinyQwen.marks)
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": max_pixels})
    processor = ImageTextProcessor(image_processor, tokenizer, TinyQwen.chat_template)
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
                     "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
                     "eos_token_id": tokenizer.eos_token_id},
        vision_config={"hidden_size": 32, "depth": 4, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
                       "fullatt_block_indexes": [3], "window_size": 112},
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id, vision_end_token_id=tokenizer.vision_end_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpened(Qwen2_5_VLForConditionalGeneration._from_config(config, **load)), processor


KINDS = {"llava": build_llava, "llava_next": build_llava_next, "blip": build_blip, "qwen2_5": build_qwen2_5}

# Shapes that differ where it could matter: layers, grouped key/value heads, patch and image size, kept CLS feature.
BUILDERS = {
    "llava": lambda: build_llava(layers=16),
    "llava-grouped-heads": lambda: build_llava(layers=3, heads=8, kv_heads=2, side=48, patch=8),
    "llava-keeps-cls": lambda: build_llava(layers=5, kv_heads=1, side=42, select="full"),
    "llava_next": lambda: build_llava_next(layers=16),
    "blip": lambda: build_blip(layers=16),
    "qwen2_5": lambda: build_qwen2_5(layers=23),
}


def photo(width=90, height=70, seed=0):
    """A picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + fine).clip(0, 255).astype(np.uint8))
