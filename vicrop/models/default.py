"""Models of no family that is known here: their chat template, their processor's own words, a layout that is measured.

Nobody has tried such a checkpoint before: it is compared with the stock model when it is first used (see guard.py), and
refused if anything differs. What differs can often be put right in a module like llava.py.
"""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AutoModelForImageTextToText, PreTrainedModel

from vicrop import guard, processors
from vicrop.adapter import INSTRUCTION, REGISTRY
from vicrop.checkpoints import weights_of
from vicrop.methods import family_methods
from vicrop.models.measured import MeasuredAdapter

PROMPT, ATT_LAYER = INSTRUCTION, "mean"
MODEL_CLASS = AutoModelForImageTextToText
_WEIGHTS: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # processor -> what tells its checkpoint from others


def load_processor(source: str | Path, **where: Any) -> Any:
    """The processor of a checkpoint, once its twin has been compared with the stock model."""
    processor = processors.load_any(source, **where)
    weights = weights_of(str(source), None, where.get("revision"), where.get("cache_dir"))
    guard.admit_source(source, processor, weights, **where)
    _WEIGHTS[processor] = weights
    return processor


def prepare(model: PreTrainedModel, processor: Any) -> None:
    """The tokenizer fits the model, and the loaded model gives what the stock one gives."""
    processors.prepare_chat(model, processor)
    guard.admit_model(model, processor, _WEIGHTS.get(processor))


class DefaultAdapter(MeasuredAdapter):
    """A model of no known family, once it has been compared with the stock model."""

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        super().check(model, **options)
        if not getattr(model, guard.ADMITTED, False):
            raise ValueError(f"no adapter knows {model.config.model_type} models: load it by load_model of vicrop, "
                             f"which compares it with the stock model; known are {', '.join(REGISTRY)}")  # fmt: skip


ADAPTER = DefaultAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("default")
