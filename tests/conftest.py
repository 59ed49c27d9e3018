"""Small real models with random weights, built from configs: nothing is downloaded."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from info import GENERAL_PROMPT
from llava_methods import PROMPT
from tiny.models import make_tokenizer

torch.set_num_threads(2)

QUESTION = PROMPT.format(question="what number is on the red sign?")
GENERAL = PROMPT.format(question=GENERAL_PROMPT)

# Shapes that differ where it could matter: layers, grouped key/value heads, patch and image size, kept CLS feature.
SHAPES = {
    "llava-1.5-like": {"layers": 16, "heads": 4, "kv_heads": 4, "side": 56, "patch": 14, "select": "default"},
    "grouped-heads": {"layers": 3, "heads": 8, "kv_heads": 2, "side": 48, "patch": 8, "select": "default"},
    "keeps-cls": {"layers": 5, "heads": 4, "kv_heads": 1, "side": 42, "patch": 14, "select": "full"},
}


def build_llava(layers=4, heads=4, kv_heads=4, side=56, patch=14, select="default", center_crop=True, **load):
    """(model, processor) with sharpened random weights, so that attention is far from uniform."""
    tokenizer = make_tokenizer([GENERAL])
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
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=side, patch_size=patch, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy=select, image_seq_length=(side // patch) ** 2 + (select == "full"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, **load)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and any(part in name for part in ("q_proj", "k_proj", "projector", "embed_tokens")):
            weight.data.mul_(8)
    return model.eval(), processor


def photo(width=90, height=70, seed=0):
    """A picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + fine).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session", params=SHAPES)
def shaped(request):
    return build_llava(**SHAPES[request.param])


@pytest.fixture(scope="session")
def llava():
    return build_llava()


@pytest.fixture(scope="session")
def squashing_llava():
    return build_llava(center_crop=False, side=48, patch=8)
