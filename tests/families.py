"""A small model of every family with random weights, with its stock processor, and a template in place of its own.

    model, processor = FAMILIES["qwen3_vl"]()

Processors have no half for videos, which alone needs torchvision.
"""

import importlib
import json
import sys
import types

import torch
import transformers
from architectures import text_config
from builders import GENERAL, make_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vicrop.attention import replaced
from vicrop.twin import keep_near

LAYERS = 3
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
QWEN_MARKS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
              "vision_end_token": "<|vision_end|>", "im_start_token": "<|im_start|>"}  # fmt: skip
GLM_MARKS = {"image_token": "<|image|>", "video_token": "<|video|>", "image_start_token": "<|begin_of_image|>",
             "image_end_token": "<|end_of_image|>", "video_start_token": "<|begin_of_video|>",
             "video_end_token": "<|end_of_video|>"}  # fmt: skip


def template(image, before="USER: ", between="\n", after=" ASSISTANT:"):
    """A chat template that writes `image` for each image."""
    part = f"{{% if c['type'] == 'image' %}}{image}{between}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
    return f"{{% for m in messages %}}{before}{{% for c in m['content'] %}}{part}{{% endfor %}}{{% endfor %}}{after}"


def without_videos(processor_class, *parts, **options):
    """A processor whose half for videos is None."""
    check = ProcessorMixin.check_argument_for_proper_class
    lenient = lambda self, name, value: None if value is None else check(self, name, value)  # noqa: E731
    with replaced(ProcessorMixin, "check_argument_for_proper_class", lenient):
        return processor_class(*parts, **options)


NO_VIDEOS = types.SimpleNamespace(num_frames=1, fps=1)  # SmolVLM's processor asks this of its half for videos


def square(side):
    return {"height": side, "width": side}


def text(tokenizer, kind="llama", **more):
    return text_config(tokenizer, model_type=kind, **{"num_hidden_layers": LAYERS, **more})


def untyped(config):
    return {name: value for name, value in config.items() if name != "model_type"}


def vision(kind="clip_vision_model", side=56, patch=14, **more):
    return {"model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": side, "patch_size": patch, **more}  # fmt: skip


def siglip(side, patch, **more):
    return vision("siglip_vision_model", side, patch, vision_use_head=False, **more)


def made(model_class, config):
    """A model in which everything matters: what passes a matrix keeps its size, and attention is far from uniform."""
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "norm" not in name:
            inputs = weight[0].numel() if "experts" not in name else weight.shape[-1]
            place = "position" in name or "pos_embed" in name
            sharp = 1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv", "in_proj_qk")) else 1.0
            std = 0.3 if place else 1.0 if "embed_tokens" in name else sharp * inputs**-0.5
            weight.data.normal_(0, std)
            keep_near(weight)
        elif "bias" in name:
            weight.data.normal_(0, 0.05)
        elif "newline" in name:
            weight.data.normal_(0, 1)
        elif "lambda" in name:
            weight.data.fill_(0.5)
    return model.eval()


def model_of(name, **config):
    return made(
        getattr(transformers, f"{name}ForConditionalGeneration"), getattr(transformers, f"{name}Config")(**config)
    )


# ------------------------------------------------------------------------------------------- merged patches, any size
def qwen(name, processor_class, patch, tower, **more):
    tokenizer = make_tokenizer([GENERAL], bos=None, eos="<|im_end|>", pad="<|endoftext|>", **QWEN_MARKS)
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 20 * (2 * patch) ** 2}
    chat = template("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>user\n", "", "<|im_end|>\n<|im_start|>")
    processor = without_videos(
        processor_class, Qwen2VLImageProcessorPil(size=size, patch_size=patch), tokenizer, None, chat_template=chat
    )
    rope = MROPE | ({"mrope_interleaved": True} if patch == 16 else {})
    return model_of(
        name, text_config=untyped(text(tokenizer, rope_parameters=rope, **more)), vision_config=tower,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id, vision_end_token_id=tokenizer.vision_end_token_id,
    ), processor  # fmt: skip


def qwen2_vl():
    tower = {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return qwen("Qwen2VL", transformers.Qwen2VLProcessor, 14, tower)


TOWER3 = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
          "patch_size": 16, "num_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
          "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}  # fmt: skip


def qwen3(name, tower=None, **more):
    return qwen(name, transformers.Qwen3VLProcessor, 16, TOWER3 | (tower or {}), **more)


def qwen3_vl():
    return qwen3("Qwen3VL", {"deepstack_visual_indexes": [0, 1]})


def qwen3_vl_moe():
    return qwen3("Qwen3VLMoe", {"deepstack_visual_indexes": [0, 1]}, **EXPERTS)


def qwen3_5():
    return qwen3("Qwen3_5", **STATES)


def qwen3_5_moe():
    return qwen3("Qwen3_5Moe", **STATES, **EXPERTS, shared_expert_intermediate_size=32)


def glm(name, image_processor, kinds):
    tokenizer = make_tokenizer([GENERAL], **GLM_MARKS)
    processor = without_videos(
        getattr(transformers, f"{'Glm4v' if name == 'Glm4v' else 'Glm46V'}Processor"),
        image_processor(size={"shortest_edge": 2 * 4 * 28 * 28, "longest_edge": 2 * 20 * 28 * 28}), tokenizer, None,
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip
    words = untyped(text(tokenizer, rope_parameters=MROPE | {"partial_rotary_factor": 1.0}))
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 112, "patch_size": 14,
             "out_hidden_size": 64, "intermediate_size": 64}  # fmt: skip
    ids = {f"{mark.removesuffix('_token')}_token_id": getattr(tokenizer, f"{mark}_id") for mark in GLM_MARKS}
    return model_of(name, text_config=words | kinds[0], vision_config=tower | kinds[1], **ids), processor


def glm4v():
    return glm("Glm4v", Glm4vImageProcessorPil, ({}, {}))


def glm46v():
    kinds = {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"}
    return glm("Glm46V", Glm46VImageProcessorPil, kinds)


# ------------------------------------------------------------------------------------------------------------- tiles
def internvl(side=28, patch=7, most=6):
    tokenizer = make_tokenizer([GENERAL], start_image_token="<img>", end_image_token="</img>",
                               context_image_token="<IMG_CONTEXT>", video_token="<video>")  # fmt: skip
    length = (side // patch // 2) ** 2
    image_processor = GotOcr2ImageProcessorPil(size=square(side), crop_to_patches=True, min_patches=1, max_patches=most)
    chat = template("<IMG_CONTEXT>")
    processor = without_videos(
        transformers.InternVLProcessor, image_processor, tokenizer, None, image_seq_length=length, chat_template=chat
    )
    tower = untyped(vision(side=[side, side], patch=[patch, patch]))
    return model_of("InternVL", vision_config=tower, text_config=text(tokenizer, "qwen2"), image_seq_length=length,
                    image_token_id=tokenizer.context_image_token_id), processor  # fmt: skip


def aya_vision():
    marks = (
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
        "<image>",
    )
    tokenizer = make_tokenizer([GENERAL], **{f"mark{number}_token": mark for number, mark in enumerate(marks)})
    image_processor = GotOcr2ImageProcessorPil(size=square(28), crop_to_patches=True, min_patches=1, max_patches=6)
    processor = transformers.AyaVisionProcessor(image_processor, tokenizer, patch_size=7, img_size=28,
                                                downsample_factor=2, chat_template=template("<image>"))  # fmt: skip
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    words = text(tokenizer, "cohere2", sliding_window=24, layer_types=kinds)
    return model_of("AyaVision", vision_config=siglip(28, 7), text_config=words, downsample_factor=2,
                    image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>")), processor  # fmt: skip


def idefics3(name="Idefics3", image_processor=Idefics3ImageProcessorPil, make=None, side=28, patch=7, most=3):
    places = {f"row_{row}_col_{column}_token": f"<row_{row}_col_{column}>"
              for row in range(1, 5) for column in range(1, 5)}  # fmt: skip
    tokenizer = make_tokenizer(
        [GENERAL], fake_image_token="<fake_token_around_image>", image_token="<image>",
        end_of_utterance_token="<end_of_utterance>", global_image_token="<global-img>", **places,
    )  # fmt: skip
    image_processor = image_processor(size={"longest_edge": most * side}, max_image_size={"longest_edge": side})
    make = make or (lambda *parts, **options: transformers.Idefics3Processor(*parts, **options))
    processor = make(
        image_processor, tokenizer, image_seq_len=(side // patch // 2) ** 2, chat_template=template("<image>")
    )
    return model_of(
        name,
        vision_config=untyped(vision(side=side, patch=patch)),
        text_config=text(tokenizer),
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ), processor


def smolvlm():
    def make(image_processor, tokenizer, **options):
        with replaced(processing_smolvlm, "num2words", str):  # a package that only videos need
            processor = without_videos(transformers.SmolVLMProcessor, image_processor, tokenizer, None, **options)
        processor.video_processor = NO_VIDEOS
        return processor

    return idefics3("SmolVLM", SmolVLMImageProcessorPil, make)


def llava_onevision(side=28, patch=7, tiles=4, most="anyres_max_9"):
    tokenizer = make_tokenizer([GENERAL], image_token="<image>", video_token="<video>")
    pinpoints = [[side * rows, side * columns] for rows in range(1, tiles + 1) for columns in range(1, tiles + 1)]
    processor = without_videos(
        transformers.LlavaOnevisionProcessor,
        LlavaOnevisionImageProcessorPil(size=square(side), image_grid_pinpoints=pinpoints), tokenizer, None,
        num_image_tokens=(side // patch) ** 2, vision_feature_select_strategy="full", vision_aspect_ratio=most,
        chat_template=template("<image>"),
    )  # fmt: skip
    return model_of(
        "LlavaOnevision", vision_config=siglip(side, patch), text_config=text(tokenizer, "qwen2"),
        vision_aspect_ratio=most,
        image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    ), processor  # fmt: skip


# ------------------------------------------------------------------------------------------------------- one square
def gemma3():
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=square(56)), tokenizer, image_seq_length=4,
        chat_template=template("<start_of_image>", "<s>user\n", "", "\n<model>"),
    )  # fmt: skip
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    words = text(tokenizer, "gemma3_text", sliding_window=24, layer_types=kinds, query_pre_attn_scalar=16)
    return model_of("Gemma3", text_config=words, vision_config=siglip(56, 14), mm_tokens_per_image=4,
                    image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
                    eoi_token_index=tokenizer.eoi_token_id), processor  # fmt: skip


def vipllava():
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square(56)), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    return model_of("VipLlava", vision_config=vision(), text_config=text(tokenizer), image_seq_length=16,
                    image_token_index=tokenizer.image_token_id, vision_feature_layers=[-1, -2]), processor  # fmt: skip


def paligemma():
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    image_processor = SiglipImageProcessorPil(size=square(56))
    image_processor.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    return model_of(
        "PaliGemma",
        vision_config=siglip(56, 14, projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        text_config=text(tokenizer, "gemma"),
        image_token_index=tokenizer.image_token_id,
    ), processor


# ---------------------------------------------------------------------------------------------------------- any size
def pixtral_processor():
    """Its class, whose module wants a function of the image processor for torchvision. That for PIL has it, too."""
    place = "transformers.models.pixtral.image_processing_pixtral"
    if not transformers.utils.is_torchvision_available():
        sys.modules.setdefault(place, image_processing_pil_pixtral)
    return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor


def rows(name, merge, patch=7, side=None, **more):
    side = side or 4 * patch * (1 + merge)
    marks = {"image_mark": "[IMG]", "break_mark": "[IMG_BREAK]", "end_mark": "[IMG_END]"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    size = {"longest_edge": side}
    image_processor = image_processing_pil_pixtral.PixtralImageProcessorPil(size=size, patch_size=square(patch))
    processor = pixtral_processor()(
        image_processor, tokenizer, patch_size=patch, spatial_merge_size=merge, chat_template=template("[IMG]")
    )
    return model_of(
        name, vision_config=vision("pixtral", max(side, 84), patch, head_dim=16),
        image_token_index=tokenizer.image_mark_id,
        text_config=text(tokenizer, "mistral", sliding_window=None), vision_feature_layer=-1, **more,
    ), processor  # fmt: skip


def mistral3(**size):
    return rows("Mistral3", 2, spatial_merge_size=2, **size)


def pixtral():
    """A LLaVA config around Pixtral's vision tower, as Pixtral-12B has it."""
    return rows("Llava", 1, vision_feature_select_strategy="full")


FAMILIES = {build.__name__: build for build in (
    qwen3_vl, qwen3_vl_moe, qwen2_vl, internvl, qwen3_5, qwen3_5_moe, gemma3, llava_onevision, smolvlm, idefics3,
    mistral3, pixtral, vipllava, paligemma, glm4v, glm46v, aya_vision,
)}  # fmt: skip


def saved(name, folder, builders=FAMILIES):
    """The folder of a family's small model, as a checkpoint; what a processor lacks for videos is left out."""
    model, processor = builders[name]()
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    if processor.chat_template:
        (folder / "chat_template.jinja").write_text(processor.chat_template)
    own = {key: value for key, value in vars(processor).items() if isinstance(value, int | str)}
    own = {**own, "processor_class": type(processor).__name__}
    own.pop("chat_template", None)
    listener = getattr(processor, "feature_extractor", None)
    if listener is not None:
        own["feature_extractor"] = json.loads(listener.to_json_string())
    (folder / "processor_config.json").write_text(json.dumps(own))
    return folder
