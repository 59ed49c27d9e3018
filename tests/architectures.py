"""Small real models with what a decoder may be handed besides embeddings: deepstack features, windows, states, caps."""

import sys
import types

import pytest
import torch
from builders import GENERAL, clip_vision, make_tokenizer, sharpened
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tiny.models import Qwen as TinyQwen
from vicrop import adapter as adapters
from vicrop.layouts import Layout, raster, whole
from vicrop.models.qwen2_5_vl import QwenAdapter
from vicrop.processors import ImageTextProcessor

MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "mrope_interleaved": True}


def text_config(tokenizer, **more):
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def made(model_class, config):
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():  # so that visual features matter beside the text's
        if weight.dim() == 2 and "embed" not in name:
            weight.data.normal_(0, weight.shape[1] ** -0.5)
    return sharpened(model)


def qwen_like(config_class, model_class, vision=None, **text):
    tokenizer = make_tokenizer([GENERAL], bos=None, eos="<|im_end|>", pad="<|endoftext|>", **TinyQwen.marks)
    size = {"shortest_edge": 64 * 64, "longest_edge": 30 * 32 * 32}
    image_processor = Qwen2VLImageProcessorPil(size=size, patch_size=16)
    processor = ImageTextProcessor(image_processor, tokenizer, TinyQwen.chat_template)
    tower = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
             "patch_size": 16, "num_position_embeddings": 64, **(vision or {})}  # fmt: skip
    config = config_class(
        text_config=text_config(tokenizer, rope_parameters=MROPE, **text), vision_config=tower,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id, vision_end_token_id=tokenizer.vision_end_token_id,
    )  # fmt: skip
    return made(model_class, config), processor


def deepstack():
    """Qwen3-VL: features of the vision tower's middle are added in the decoder's first layers."""
    return qwen_like(Qwen3VLConfig, Qwen3VLForConditionalGeneration, {"deepstack_visual_indexes": [0, 1, 2]})


def recurrent():
    """Qwen3.5: attention in every second layer only, recurrent states in the others."""
    kinds = ["linear_attention", "full_attention"] * 2
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    sizes |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
    return qwen_like(Qwen3_5Config, Qwen3_5ForConditionalGeneration, layer_types=kinds, **sizes)


def windowed():
    """Gemma 3: sliding windows in two layers of four, and image tokens that see each other both ways."""
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    image_processor = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, do_pan_and_scan=False)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    text = text_config(tokenizer, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=16)
    config = Gemma3Config(
        text_config=text | {"model_type": "gemma3_text"}, mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                       "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
                       "vision_use_head": False},
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )  # fmt: skip
    processor = types.SimpleNamespace(
        image_processor=image_processor, tokenizer=tokenizer, image_token=tokenizer.image_token
    )
    return made(Gemma3ForConditionalGeneration, config), processor


def capped():
    """LLaVA with Gemma 2 as its language model, which caps its attention scores."""
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    square = {"height": 56, "width": 56}
    processor = types.SimpleNamespace(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square), tokenizer=tokenizer,
        image_token="<image>",
    )  # fmt: skip
    text = Gemma2Config(**text_config(tokenizer, query_pre_attn_scalar=16, attn_logit_softcapping=50.0))
    config = LlavaConfig(
        vision_config=clip_vision(56, 14), text_config=text, image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    return made(LlavaForConditionalGeneration, config), processor


# -- adapters of these tests: what a user would write for a family of their own
class DeepAdapter(QwenAdapter):
    @classmethod
    def default_layer(cls, model):
        return 1


class WindowedAdapter(adapters.Adapter):
    stacks_features = True
    image_placeholder = "<start_of_image><image_soft_token><end_of_image>"

    def layouts(self, inputs, sizes):
        return [Layout(4, raster(2, 2), whole(size)) for size in sizes]

    def preprocess(self, images):
        return {"pixel_values": super().preprocess(images)["pixel_values"]}

    def prompt(self, question):
        return f"{self.image_placeholder}{question}"

    def forward_inputs(self, prompt, ids, images):
        return super().forward_inputs(prompt, ids, images) | self.types(ids)

    def stock_inputs(self, prompt, ids, inputs):
        return super().stock_inputs(prompt, ids, inputs) | self.types(ids)

    def types(self, ids):
        return {"token_type_ids": (ids == self.model.config.image_token_id).long()[None]}

    @classmethod
    def default_layer(cls, model):
        return 1


ARCHITECTURES = {"deepstack": deepstack, "recurrent": recurrent, "windowed": windowed}
ADAPTERS = {"qwen3_vl": DeepAdapter, "qwen3_5": DeepAdapter, "gemma3": WindowedAdapter}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The adapters above, registered as a user's own would be, for the tests of a file that imports this."""
    before = dict(adapters.REGISTRY)
    for kind, adapter in ADAPTERS.items():
        sys.modules[f"adapter_of_{kind}"] = types.SimpleNamespace(ADAPTER=adapter)
        adapters.REGISTRY[kind] = f"adapter_of_{kind}"
    yield
    adapters.REGISTRY.clear()
    adapters.REGISTRY.update(before)
    for kind in ADAPTERS:
        del sys.modules[f"adapter_of_{kind}"]
