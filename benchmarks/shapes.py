"""Models of real shapes with random weights, for timing: nothing is downloaded."""

import torch
from transformers import (
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.models import Qwen, bpe_tokenizer
from vicrop.crop import load_model
from vicrop.models import instructblip as blip_methods
from vicrop.models import llava as llava_methods
from vicrop.models import qwen2_5_vl as qwen2_5_methods
from vicrop.processors import ImageTextProcessor
from vicrop.tables import GENERAL_PROMPT

TEXT_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064,
}  # fmt: skip
TEXT_SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 1024,
}  # fmt: skip


QUESTIONS = ("what number is on the red sign?", "which digit is on the blue sign?")


def words(template):
    """Texts whose words become tokens, so that prompts are about as long as with the real tokenizers."""
    return [template.format(question=question) for question in (*QUESTIONS, GENERAL_PROMPT)]


def llama(text):
    return LlamaConfig(**text, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def llava(text, vision, **more):
    tokenizer = bpe_tokenizer(words(llava_methods.PROMPT), image_token="<image>")
    square = {"height": 336, "width": 336}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=square)
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14), text_config=llama(text),
        image_token_index=tokenizer.image_token_id, image_seq_length=576, **more,
    )  # fmt: skip
    return LlavaForConditionalGeneration, config, processor


def instructblip(text, vision, qformer, **more):
    tokenizer, reader = (bpe_tokenizer(words(blip_methods.PROMPT)) for _ in range(2))
    square = {"height": 224, "width": 224}
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=square), tokenizer, reader, 32)
    config = InstructBlipConfig(
        vision_config={**vision, "image_size": 224, "patch_size": 14, "initializer_range": 0.02},
        qformer_config={**qformer, "vocab_size": len(reader), "encoder_hidden_size": vision["hidden_size"]},
        text_config=llama(text).to_dict(), num_query_tokens=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **more,
    )  # fmt: skip
    return InstructBlipForConditionalGeneration, config, processor


def qwen(model_class, config_class, text, vision, patch, **more):
    """A Qwen-VL of some generation: pictures of any size, in patches that are merged by four."""
    prompts = [*words(qwen2_5_methods.PROMPT), Qwen.chat_template]
    tokenizer = bpe_tokenizer(prompts, bos=None, eos="<|im_end|>", pad="<|endoftext|>", **Qwen.marks)
    processor = ImageTextProcessor(Qwen2VLImageProcessorPil(patch_size=patch), tokenizer, Qwen.chat_template)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = config_class(
        text_config={**text, **ids}, vision_config={**vision, "patch_size": patch},
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id, vision_end_token_id=tokenizer.vision_end_token_id,
        **more,
    )  # fmt: skip
    return model_class, config, processor


def qwen2_5_vl(text, vision, **more):
    return qwen(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, text, vision, 14, **more)


def qwen3_vl(text, vision, **more):
    return qwen(Qwen3VLForConditionalGeneration, Qwen3VLConfig, text, vision, 16, **more)


VISION_SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6}

# name -> (the model's name in info.MODELS, what makes its class, config and processor). The small shapes read the layer
# that is as deep, relative to their depth, as the real model's.
SHAPES = {
    "llava-small": ("llava", lambda: llava(TEXT_SMALL, VISION_SMALL, att_layer=7)),
    "instructblip-small": (
        "blip",
        lambda: instructblip(
            TEXT_SMALL,
            VISION_SMALL,
            {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4},
            att_layer=7,
        ),
    ),
    "qwen2.5-vl-small": (
        "qwen2_5",
        lambda: qwen2_5_vl(
            {
                "hidden_size": 448, "intermediate_size": 1280, "num_hidden_layers": 24, "num_attention_heads": 8,
                "num_key_value_heads": 2, "vocab_size": 1024,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 10, 10]},
            },
            {"hidden_size": 384, "intermediate_size": 1024, "depth": 8, "num_heads": 6, "out_hidden_size": 448,
             "fullatt_block_indexes": [3, 7]},
            att_layer=15,
        ),
    ),
    "qwen3-vl-small": (
        "qwen3_vl",
        lambda: qwen3_vl(
            {
                "hidden_size": 448, "intermediate_size": 1280, "num_hidden_layers": 24, "num_attention_heads": 8,
                "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10],
                                    "mrope_interleaved": True},
            },
            {"hidden_size": 384, "intermediate_size": 1024, "depth": 8, "num_heads": 6, "out_hidden_size": 448,
             "deepstack_visual_indexes": [2, 4, 6]},
            att_layer=15,
        ),
    ),
    "llava-7b": (
        "llava",
        lambda: llava(
            TEXT_7B,
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        ),
    ),
    "instructblip-7b": ("blip", lambda: instructblip(TEXT_7B, {"hidden_size": 1408}, {"hidden_size": 768})),
    "qwen2.5-vl-3b": (
        "qwen2_5",
        lambda: qwen2_5_vl(
            {
                "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                "num_key_value_heads": 2, "vocab_size": 151936,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 2048,
             "fullatt_block_indexes": [7, 15, 23, 31]},
        ),
    ),
}  # fmt: skip
TINY = ["llava_tiny", "blip_tiny", "qwen2_5_tiny"]  # the checkpoints that come with the toolkit
GROUPS = {"tiny": TINY, "small": [name for name in SHAPES if name.endswith("-small")]}


def build(name, device, dtype):
    """(name in info.MODELS, model, processor) of a shape with random weights, or of a tiny model, on a device."""
    if name in TINY:
        return name, *load_model(name, device=device, dtype=dtype)
    family, make = SHAPES[name]
    model_class, config, processor = make()
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=dtype)
    if hasattr(model, "query_tokens"):
        torch.nn.init.normal_(model.query_tokens)  # zeros at first, and then all queries attend alike
    return family, model.eval(), processor
