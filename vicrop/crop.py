"""ViCrop on one question or a batch of them: look, find the box, crop, answer again (arXiv 2502.17422, section 4).

`vicrop_qa` is for notebooks; run.py takes a `QuestionBatch` through a whole dataset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from vicrop import baselines
from vicrop.adapter import Adapter
from vicrop.attribution import answers_with_gradients
from vicrop.checkpoints import load_model as load_model  # notebooks import it from here
from vicrop.checkpoints import model_module
from vicrop.choices import ONE_REGION, Regions, wants_crop
from vicrop.croppers import ExternalCrop
from vicrop.dataset import refuse_other_size
from vicrop.decoding import Answer
from vicrop.images import ImageSource
from vicrop.known_heads import heads_of
from vicrop.layouts import Region, whole
from vicrop.methods import CropBaseline, Found, Method, Questions
from vicrop.session import ImageSession
from vicrop.tables import CROPPERS, GENERAL_PROMPT, MAX_NEW_TOKENS, METHODS, REGION_SHARE, VIEWS, known
from vicrop.zoom import ZoomMethod

Places = tuple[int, tuple[Region, ...]]  # the number of a question, and the boxes that it is asked with


@dataclass
class CropResult:
    """What a method found: both answers, the crops' boxes (xyxy pixels), and its map with the region that it covers.

    Attributes:
        bboxes: empty where no crop was made, as the model was sure enough: then the answers are one, and there is no
            map.
        confidence: {"original", "crop"}: the probabilities of both answers.
        listed: do records list all boxes, as where there may be several? If not, the only one is `bbox`.
        views: how many views of the image the map took, where that is not one.
        fields: what the model's records carry besides.
    """

    original_answer: str
    crop_answer: str
    bboxes: tuple[Region, ...]
    att_map: np.ndarray | None
    region: Region
    confidence: dict[str, float]
    listed: bool = False
    views: int | None = None
    fields: dict = field(default_factory=dict)

    @property
    def bbox(self) -> Region | None:
        """The first box; None where no crop was made."""
        return next(iter(self.bboxes), None)

    @property
    def gated(self) -> bool:
        """Was the model sure enough for no crop to be made?"""
        return not self.bboxes

    @property
    def outputs(self) -> dict[str, Any]:
        """The fields that this adds to a record."""
        fields = {"original_answer": self.original_answer, "crop_answer": self.crop_answer,
                  "bbox": None if self.bbox is None else list(self.bbox), "confidence": self.confidence}  # fmt: skip
        fields |= {"bboxes": [list(box) for box in self.bboxes]} if self.listed else {}
        fields |= {"gated": True} if self.gated else {}
        return fields | ({} if self.views is None else {"views": self.views}) | self.fields


def for_each(questions: Sequence[str], given: Sequence[Any] | None, name: str, default: Any) -> list[Any]:
    """What was given for each question, or the default for all; a ValueError if their numbers differ."""
    if given is None:
        return [default] * len(questions)
    if len(given) != len(questions):
        raise ValueError(f"{name} must be one for each question: {len(questions)} are asked, and it has {len(given)}")
    return list(given)


class QuestionBatch:
    """Questions about the images of a session, asked together; the original answers and all methods share the session.

    Args:
        session: a session.ImageSession.
        questions: asked with the model's template.
        of: for each the number of its image.
        short_questions: for each None, or what is asked in its place for the map only (V*).
        records: their data records, for boxes that come from them (gt_crop, random_crop).
        crop_below: a crop is made only where the first answer is less probable than this (see choices.wants_crop).
        By default all questions are about the first image, and there are no short ones and no records.
    Raises:
        ValueError: a question is empty; `of`, `short_questions` or `records` are not one for each question; a record
            says that its image has another size than it has.
    Example:
        batch = QuestionBatch(session, ["what does the sign say?", "is there a car?"])
        originals = batch.original_answers({"rel_att": method})
        batch.results(method, originals)  # [CropResult], the paper's section 5 for each question
    """

    def __init__(self, session: ImageSession, questions: Sequence[str], of: Sequence[int] | None = None,
                 short_questions: Sequence[str | None] | None = None, records: Sequence[dict] | None = None,
                 crop_below: float | None = None):  # fmt: skip
        for question in questions:
            if not question or not question.strip():
                raise ValueError("the question is empty")
        of = for_each(questions, of, "of", 0)
        short_questions = for_each(questions, short_questions, "short_questions", None)
        records = for_each(questions, records, "records", {})
        ask = session.adapter.prompt
        self.session, self.of, self.records, self.crop_below = session, of, records, crop_below
        self.with_crops: dict[Places, Answer] = {}  # what was answered with crops, for methods that agree
        for record, number in zip(records, of, strict=True):
            refuse_other_size(record, session.images[number].size)
        self.prompts, self.general = [ask(question) for question in questions], ask(GENERAL_PROMPT)
        self.map_prompts = [ask(short) if short else prompt
                            for short, prompt in zip(short_questions, self.prompts, strict=True)]  # fmt: skip
        self.bare = [short or question for short, question in zip(short_questions, questions, strict=True)]

    def original_answers(self, methods: Mapping[str, Method]) -> list[Answer]:
        """The answers without a crop; rows that maps of the same prompts will need are read off their first pass."""
        model, layers, gradient = self.session.model, set(), []
        if self.map_prompts == self.prompts:
            layers.update(*(method.prefill_layers(model) for method in methods.values()))
            gradient = [each for each in (method.gradient_layers(model) for method in methods.values()) if each]
        # Not where a gate may let a question go: its gradients would have been for nothing.
        if gradient and layers <= {*gradient[0]} and wants_crop(1.0, self.crop_below):
            return answers_with_gradients(self.session, self.prompts, gradient[0], self.of)
        return self.session.answers(self.prompts, layers=sorted(layers), of=self.of)

    def find(self, method: Method, numbers: Sequence[int] | None = None, answers: Sequence[Answer] = ()) -> list[Found]:
        """[methods.Found] of a method that is bound to the session's model, for some questions (default: all).

        Args:
            answers: of all questions, if they have been asked.
        """
        asked = range(len(self.prompts)) if numbers is None else numbers
        prompts, of = [self.map_prompts[number] for number in asked], [self.of[number] for number in asked]
        records = [self.records[number] for number in asked]
        bare = [self.bare[number] for number in asked]
        known = answers and self.map_prompts == self.prompts
        sure = [answers[number].confidence for number in asked] if known else []
        return method.find(Questions(self.session, prompts, self.general, of, records, bare, sure))

    def results(self, method: Method, original_answers: Sequence[Answer]) -> list[CropResult]:
        """What a method found for each question, and the answers with its crops.

        Questions whose answers are sure enough take no part: neither is a map made of them, nor are they asked again.
        """
        images = [self.session.images[number] for number in self.of]
        listed = method.regions.most > 1
        results = [CropResult(text, text, (), None, whole(image.size), {"original": sure, "crop": sure}, listed)
                   for (text, sure, _), image in zip(original_answers, images, strict=True)]  # fmt: skip
        asked = [number for number, answer in enumerate(original_answers)
                 if wants_crop(answer.confidence, self.crop_below)]  # fmt: skip
        found = self.find(method, asked, original_answers) if asked else []
        crops = {(number, each.bboxes): [images[number].crop(box) for box in each.bboxes]
                 for number, each in zip(asked, found, strict=True)}  # fmt: skip
        self._answer_with(crops, original_answers)
        for number, (boxes, att_map, region, views) in zip(asked, found, strict=True):
            original, answer = original_answers[number], self.with_crops[number, boxes]
            fields = self.session.adapter.record_fields(self.session.layouts[self.of[number]], crops[number, boxes])
            sure = {"original": original.confidence, "crop": answer.confidence}
            answers = original.text, answer.text
            results[number] = CropResult(*answers, boxes, att_map, region, sure, listed, views, fields)
        return results

    def _answer_with(self, crops: Mapping[Places, Sequence[Image.Image]], drafts: Sequence[Answer]) -> None:
        """Answer questions with crops that were not among those before; the original answers are drafts of theirs."""
        new = [places for places in crops if places not in self.with_crops]
        if not new:
            return
        prompts, of, tokens = zip(*((self.prompts[n], self.of[n], drafts[n].tokens) for n, _ in new), strict=True)
        shown = [crops[places] for places in new]
        answers = self.session.answers(list(prompts), crops=shown, of=of, drafts=tokens)
        self.with_crops |= dict(zip(new, answers, strict=True))


def build_methods(module: ModuleType, methods: Sequence[str], model: PreTrainedModel, layer: Any = None,
                  heads: Any = None, views: int = VIEWS, regions: Regions = ONE_REGION,
                  croppers: Mapping[str, str] = CROPPERS,
                  **options: Any) -> dict[str, Method]:  # fmt: skip
    """{name: the Method, bound to a model}.

    Args:
        layer: for every method that makes a map; heads: for those that read attention heads (see methods.MapMethod).
        views: how many views of an image a `_zoom` method may take; regions: how many boxes each method may choose.
        croppers: the checkpoints of external croppers, as in tables.CROPPERS.
        options: those of the model's adapter.
    Raises:
        ValueError: an unknown method; a model or an option that the adapter cannot have; a layer or a head that the
            model does not have, or a layer for a method that reads none.
    """
    module.ADAPTER.check(model, **options)
    found = {name: method_of(module, name, views, croppers).with_regions(regions) for name in methods}
    if layer is not None and not any(method.makes_map for method in found.values()):
        raise ValueError(f"layer={layer!r} has no meaning here: {', '.join(found)} reads no layer")
    return {name: method.bind(model, layer if method.makes_map else None, heads if "heads" in method.reads else None)
            for name, method in found.items()}  # fmt: skip


def method_of(module: ModuleType, name: str, views: int = VIEWS, models: Mapping[str, str] = CROPPERS) -> Method:
    """The Method of a family's module under a name of info.METHODS; a `_zoom` one takes up to so many views.

    Args:
        models: of external croppers, as in tables.CROPPERS; nothing of them is loaded yet.
    """
    row = METHODS[known(name, METHODS, "method")]
    if "models" in row:
        return ExternalCrop(name, {each: models[each] for each in row["models"]})
    if "boxes" in row:
        return CropBaseline(getattr(baselines, row["boxes"]))
    method = getattr(module, row["map"])
    if row.get("zoom"):
        return ZoomMethod(method, views)
    return method.tiled() if row["tiles"] else method


def vicrop_qa(model_name: str, method_name: str, image_path: ImageSource, question: str, model: PreTrainedModel,
              processor: Any, short_question: str | None = None,
              **options: Any) -> tuple[str, str, Region | None]:  # fmt: skip
    """One question about one picture, for notebooks.

    Args:
        model_name, method_name: names of info.MODELS and info.METHODS.
        image_path: path or PIL image.
        question: the bare question; the model's template is put around it.
        model, processor: as loaded by `load_model` or by transformers, in any dtype, with any attention implementation.
        short_question: asked in place of the question for the map only.
        options: `layer=`, `heads=` (as methods.MapMethod takes them; by default those of `heads_of`), `crop_below=`
            (see QuestionBatch), `views=` of a `_zoom` method, `regions=` and `region_share=` (see choices.Regions),
            `croppers=` (checkpoints, by the names of tables.CROPPERS), `max_new_tokens=` of an answer, and options of
            the model's adapter (`prompt=`, `geometry=`, ...).
    Returns:
        (original_answer, crop_answer, bbox): strings and (x1, y1, x2, y2) ints in pixels of the image, of several crops
        the first one's; the box is None where `crop_below` let no crop be made.
    """
    module, layer = model_module(model_name), options.pop("layer", None)
    crop_below, views = options.pop("crop_below", None), options.pop("views", VIEWS)
    regions = Regions(options.pop("regions", 1), options.pop("region_share", REGION_SHARE))
    most, models = options.pop("max_new_tokens", MAX_NEW_TOKENS), CROPPERS | options.pop("croppers", {})
    heads = options.pop("heads", None) or heads_of(model_name, model.name_or_path)
    methods = build_methods(module, [method_name], model, layer, heads, views, regions, models, **options)
    session = ImageSession([image_path], model, processor, most, **options)
    batch = QuestionBatch(session, [question], short_questions=[short_question], crop_below=crop_below)
    (found,) = batch.results(methods[method_name], batch.original_answers(methods))
    return found.original_answer, found.crop_answer, found.bbox


# ------------------------------------------------------------------------------------------------------------- models
def adapter_of(name: str, model_id: str | None = None, revision: str | None = None) -> type[Adapter]:
    """The Adapter class of a name of info.MODELS, a hub id or a folder (see checkpoints.model_module)."""
    return model_module(name, model_id, revision).ADAPTER
