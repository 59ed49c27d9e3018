"""What the app does, without a browser: one model in memory, a question about a picture, a phrase in it.

models = OneModel()
seen = look(models, "llava_tiny", "rel_att", "photo.jpg", "what number is on the red sign?")
"""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from vicrop.attribution import attention
from vicrop.checkpoints import model_module
from vicrop.choices import MethodChoice, ModelChoice, Regions
from vicrop.crop import QuestionBatch, adapter_of, build_methods
from vicrop.files import PACKAGE
from vicrop.heads import head_name
from vicrop.images import load_image
from vicrop.known_heads import heads_of
from vicrop.layouts import Region
from vicrop.loaded import LoadedModel, load_chosen
from vicrop.localization.config import Logic, Model
from vicrop.localization.grounding import Grounding, ground
from vicrop.localization.viz import SHOWN_HEADS, masked
from vicrop.plots import heat_over
from vicrop.session import layer_numbers
from vicrop.tables import METHODS, REGION_SHARE, checkpoint_of

# Of METHODS those that need nothing but a picture and a question.
OFFERED = [name for name, row in METHODS.items() if "map" in row or name in ("center_crop", "grid_crops")]
LONGEST = 1000  # letters of a question
SHOWN_SIDE = 1400  # pixels of the longer side of a drawing, at most
CROP_SIDE = 480  # and of a crop, at least


class OneModel:
    """The model that was asked last; asking another one frees it first. One thread at a time.

    Args:
        device: a torch device; None: the first GPU, else the CPU. dtype: a name of tables.DTYPES.
    """

    def __init__(self, device: str | None = None, dtype: str = "auto"):
        self.device, self.dtype = device, dtype
        self.name: str | None = None
        self._loaded: LoadedModel | None = None
        self._turn = threading.Lock()

    @contextmanager
    def held(self, name: str) -> Iterator[LoadedModel]:
        """The LoadedModel of a name of tables.MODELS, without methods; nobody else asks it within."""
        with self._turn:
            if self._loaded is None or self.name != name:
                self.free()
                own = adapter_of(name).options
                choice = ModelChoice(name, dtype=self.dtype, device=self.device, options=dict(own))
                self._loaded, self.name = load_chosen(choice, MethodChoice(())), name
            yield self._loaded

    def free(self) -> None:
        """Forget the model, and give its memory back."""
        self._loaded = self.name = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Seen:
    """What a question about a picture gave."""

    picture: Image.Image  # with the map and the boxes
    crops: list[Image.Image]  # of each box one; none where the first answer was sure enough
    original_answer: str
    crop_answer: str
    confidence: dict[str, float]  # {"original", "crop"}: how probable the model found each answer
    bboxes: tuple[Region, ...]  # xyxy pixels of the picture
    seconds: float  # of both answers and the map, without loading the model


def text_of(text: str | None, what: str) -> str:
    """A question or phrase as typed; a ValueError if there is none, or if it is too long."""
    text = (text or "").strip()
    if not text or len(text) > LONGEST:
        raise ValueError(f"{what} must have 1 to {LONGEST} letters, got {len(text)}")
    return text


def picture_at(path: str | None) -> Image.Image:
    """The picture in a file; a ValueError or OSError says why there is none."""
    if not path:
        raise ValueError("choose a picture first")
    return load_image(path)


def look(models: OneModel, name: str, method: str, path: str | None, question: str | None,
         crop_below: float = 1.0, regions: int = 1, region_share: float = REGION_SHARE) -> Seen:  # fmt: skip
    """Ask a model about the picture at a path, without and with the crops that a method chooses.

    Args:
        crop_below: no crop is made where the first answer is at least as probable as this; 1: one always is.
        regions, region_share: how many crops (see choices.Regions).
    Raises:
        ValueError, OSError: no picture, or none that can be read; no question; a model that cannot be loaded.
    """
    question, image = text_of(question, "the question"), picture_at(path)
    with models.held(name) as bare:
        heads = heads_of(name)
        how = Regions(regions, region_share)
        methods = build_methods(model_module(name), [method], bare.model, heads=heads, regions=how, **bare.options)
        loaded, begun = replace(bare, methods=methods), time.perf_counter()
        batch = QuestionBatch(loaded.session([image]), [question], crop_below=crop_below)
        (found,) = batch.results(methods[method], batch.original_answers(methods))
        seconds = time.perf_counter() - begun
    drawn, scale = smaller(image)
    if found.att_map is not None:
        drawn = heat_over(drawn, found.att_map, scaled(found.region, scale))
    for box in found.bboxes:
        with_box(drawn, box, scale)
    crops = [enlarged(image.crop(box)) for box in found.bboxes]
    return Seen(drawn, crops, found.original_answer, found.crop_answer, found.confidence, found.bboxes, seconds)


def enlarged(crop: Image.Image) -> Image.Image:
    """A crop as it is shown, with a longer side of CROP_SIDE to SHOWN_SIDE pixels."""
    shown, _ = smaller(crop)
    larger = max(1.0, CROP_SIDE / max(shown.size))
    return shown.resize((round(shown.width * larger), round(shown.height * larger)), Image.Resampling.BICUBIC)


def settings_of(name: str) -> Model:
    """How `vicrop ground` asks a model of tables.MODELS: by its file under localization/conf/model."""
    schema = OmegaConf.structured(Model)
    for path in sorted((PACKAGE / "localization" / "conf" / "model").glob("*.yaml")):
        found = OmegaConf.merge(schema, OmegaConf.load(path))
        if found.family == name and checkpoint_of(found.name) == checkpoint_of(name):
            return cast(Model, OmegaConf.to_object(found))
    return Model(family=name, name=name)


@dataclass(frozen=True)
class Heads:
    """Where the localization heads of a model see a phrase."""

    picture: Image.Image  # with mask and box
    maps: list[tuple[Image.Image, str]]  # of each head, and of all together: (picture, what it is)
    found: Grounding
    seconds: float


def find_phrase(models: OneModel, name: str, path: str | None, phrase: str | None) -> Heads:
    """Ground a phrase in the picture at a path with the known heads of a model, or else the best of this very picture.

    Raises:
        ValueError, OSError: as `look`.
    """
    phrase, image = text_of(phrase, "the phrase"), picture_at(path)
    with models.held(name) as loaded:
        begun = time.perf_counter()
        settings = settings_of(name)
        own = {option: value for option, value in vars(settings.look).items() if value is not None}
        session = replace(loaded, options={**loaded.options, **own}).session([image])
        prompts = {"referseg": session.adapter.phrase, "vqa": session.adapter.prompt}
        prompt, numbers = prompts[settings.conv_mode.name](phrase), layer_numbers(session.model, "mean")
        (maps,) = attention(session, [prompt], numbers, forced=[()])
        every, region = maps.float().cpu().numpy(), session.layouts[0].region  # (layers, heads, h, w)
        found = ground(every, region, image.size, Logic(), heads_of(name))
        seconds = time.perf_counter() - begun
    drawn, scale = smaller(image)
    place = scaled(region, scale)
    shown = [(heat_over(drawn, every[head], place), head_name(head)) for head in found.heads[:SHOWN_HEADS]]
    shown.append((heat_over(drawn, found.att_map, place), f"{len(found.heads)} heads together"))
    drawn = smaller(masked(image, found.shown))[0]
    if found.box:
        with_box(drawn, found.box, scale)
    return Heads(drawn, shown, found, seconds)


# ------------------------------------------------------------------------------------------------------------ drawings
def smaller(image: Image.Image) -> tuple[Image.Image, float]:
    """(a copy with a longer side of SHOWN_SIDE pixels at most, how much smaller it is)."""
    scale = min(1.0, SHOWN_SIDE / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return (image.copy() if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)), scale


def scaled(box: Region | list[float], scale: float) -> Region:
    """A box in a picture that is `scale` times as large."""
    x1, y1, x2, y2 = (round(side * scale) for side in box)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def with_box(image: Image.Image, box: Region | list[float], scale: float) -> None:
    """Draw a box into a picture that is `scale` times as large."""
    x1, y1, x2, y2 = scaled(box, scale)
    line = max(2, max(image.size) // 300)
    for color, grown in (("white", 1), ("crimson", 0)):
        sides = x1 - grown, y1 - grown, x2 + grown, y2 + grown
        ImageDraw.Draw(image).rectangle(sides, outline=color, width=line + 2 * grown)
