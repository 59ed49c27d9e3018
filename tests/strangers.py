"""Small real models of families that no adapter knows, as a user would find them: a folder with a chat template."""

import torch
from builders import GENERAL, make_tokenizer
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from vicrop.twin import vivid

SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}


def template(image):
    """A stand-in for a checkpoint's chat template."""
    content = f"{{% if c['type'] == 'image' %}}{image}\n{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
    turns = f"{{% for m in messages %}}USER: {{% for c in m['content'] %}}{content}{{% endfor %}}{{% endfor %}}"
    return f"{turns} ASSISTANT:"


def text(tokenizer, kind, **more):
    return {
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def vision(side, patch, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": side, "patch_size": patch, **more}


def made(model_class, config):
    torch.manual_seed(0)
    return vivid(model_class._from_config(config, dtype=torch.float32))


def deepseek():
    """A square raster; the image is padded to it."""
    tokenizer = make_tokenizer([GENERAL], image_token="<image_placeholder>")
    images = DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    marks = {"num_image_tokens": 16, "chat_template": template("<image_placeholder>")}
    processor = DeepseekVLProcessor(images, tokenizer, **marks)
    config = DeepseekVLConfig(
        text_config=text(tokenizer, "llama"), vision_config=vision(32, 8, **SIGLIP),
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    return made(DeepseekVLForConditionalGeneration, config), processor


def lighton():
    """Rows of an image of any size, with marks in between."""
    marks = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    images = PixtralImageProcessorPil(size={"longest_edge": 84}, patch_size={"height": 7, "width": 7})
    sizes = {"patch_size": 7, "spatial_merge_size": 2, "chat_template": template("<|image_pad|>")}
    processor = LightOnOcrProcessor(images, tokenizer, **sizes)
    config = LightOnOcrConfig(
        vision_config=vision(84, 7, model_type="pixtral", head_dim=16), text_config=text(tokenizer, "qwen3"),
        image_token_id=tokenizer.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    return made(LightOnOcrForConditionalGeneration, config), processor


STRANGERS = {"deepseek_vl": deepseek, "lighton_ocr": lighton}
