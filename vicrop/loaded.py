"""A loaded model with what it is asked with: its processor, the methods bound to it, the options of its adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from vicrop.checkpoints import load_model, model_module
from vicrop.choices import MethodChoice, ModelChoice
from vicrop.crop import build_methods
from vicrop.methods import Method
from vicrop.session import ImageSession


@dataclass(frozen=True)
class LoadedModel:
    """What a ModelChoice became."""

    model: PreTrainedModel
    processor: Any
    methods: Mapping[str, Method]  # by name, bound to the model
    options: Mapping[str, Any]  # of the adapter
    max_new_tokens: int  # of an answer

    def session(self, images: Sequence[Any], **options: Any) -> ImageSession:
        """A fresh session of some images (PIL, or paths); `options` of the adapter go before those chosen."""
        return ImageSession(images, self.model, self.processor, self.max_new_tokens, **{**self.options, **options})


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a name of tables.DTYPES; None for auto."""
    return None if name == "auto" else getattr(torch, name)


def load_chosen(choice: ModelChoice, how: MethodChoice, device: torch.device | None = None) -> LoadedModel:
    """The LoadedModel of a ModelChoice, with the methods of a MethodChoice bound to it.

        loaded = load_chosen(ModelChoice("llava_tiny"), MethodChoice(("rel_att",)))

    Args:
        device: of this process, where the choice names none.
    Raises:
        ValueError, OSError: as checkpoints.load_model and crop.build_methods raise them.
    """
    where = choice.device or device, torch_dtype(choice.dtype), choice.device_map
    model, processor = load_model(choice.name, choice.model_id, *where, choice.revision)
    module = model_module(*choice.checkpoint)
    reading = how.layer, how.heads, how.views, how.regions, how.croppers
    methods = build_methods(module, how.names, model, *reading, **choice.options)
    return LoadedModel(model, processor, methods, choice.options, choice.max_new_tokens)
