"""The methods: each is a short formula over a session (ViCrop, arXiv 2502.17422, section 4), or a baseline's box.

All have one interface, `Method`: bound to a model, one gives the box, the map and its region for each question.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vicrop.attribution import attention, attention_of_words, edge_mask, pixel_gradients, weighted_attention
from vicrop.boxes import bboxes_in_region
from vicrop.choices import ONE_REGION, Regions
from vicrop.heads import Criteria, Head, greedy, heads_map, parse_heads, valid_heads
from vicrop.images import ImageSource
from vicrop.layouts import Region, Size, cell_means, whole
from vicrop.session import SESSION_IMAGES, ImageSession, Of, Prompts, layer_numbers, valid_layer
from vicrop.tiles import join_maps, tile_grid


# ------------------------------------------------------------------------------------------------------------ formulas
def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b cell by cell. 0/0 is 1; x/0 is x over the smallest positive value of b's own map (h, w).

    Always finite: quotients end at 1e30, which no attention reaches unless b underflows.
    """
    positive = b.masked_fill(b <= 0, float("inf")).amin((-2, -1), keepdim=True)
    floor = torch.where(positive.isinf(), torch.ones_like(positive), positive)
    quotient = (a / torch.where(b > 0, b, floor)).clamp(max=1e30)
    return torch.where((a == 0) & (b == 0), torch.ones_like(a), quotient)


def relative_attention(session: ImageSession, prompts: Prompts, general_prompt: str, layers: Sequence[int],
                       of: Of = None) -> list[Tensor]:  # fmt: skip
    """rel_att, A(q) / A(q') with A the head-mean of A_st, per layer and then averaged. [(h, w) float32 tensor]."""
    specific = attention(session, prompts, layers, of)
    general = attention(session, [general_prompt] * len(specific), layers, of)
    return [ratio(a.mean(1), b.mean(1)).mean(0) for a, b in zip(specific, general, strict=True)]


def question_attention(session: ImageSession, prompts: Prompts, general_prompt: str, layers: Sequence[int],
                       of: Of = None) -> list[Tensor]:  # fmt: skip
    """question_att, head-mean of A_wt, averaged over the question's own words and layers. [(h, w)].

    The last token, which the other maps are read at, looks at what the answer begins with. Each word looks at what it
    names: of a question about two places both show. The general prompt only tells which words are the question's own.
    """
    return [att_map.mean((0, 1)) for att_map in attention_of_words(session, prompts, general_prompt, layers, of)]


def gradient_attention(session: ImageSession, prompts: Prompts, general_prompt: str, layers: Sequence[int],
                       of: Of = None) -> list[Tensor]:  # fmt: skip
    """grad_att, head-mean of A_st * relu(dv/dA_st), averaged over layers. [(h, w)]; needs no general prompt."""
    return [weighted.mean((0, 1)) for weighted in weighted_attention(session, prompts, layers, of)]


def pure_gradient(session: ImageSession, prompts: Prompts, general_prompt: str, of: Of = None) -> list[Tensor]:
    """pure_grad, G(q) / G(q') per pixel where the image has edges, averaged over each patch. [(h, w)].

    One image at a time: unlike the others this method keeps the graph of a whole pass.
    """
    maps = []
    for query in session.queries(prompts, of):
        single = session.only(query.image_index)
        specific, general = pixel_gradients(single, [query.prompt, general_prompt])
        masked = ratio(specific, general) * edge_mask(single).to(specific.device)
        maps.append(cell_means(masked, single.layouts[0].grid, single.adapter.whole_cells))
    return maps


def localization_attention(session: ImageSession, prompts: Prompts, general_prompt: str, heads: Sequence[Head] | None,
                           of: Of = None) -> list[Tensor]:  # fmt: skip
    """loc_att, the sum of the smoothed maps of the localization heads (arXiv 2503.06287, section 3.4). [(h, w)].

    `heads` are the model's, [(layer, head)]; None: of each map the best ones, which are looked for in all layers.
    """
    layers = layers_of(heads, session.model)
    maps = []
    for found in attention(session, prompts, layers, of):
        found = found.cpu().numpy()  # (layers, heads, h, w)
        given = None if heads is None else [(layers.index(layer), head) for layer, head in heads]
        picked = np.stack([found[place] for place in given or greedy(Criteria().measure(found), Criteria())])
        maps.append(torch.from_numpy(heads_map(picked)).float())
    return maps


def layers_of(heads: Sequence[Head] | None, model: PreTrainedModel) -> tuple[int, ...]:
    """The layers that hold these heads, ascending; all of the model's for None."""
    return layer_numbers(model, "mean") if heads is None else tuple(sorted({layer for layer, _ in heads}))


PREFILL_METHODS = {relative_attention, localization_attention}  # made of rows that an answer's own first pass holds


# ----------------------------------------------------------------------------------------------------------- interface
class Questions(NamedTuple):
    """Questions about a session's images, as a method is asked about them."""

    session: ImageSession
    prompts: list[str]  # for the map
    general_prompt: str
    of: list[int]  # for each the number of its image
    records: Sequence[dict]  # for each its data record, for boxes that come from it
    questions: Sequence[str] = ()  # each as it is asked for the map, without the model's template
    sure: Sequence[float] = ()  # how probable their answers about the image alone are, where these are known


class Found(NamedTuple):
    """What a method found for a question: boxes and, if it made one, the map that gave them and the map's region."""

    bboxes: tuple[Region, ...]  # at least one, xyxy pixels of the image
    att_map: np.ndarray | None  # (h, w) float32
    region: Region
    views: int | None = None  # of the image that this took, where that is not one for every method of its kind


class Method:
    """What chooses the crop of a question.

    Attributes:
        reads: what can be chosen of it: "layers", "heads", or nothing.
        makes_map: does a map choose the boxes?
        regions: how many there may be.
    """

    __name__: str
    reads: frozenset[str] = frozenset()
    makes_map = False
    regions = ONE_REGION

    def bind(self, model: PreTrainedModel, layer: Any = None, heads: Any = None) -> "Method":
        """This method for a model, and a layer or heads of it.

        Raises:
            ValueError: a layer or head that the model does not have, or one for a method that reads none.
        """
        for what, value in (("layers", layer), ("heads", heads)):
            if value is not None and what not in self.reads:
                own, name = " ".join(self.reads) or "pixels", "layer" if what == "layers" else what
                raise ValueError(f"{self.__name__} reads {own}: {name}={value!r} has no meaning for it")
        return self

    def with_regions(self, regions: Regions) -> Self:
        """This method, choosing up to so many boxes."""
        twin = copy.copy(self)
        twin.regions = regions
        return twin

    def layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The layers of a model that this method reads, ascending."""
        return ()

    def prefill_layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Those whose rows an answer's own first pass can hold."""
        return ()

    def gradient_layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Those whose weighted rows an answer's own first pass can hold, if autograd is at work in it."""
        return ()

    def find(self, questions: Questions) -> list[Found]:
        """A Found for each question, in order: its boxes (xyxy pixels), and the map (h, w) if the method makes one.

        Raises:
            ValueError: a record, or the model, lacks what the method needs.
        """
        raise NotImplementedError


class CropBaseline(Method):
    """Boxes that no map chooses.

    Args:
        boxes: `(record, image_size, bbox_size, most) -> [(x1, y1, x2, y2)]`; see baselines.
    """

    def __init__(self, boxes: Callable[[dict, Size, float, int], list[Region]]):
        self.__name__, self.boxes = boxes.__name__, boxes

    def find(self, questions: Questions) -> list[Found]:
        """See Method."""
        found, base = [], questions.session.adapter.bbox_size
        for record, number in zip(questions.records, questions.of, strict=True):
            size = questions.session.images[number].size
            found.append(Found(tuple(self.boxes(record, size, base, self.regions.most)), None, whole(size)))
        return found


class MapMethod(Method):
    """A method on a family's models: `(image, prompt, general_prompt, model, processor) -> float32 ndarray (h, w)`.

    Args of a call:
        image: PIL image or path, or a list of them, which go through the model together and give a list of maps.
        prompt: the whole prompt of the question, template included.
        general_prompt: the same for the general question (`info.GENERAL_PROMPT`); grad_att and loc_att need none.
        model, processor: as loaded, in any dtype and with any attention implementation; left as they were.
        layer: zero-based layer of the language model, a list of them, or "mean"; not for methods that read no layer.
        heads: for loc_att, "L14H24,L14H13" or [(layer, head)], from 0; None: those that localize best in each image.
        options: those of the model's adapter, such as `geometry="exact" | "upstream"`.
    Raises:
        ValueError: a layer or head that the model does not have; one for a method that reads none.
    """

    makes_map = True
    layer = heads = None  # what a call reads that says nothing
    of_tiles = False  # is the map made tile by tile?

    def __init__(self, name: str, formula: Callable[..., list[Tensor]]):
        self.__name__, self.__doc__ = name, f"{formula.__doc__}\n\n{type(self).__doc__}"
        self.formula = formula
        self.reads = frozenset({"layers", "heads"} & inspect.signature(formula).parameters.keys())

    def __call__(self, image: ImageSource | list[ImageSource] | tuple[ImageSource, ...], prompt: Prompts,
                 general_prompt: str, model: PreTrainedModel, processor: Any, *, layer: Any = None, heads: Any = None,
                 **options: Any) -> np.ndarray | list[np.ndarray]:  # fmt: skip
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        bound, maps = self.bind(model, layer, heads), []
        for start in range(0, len(images), SESSION_IMAGES):
            session = ImageSession(images[start : start + SESSION_IMAGES], model, processor, **options)
            maps.extend(bound.maps(session, prompt, general_prompt))
        return maps if isinstance(image, (list, tuple)) else maps[0]

    def bind(self, model: PreTrainedModel, layer: Any = None, heads: Any = None) -> "MapMethod":
        """See Method; `layer` and `heads` as in a call."""
        super().bind(model, layer, heads)
        if heads is not None:
            text = model.config.get_text_config()
            heads = parse_heads(heads) if isinstance(heads, str) else heads
            heads = valid_heads(heads, text.num_hidden_layers, text.num_attention_heads)
            for layer, _ in heads:
                valid_layer(layer, layer_numbers(model, "mean"), "this model")
        bound = copy.copy(self)
        bound.layer, bound.heads = layer, heads
        bound.layers(model)
        return bound

    def tiled(self) -> "MapMethod":
        """The `_high` variant: the map is made tile by tile."""
        twin = copy.copy(self)
        twin.of_tiles = True
        return twin

    def layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See Method; none for pure_grad."""
        if "heads" in self.reads:
            return layers_of(self.heads, model)
        return layer_numbers(model, self.layer) if self.reads else ()

    def prefill_layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See Method."""
        return self.layers(model) if self.formula in PREFILL_METHODS and not self.of_tiles else ()

    def gradient_layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See Method."""
        return self.layers(model) if self.formula is gradient_attention and not self.of_tiles else ()

    def maps(self, session: ImageSession, prompts: Prompts, general_prompt: str, of: Of = None) -> list[np.ndarray]:
        """[float32 ndarray (h, w)] for a session that exists already; `prompts` and `of` as it takes them."""
        read = {"layers": self.layers(session.model), "heads": self.heads}
        found = self.formula(session, prompts, general_prompt, **{name: read[name] for name in self.reads}, of=of)
        return [att_map.float().cpu().numpy() for att_map in found]

    def map_of_tiles(self, session: ImageSession, prompt: str, general_prompt: str, image: int = 0) -> np.ndarray:
        """The `_high` map of one of a session's images, joined from its tiles: float32 (rows * h, columns * w)."""
        sessions, rows, columns = session.tiles(image)
        maps = [att_map for tiles in sessions for att_map in self.maps(tiles, prompt, general_prompt)]
        return join_maps(maps, rows, columns)

    def high_res(self, image: ImageSource, prompt: str, general_prompt: str, model: PreTrainedModel, processor: Any, *,
                 layer: Any = None, heads: Any = None, **options: Any) -> np.ndarray:  # fmt: skip
        """`map_of_tiles` for an image, with the arguments of a call; see utils.high_res."""
        session = ImageSession([image], model, processor, **options)
        return self.bind(model, layer, heads).map_of_tiles(session, prompt, general_prompt)

    def find(self, questions: Questions) -> list[Found]:
        """See Method."""
        session, prompts, general, of, *_ = questions
        if self.of_tiles:
            maps = [self.map_of_tiles(session, prompt, general, number)
                    for prompt, number in zip(prompts, of, strict=True)]  # fmt: skip
            regions = [whole(session.images[number].size) for number in of]
            views = [math.prod(tile_grid(session.images[number].size)) for number in of]
        else:
            maps = self.maps(session, prompts, general, of)
            regions, views = [session.layouts[number].region for number in of], [None] * len(of)
        return [
            Found(self.boxes(session, number, att_map, region), att_map, region, count)
            for att_map, region, number, count in zip(maps, regions, of, views, strict=True)
        ]

    def boxes(self, session: ImageSession, image: int, att_map: np.ndarray, region: Region) -> tuple[Region, ...]:
        """The boxes that a map over a region of one of a session's images gives."""
        size, base = session.images[image].size, session.adapter.bbox_size
        return tuple(bboxes_in_region(att_map, region, size, base, self.regions))


def family_methods(family: str) -> tuple[MapMethod, ...]:
    """A family's methods of maps, under their long names (`rel_attention_llava`, ...)."""
    formulas = relative_attention, gradient_attention, pure_gradient, localization_attention, question_attention
    names = "rel_attention", "gradient_attention", "pure_gradient", "localization_attention", "question_attention"
    return tuple(MapMethod(f"{name}_{family}", each) for name, each in zip(names, formulas, strict=True))
