"""The tables: models, tasks, methods, options. Everything else (choices, score table, tests) is derived from them."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

GENERAL_PROMPT = "Write a general description of the image."

# name -> where the weights are (a hub id, or a folder beside the package), the module that knows the family, and the
# localization heads of that very checkpoint, if they are known (LLaVA-1.5-7B: the paper's).
MODELS = {
    "llava": {"id": "llava-hf/llava-1.5-7b-hf", "module": "vicrop.models.llava", "loc_heads": "L14H24,L14H13"},
    "llava_next": {"id": "llava-hf/llava-v1.6-vicuna-7b-hf", "module": "vicrop.models.llava_next"},
    "blip": {"id": "Salesforce/instructblip-vicuna-7b", "module": "vicrop.models.instructblip"},
    "qwen2_5": {"id": "Qwen/Qwen2.5-VL-3B-Instruct", "module": "vicrop.models.qwen2_5_vl"},
    "llava_13b": {"id": "llava-hf/llava-1.5-13b-hf", "module": "vicrop.models.llava"},
    "vipllava": {"id": "llava-hf/vip-llava-7b-hf", "module": "vicrop.models.squares"},
    "qwen2_5_7b": {"id": "Qwen/Qwen2.5-VL-7B-Instruct", "module": "vicrop.models.qwen2_5_vl"},
    "qwen2_vl": {"id": "Qwen/Qwen2-VL-7B-Instruct", "module": "vicrop.models.merged_patches"},
    "qwen3_vl": {"id": "Qwen/Qwen3-VL-8B-Instruct", "module": "vicrop.models.merged_patches"},
    "qwen3_vl_2b": {"id": "Qwen/Qwen3-VL-2B-Instruct", "module": "vicrop.models.merged_patches"},
    "qwen3_vl_4b": {"id": "Qwen/Qwen3-VL-4B-Instruct", "module": "vicrop.models.merged_patches"},
    "internvl3": {"id": "OpenGVLab/InternVL3-8B-hf", "module": "vicrop.models.tiled"},
    "internvl3_2b": {"id": "OpenGVLab/InternVL3-2B-hf", "module": "vicrop.models.tiled"},
    "llava_onevision": {
        "id": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "module": "vicrop.models.llava_onevision",
    },
    "gemma3": {"id": "google/gemma-3-4b-it", "module": "vicrop.models.squares"},
    "smolvlm": {"id": "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "module": "vicrop.models.idefics3"},
    "idefics3": {"id": "HuggingFaceM4/Idefics3-8B-Llama3", "module": "vicrop.models.idefics3"},
    "pixtral": {"id": "mistral-community/pixtral-12b", "module": "vicrop.models.pixtral"},
    "glm4v": {"id": "zai-org/GLM-4.1V-9B-Thinking", "module": "vicrop.models.merged_patches"},
    "paligemma2": {"id": "google/paligemma2-3b-mix-448", "module": "vicrop.models.paligemma"},
    "aya_vision": {"id": "CohereLabs/aya-vision-8b", "module": "vicrop.models.tiled"},
    "llava_tiny": {"id": "vicrop/embedded/llava", "module": "vicrop.models.llava", "loc_heads": "L2H6,L2H1,L2H2"},
    "blip_tiny": {"id": "vicrop/embedded/blip", "module": "vicrop.models.instructblip", "loc_heads": "L4H4,L2H3,L4H5"},
    "qwen2_5_tiny": {
        "id": "vicrop/embedded/qwen2_5",
        "module": "vicrop.models.qwen2_5_vl",
        "loc_heads": "L2H4,L2H2,L2H7",
    },
    "llava_streets": {
        "id": "vicrop/embedded/streets/llava",
        "module": "vicrop.models.llava",
        "loc_heads": "L3H0,L2H4,L2H2",
    },
    "blip_streets": {
        "id": "vicrop/embedded/streets/blip",
        "module": "vicrop.models.instructblip",
        "loc_heads": "L3H7,L2H2,L3H0",
    },
    "qwen2_5_streets": {
        "id": "vicrop/embedded/streets/qwen2_5",
        "module": "vicrop.models.qwen2_5_vl",
        "loc_heads": "L3H5,L2H2,L3H4",
    },
}

# What others call a checkpoint that the hub has, converted, under another name.
ALIASES = {
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
}

# task -> its metrics: name -> a grader of evaluation/metrics.py.
METRICS = {
    "demo": {"exact": "exact"},
    "textvqa": {"paper": "vqa_paper", "official": "textvqa"},
    "docvqa": {"paper": "docvqa_paper", "official": "anls"},
    "gqa": {"paper": "gqa_paper", "official": "gqa"},
    "aokvqa": {"paper": "vqa_paper", "official": "aokvqa_direct", "official choice": "aokvqa_choice"},
    "pope": {"paper": "pope_paper", "official": "pope"},
    "vstar": {"paper": "vstar_paper", "official": "vstar"},
    "vqav2": {"paper": "vqa_paper", "official": "vqav2"},
    "hrbench_4k": {"official": "hrbench"},
    "hrbench_8k": {"official": "hrbench"},
    "mme_realworld": {"official": "mme_realworld"},
    "mme_realworld_lite": {"official": "mme_realworld"},
    "infovqa": {"official": "anls"},
    "chartqa": {"official": "chartqa"},
    "refcoco": {"box_point": "box_point", "box_inside": "box_inside", "box_iou": "box_iou"},
    "refcoco_plus": {"box_point": "box_point", "box_inside": "box_inside", "box_iou": "box_iou"},
    "refcocog": {"box_point": "box_point", "box_inside": "box_inside", "box_iou": "box_iou"},
}

# name -> the questions (see data/README.md), the folder of their images, and metrics.
TASKS: dict[str, dict[str, Any]] = {
    name: {"question_path": f"data/{name}/data.json", "image_path": f"data/{name}/images", "metrics": metrics}
    for name, metrics in METRICS.items()
}

# How large an object is: name -> below this part of the image (the ViCrop paper's analysis of TextVQA, section 3).
SIZES = {"small": 0.005, "medium": 0.05, "large": float("inf")}


def size_class(share: float) -> str:
    """small, medium or large: how large a thing is that covers this part of its image, 0 to 1."""
    return next(name for name, limit in SIZES.items() if share < limit)


# name -> the function of the model's module that makes the map ("tiles": of each tile of the image; "zoom": of windows,
# see zoom.py), the function of baselines.py that chooses the boxes without a map, or which of CROPPERS do (see
# croppers.py).
METHODS: dict[str, dict[str, Any]] = {
    "rel_att": {"map": "rel_att", "tiles": False},
    "grad_att": {"map": "grad_att", "tiles": False},
    "pure_grad": {"map": "pure_grad", "tiles": False},
    "rel_att_high": {"map": "rel_att", "tiles": True},
    "grad_att_high": {"map": "grad_att", "tiles": True},
    "pure_grad_high": {"map": "pure_grad", "tiles": True},
    "loc_att": {"map": "loc_att", "tiles": False},
    "loc_att_high": {"map": "loc_att", "tiles": True},
    "question_att": {"map": "question_att", "tiles": False},
    "question_att_high": {"map": "question_att", "tiles": True},
    "rel_att_zoom": {"map": "rel_att", "tiles": False, "zoom": True},
    "grad_att_zoom": {"map": "grad_att", "tiles": False, "zoom": True},
    "pure_grad_zoom": {"map": "pure_grad", "tiles": False, "zoom": True},
    "loc_att_zoom": {"map": "loc_att", "tiles": False, "zoom": True},
    "question_att_zoom": {"map": "question_att", "tiles": False, "zoom": True},
    "gt_crop": {"boxes": "gt_crops"},
    "center_crop": {"boxes": "center_crops"},
    "random_crop": {"boxes": "random_crops"},
    "grid_crops": {"boxes": "grid_crops"},
    "clip_crop": {"models": ("clip",)},
    "detector_crop": {"models": ("detector", "clip")},
    "sam_crop": {"models": ("sam", "clip")},
}

# The models of external croppers: option -> its checkpoint where nothing is said, hub id or folder.
CROPPERS = {
    "clip": "openai/clip-vit-base-patch32",
    "detector": "PekingU/rtdetr_r50vd",
    "sam": "facebook/sam-vit-huge",
}

# Of floating numbers; auto: bfloat16 on CUDA, float32 elsewhere.
DTYPES = ("auto", "float32", "bfloat16", "float16")

# How answers are decoded, always greedily: by the logits alone, or by the rules of the checkpoint's generation config
# (repetition penalty, tokens that are forbidden or forced, ...).
GENERATION = ("greedy", "checkpoint")

MAX_NEW_TOKENS = 20  # of an answer, where nothing is said

VIEWS = 8  # that a `_zoom` method may take of an image, where nothing is said

REGION_SHARE = 0.5  # of the first window's sum that a further region's must have, where nothing is said

PER_SAMPLE = "per_sample"  # in place of localization heads: the best ones of each image

# What can be told to a model's adapter, as arguments of argparse; an adapter that has no such option refuses it.
OPTIONS: dict[str, dict[str, Any]] = {
    "geometry": {
        "choices": ("exact", "upstream"),
        "help": "which pixels the map covers: those that the model saw (exact), or as published (upstream); "
        "default: exact",
    },
    "image_fit": {
        "choices": ("processor", "pad"),
        "help": "LLaVA-1.5: what it is shown of an image: what its processor cuts out (processor), or all of it, "
        "padded to a square (pad); default: processor",
    },
    "min_pixels": {
        "type": int,
        "help": "Qwen-VL: images are scaled up to so many pixels; default: as the processor does",
    },
    "max_pixels": {
        "type": int,
        "help": "Qwen-VL: images are scaled down to so many pixels; default: as the processor "
        "does, for Qwen2.5-VL at most 200704",
    },
    "qformer_layer": {
        "type": int,
        "help": "InstructBLIP: Q-Former layer to read, counting from 0 those with cross-attention; default: the "
        "checkpoint's own, else 2",
    },
}


def checkpoint_of(name: str) -> str:
    """Hub id or folder of a checkpoint that is named as in MODELS, as in ALIASES, or so already."""
    return MODELS[name]["id"] if name in MODELS else ALIASES.get(name, name)


def known(name: str, table: Collection[str], what: str) -> str:
    """The name, if the table has it; else a ValueError that lists what it has."""
    if name not in table:
        raise ValueError(unknown(name, table, what))
    return name


def unknown(name: str, table: Collection[str], what: str, all_are: str | None = None) -> str:
    """The sentence about a name that a table does not have: which of those that it has is nearest, and what they are.

    Args:
        all_are: says where many names are listed, in place of their list.
    """
    near = [f"did you mean {each}?" for each in get_close_matches(name.lower(), table, n=1)]
    choices = all_are or f"{'Choose' if near else 'choose'} from {', '.join(table)}"
    return f"unknown {what} {name!r}: {' '.join([*near, choices])}"
