"""ViCrop on one question or a batch of them: look, find the box, crop, answer again (arXiv 2502.17422, section 4).

`vicrop_qa` is for notebooks; run.py takes a `Case` through a whole dataset.
"""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import utils
from checkpoints import default_device as default_device  # these are what others import from here
from checkpoints import default_dtype as default_dtype
from checkpoints import load_model as load_model
from checkpoints import local_or_hub, look_class, model_module
from checkpoints import weights_of as weights_of
from dataset import refuse_other_size
from files import read_json
from info import GENERAL_PROMPT, METHODS, MODELS, checkpoint_of, known
from localization.analyze import parse_heads
from maps import MapFunction

PER_SAMPLE = "per_sample"


@dataclass
class Finding:
    """What a method found: both answers, the crop's box (xyxy pixels), and its map with the region that it covers.

    `fields` are what the model's records carry besides.
    """

    original_answer: str
    crop_answer: str
    bbox: tuple
    att_map: np.ndarray | None
    region: tuple
    fields: dict = field(default_factory=dict)


class Case:
    """Questions about the images of a look, asked together; the original answers and all methods share the look.

    Args:
        look: a look.Look.
        questions: asked with the model's template.
        of: for each the number of its image.
        short_questions: for each None, or what is asked in its place for the map only (V*).
        records: their data records, for boxes that come from them (gt_crop, random_crop).
    Raises:
        ValueError: a question is empty, or a record says that its image has another size than it has.
    """

    def __init__(self, look, questions, of=(0,), short_questions=(None,), records=({},)):
        for question in questions:
            if not question or not question.strip():
                raise ValueError("the question is empty")
        self.look, self.of, self.records = look, list(of), records
        for record, number in zip(records, self.of, strict=False):  # notebooks' questions have none
            refuse_other_size(record, look.images[number].size)
        self.prompts, self.general = [look.prompt(question) for question in questions], look.prompt(GENERAL_PROMPT)
        self.map_prompts = [
            look.prompt(short) if short else prompt for short, prompt in zip(short_questions, self.prompts, strict=True)
        ]

    def original_answers(self, functions):
        """The answers without a crop; rows that maps of the same prompts will need are read off their first pass."""
        layers = set()
        for method, function in functions.items():
            if getattr(function, "reads_prefill", False) and not METHODS[method]["tiles"]:
                layers.update(function.layers(self.look.model))
        layers = sorted(layers) if self.map_prompts == self.prompts else ()
        return self.look.answer(self.prompts, layers=layers, of=self.of)

    def find(self, method, function):
        """[(box, map or None, region of the map)] of a method, its function as given by `choose`."""
        look, images = self.look, [self.look.images[number] for number in self.of]
        wholes = [(0, 0, *image.size) for image in images]
        if not isinstance(function, MapFunction):
            boxes = [
                function(record, image.size, look.bbox_size) for record, image in zip(self.records, images, strict=True)
            ]
            return [(box, None, whole) for box, whole in zip(boxes, wholes, strict=True)]
        if METHODS[method]["tiles"]:
            maps = [function.of_tiles(look, prompt, self.general, number)
                    for prompt, number in zip(self.map_prompts, self.of, strict=True)]  # fmt: skip
            regions = wholes
        else:
            maps = function.of(look, self.map_prompts, self.general, of=self.of)
            regions = [look.regions[number] for number in self.of]
        return [
            (utils.bbox_in_region(att_map, region, image.size, look.bbox_size), att_map, region)
            for att_map, region, image in zip(maps, regions, images, strict=True)
        ]

    def findings(self, method, function, original_answers):
        """[Finding], one per question."""
        found = self.find(method, function)
        crops = [self.look.images[number].crop(box) for number, (box, *_) in zip(self.of, found, strict=True)]
        answers = self.look.answer(self.prompts, crops=crops, of=self.of)
        fields = self.look.record_fields(self.of, crops)
        return [
            Finding(original, answer, *each, more)
            for original, answer, each, more in zip(original_answers, answers, found, fields, strict=True)
        ]


def choose(module, methods, model, layer=None, heads=None, **options):
    """{method: the module's MapFunction for it, or the function of utils that gives its box without a map}.

    Args:
        layer: for every method that makes a map; heads: for those that read attention heads (see maps.MapFunction).
        options: those of the look.
    Raises:
        ValueError: an unknown method; a model or an option that the module's look cannot have; a layer or a head that
            the model does not have, or a layer for a method that reads none.
    """
    look_class(module).check(model, **options)
    functions = {}
    for method in methods:
        function = map_function(module, method)
        if function:
            functions[method] = function.reading(model, layer, heads if "heads" in function.reads else None)
        else:
            functions[method] = getattr(utils, METHODS[method]["box"])
    if layer is not None and not any(isinstance(function, MapFunction) for function in functions.values()):
        raise ValueError(f"layer={layer!r} has no meaning here: {', '.join(functions)} reads no layer")
    return functions


def map_function(module, method):
    """The MapFunction of a module for a method; None for a method that makes no map."""
    row = METHODS[known(method, METHODS, "method")]
    return getattr(module, row["map"]) if "map" in row else None


def vicrop_qa(model_name, method_name, image_path, question, model, processor, short_question=None, **options):
    """One question about one picture, for notebooks.

    Args:
        model_name, method_name: names of info.MODELS and info.METHODS.
        image_path: path or PIL image.
        question: the bare question; the model's template is put around it.
        model, processor: as loaded by `load_model` or by transformers, in any dtype, with any attention implementation.
        short_question: asked in place of the question for the map only.
        options: `layer=`, `heads=` (as maps.MapFunction takes them; by default those of `heads_of`), and keywords of
            the model's look (`geometry=`, ...).
    Returns:
        (original_answer, crop_answer, bbox): strings and (x1, y1, x2, y2) ints in pixels of the image.
    """
    module, layer = model_module(model_name), options.pop("layer", None)
    heads = options.pop("heads", None) or heads_of(model_name, model.name_or_path)
    functions = choose(module, [method_name], model, layer, heads, **options)
    look = look_class(module)([image_path], model, processor, **options)
    case = Case(look, [question], short_questions=[short_question])
    (found,) = case.findings(method_name, functions[method_name], case.original_answers(functions))
    return found.original_answer, found.crop_answer, found.bbox


# ------------------------------------------------------------------------------------------------------------- models
def heads_of(name, model_id=None, given=None):
    """The localization heads that loc_att reads: [(layer, head)], or None for the best ones of each image.

    Args:
        name, model_id: as for `load_model`.
        given: "L14H24,L14H13", a file that `localization.pipeline stage=batch_analyze` has written, or PER_SAMPLE.
            None: those of info.MODELS, if it is that very checkpoint; another one has other heads.
    """
    row = MODELS[known(name, MODELS, "model")]
    if given is None:
        own = Path(local_or_hub(name)) == Path(local_or_hub(name, model_id))
        given = row.get("loc_heads", PER_SAMPLE) if own else PER_SAMPLE
    if given == PER_SAMPLE:
        return None
    if Path(given).suffix == ".json" or os.path.isfile(given):  # os.path's takes texts that no file name could be
        given = heads_of_file(given, {row["id"], checkpoint_of(str(model_id))})
    return parse_heads(given)


def heads_of_file(path, names):
    """ "L14H24,L14H13" of a file of `batch_analyze`; warns if it is about a checkpoint that is none of these."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path} with localization heads")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("heads"), str):
        raise ValueError(f"{path} is no localization_heads.json of localization.pipeline stage=batch_analyze")
    if checkpoint_of(str(found.get("model"))) not in names:
        warnings.warn(f"{path} has the heads of {found.get('model')}: another model has other heads", stacklevel=3)
    return found["heads"]
