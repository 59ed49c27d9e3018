"""ViCrop on one question or a batch of them: look, find the box, crop, answer again (arXiv 2502.17422, section 4).

`vicrop_qa` is for notebooks; run.py takes a `QuestionBatch` through a whole dataset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from vicrop import boxes
from vicrop.adapter import Adapter
from vicrop.checkpoints import load_model as load_model  # notebooks import it from here
from vicrop.checkpoints import model_module
from vicrop.dataset import refuse_other_size
from vicrop.images import ImageSource
from vicrop.known_heads import heads_of
from vicrop.layouts import Region
from vicrop.methods import CropBaseline, Found, Method, Questions
from vicrop.session import ImageSession
from vicrop.tables import GENERAL_PROMPT, METHODS, known


@dataclass
class CropResult:
    """What a method found: both answers, the crop's box (xyxy pixels), and its map with the region that it covers.

    `fields` are what the model's records carry besides.
    """

    original_answer: str
    crop_answer: str
    bbox: Region
    att_map: np.ndarray | None
    region: Region
    fields: dict = field(default_factory=dict)


class QuestionBatch:
    """Questions about the images of a session, asked together; the original answers and all methods share the session.

    Args:
        session: a session.ImageSession.
        questions: asked with the model's template.
        of: for each the number of its image.
        short_questions: for each None, or what is asked in its place for the map only (V*).
        records: their data records, for boxes that come from them (gt_crop, random_crop).
    Raises:
        ValueError: a question is empty, or a record says that its image has another size than it has.
    """

    def __init__(self, session: ImageSession, questions: Sequence[str], of: Sequence[int] = (0,),
                 short_questions: Sequence[str | None] = (None,), records: Sequence[dict] = ({},)):  # fmt: skip
        for question in questions:
            if not question or not question.strip():
                raise ValueError("the question is empty")
        ask = session.adapter.prompt
        self.session, self.of, self.records = session, list(of), records
        for record, number in zip(records, self.of, strict=False):  # notebooks' questions have none
            refuse_other_size(record, session.images[number].size)
        self.prompts, self.general = [ask(question) for question in questions], ask(GENERAL_PROMPT)
        self.map_prompts = [ask(short) if short else prompt
                            for short, prompt in zip(short_questions, self.prompts, strict=True)]  # fmt: skip

    def original_answers(self, methods: Mapping[str, Method]) -> list[str]:
        """The answers without a crop; rows that maps of the same prompts will need are read off their first pass."""
        layers = set()
        if self.map_prompts == self.prompts:
            layers.update(*(method.prefill_layers(self.session.model) for method in methods.values()))
        return self.session.answer(self.prompts, layers=sorted(layers), of=self.of)

    def find(self, method: Method) -> list[Found]:
        """[methods.Found] of a method that is bound to the session's model."""
        return method.find(Questions(self.session, self.map_prompts, self.general, self.of, self.records))

    def results(self, method: Method, original_answers: Sequence[str]) -> list[CropResult]:
        """What a method found for each question, and the answers with its crops."""
        found, session = self.find(method), self.session
        crops = [session.images[number].crop(each.bbox) for number, each in zip(self.of, found, strict=True)]
        answers = session.answer(self.prompts, crops=crops, of=self.of)
        fields = [session.adapter.record_fields(session.layouts[number], crop)
                  for number, crop in zip(self.of, crops, strict=True)]  # fmt: skip
        return [CropResult(original, answer, *each, more) for original, answer, each, more
                in zip(original_answers, answers, found, fields, strict=True)]  # fmt: skip


def build_methods(module: ModuleType, methods: Sequence[str], model: PreTrainedModel, layer: Any = None,
                  heads: Any = None, **options: Any) -> dict[str, Method]:  # fmt: skip
    """{name: the Method, bound to a model}.

    Args:
        layer: for every method that makes a map; heads: for those that read attention heads (see methods.MapMethod).
        options: those of the model's adapter.
    Raises:
        ValueError: an unknown method; a model or an option that the adapter cannot have; a layer or a head that the
            model does not have, or a layer for a method that reads none.
    """
    module.ADAPTER.check(model, **options)
    found = {name: method_of(module, name) for name in methods}
    if layer is not None and not any(method.makes_map for method in found.values()):
        raise ValueError(f"layer={layer!r} has no meaning here: {', '.join(found)} reads no layer")
    return {name: method.bind(model, layer if method.makes_map else None, heads if "heads" in method.reads else None)
            for name, method in found.items()}  # fmt: skip


def method_of(module: ModuleType, name: str) -> Method:
    """The Method of a family's module under a name of info.METHODS."""
    row = METHODS[known(name, METHODS, "method")]
    if "box" in row:
        return CropBaseline(getattr(boxes, row["box"]))
    method = getattr(module, row["map"])
    return method.tiled() if row["tiles"] else method


def vicrop_qa(model_name: str, method_name: str, image_path: ImageSource, question: str, model: PreTrainedModel,
              processor: Any, short_question: str | None = None,
              **options: Any) -> tuple[str, str, Region]:  # fmt: skip
    """One question about one picture, for notebooks.

    Args:
        model_name, method_name: names of info.MODELS and info.METHODS.
        image_path: path or PIL image.
        question: the bare question; the model's template is put around it.
        model, processor: as loaded by `load_model` or by transformers, in any dtype, with any attention implementation.
        short_question: asked in place of the question for the map only.
        options: `layer=`, `heads=` (as methods.MapMethod takes them; by default those of `heads_of`), and options of
            the model's adapter (`geometry=`, ...).
    Returns:
        (original_answer, crop_answer, bbox): strings and (x1, y1, x2, y2) ints in pixels of the image.
    """
    module, layer = model_module(model_name), options.pop("layer", None)
    heads = options.pop("heads", None) or heads_of(model_name, model.name_or_path)
    methods = build_methods(module, [method_name], model, layer, heads, **options)
    session = ImageSession([image_path], model, processor, **options)
    batch = QuestionBatch(session, [question], short_questions=[short_question])
    (found,) = batch.results(methods[method_name], batch.original_answers(methods))
    return found.original_answer, found.crop_answer, found.bbox


# ------------------------------------------------------------------------------------------------------------- models
def adapter_of(name: str) -> type[Adapter]:
    """The Adapter class of a name of info.MODELS."""
    return model_module(name).ADAPTER
