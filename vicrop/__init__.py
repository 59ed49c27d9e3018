"""ViCrop and localization heads: multimodal LLMs that see small details, without training.

from vicrop import load_model, vicrop_qa
model, processor = load_model("llava_tiny")
original, with_crop, box = vicrop_qa("llava_tiny", "rel_att", "photo.jpg", "what does it say?", model, processor)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vicrop.version import __version__

if TYPE_CHECKING:
    from vicrop.checkpoints import load_model, model_module
    from vicrop.choices import Regions
    from vicrop.crop import CropResult, QuestionBatch, adapter_of, build_methods, vicrop_qa
    from vicrop.known_heads import heads_of
    from vicrop.session import ImageSession

__all__ = [
    "CropResult",
    "ImageSession",
    "QuestionBatch",
    "Regions",
    "__version__",
    "adapter_of",
    "build_methods",
    "heads_of",
    "load_model",
    "model_module",
    "vicrop_qa",
]

_HOMES = {
    "CropResult": "vicrop.crop",
    "ImageSession": "vicrop.session",
    "QuestionBatch": "vicrop.crop",
    "Regions": "vicrop.choices",
    "adapter_of": "vicrop.crop",
    "build_methods": "vicrop.crop",
    "heads_of": "vicrop.known_heads",
    "load_model": "vicrop.checkpoints",
    "model_module": "vicrop.checkpoints",
    "vicrop_qa": "vicrop.crop",
}


def __getattr__(name: str) -> Any:
    """What is imported from here is looked up when it is asked for: a command that needs no torch does not load it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
