"""The importance maps: each method is a short formula over a look (ViCrop, arXiv 2502.17422, section 4)."""

import copy
import inspect

import numpy as np
import torch

from localization.analyze import Criteria, greedy, parse_heads, valid_heads
from localization.bbox import heads_map
from look import LOOK_BATCH
from utils import join_maps


def ratio(a, b):
    """a / b cell by cell. 0/0 is 1; x/0 is x over the smallest positive value of b's own map (h, w).

    Always finite: quotients end at 1e30, which no attention reaches unless b underflows.
    """
    positive = b.masked_fill(b <= 0, float("inf")).amin((-2, -1), keepdim=True)
    floor = torch.where(positive.isinf(), torch.ones_like(positive), positive)
    quotient = (a / torch.where(b > 0, b, floor)).clamp(max=1e30)
    return torch.where((a == 0) & (b == 0), torch.ones_like(a), quotient)


def relative_attention(look, prompts, general_prompt, layers, of=None):
    """rel_att, A(q) / A(q') with A the head-mean of A_st, per layer and then averaged. [(h, w) float32 tensor]."""
    specific = look.attention(prompts, layers, of)
    general = look.attention([general_prompt] * len(specific), layers, of)
    return [ratio(a.mean(1), b.mean(1)).mean(0) for a, b in zip(specific, general, strict=True)]


def gradient_attention(look, prompts, general_prompt, layers, of=None):
    """grad_att, head-mean of A_st * relu(dv/dA_st), averaged over layers. [(h, w)]; needs no general prompt."""
    return [weighted.mean((0, 1)) for weighted in look.weighted_attention(prompts, layers, of)]


def pure_gradient(look, prompts, general_prompt, of=None):
    """pure_grad, G(q) / G(q') per pixel where the image has edges, averaged over each patch. [(h, w)].

    One image at a time: unlike the others this method keeps the graph of a whole pass.
    """
    maps = []
    for ask in look.asks(prompts, of):
        alone = look.alone(ask.image)
        specific, general = alone.pixel_gradients([ask.prompt, general_prompt])
        masked = ratio(specific, general) * alone.edge_mask().to(specific.device)
        h, w = alone.grids[0]
        height, width = masked.shape[0] // h, masked.shape[1] // w
        patches = masked[: h * height, : w * width].reshape(h, height, w, width)  # what no patch holds is not seen
        maps.append(patches.mean((1, 3)))
    return maps


def localization_attention(look, prompts, general_prompt, heads, of=None):
    """loc_att, the sum of the smoothed maps of the localization heads (arXiv 2503.06287, section 3.4). [(h, w)].

    `heads` are the model's, [(layer, head)]; None: of each map the best ones, which are looked for in all layers.
    """
    layers = layers_of(heads, look.model)
    maps = []
    for attention in look.attention(prompts, layers, of):
        attention = attention.cpu().numpy()  # (layers, heads, h, w)
        chosen = greedy(Criteria().measure(attention), Criteria()) if heads is None else heads
        picked = np.stack([attention[layers.index(layer), head] for layer, head in chosen])
        maps.append(torch.from_numpy(heads_map(picked)).float())
    return maps


def layers_of(heads, model):
    """The layers that hold these heads, ascending; all of the model's for None."""
    every = range(model.config.get_text_config().num_hidden_layers)
    return tuple(every) if heads is None else tuple(sorted({layer for layer, _ in heads}))


READS_PREFILL = {relative_attention, localization_attention}  # made of rows that an answer's own first pass holds


class MapFunction:
    """A method on a model: `(image, prompt, general_prompt, model, processor) -> float32 ndarray (h, w)`.

    Args of a call:
        image: PIL image or path, or a list of them, which go through the model together and give a list of maps.
        prompt: the whole prompt of the question, template included.
        general_prompt: the same for the general question (`info.GENERAL_PROMPT`); grad_att and loc_att need none.
        model, processor: as loaded, in any dtype and with any attention implementation; left as they were.
        layer: zero-based layer of the language model, a list of them, or "mean"; not for methods that read no layer.
        heads: for loc_att, "L14H24,L14H13" or [(layer, head)], from 0; None: those that localize best in each image.
        look: keywords of the model's look, such as `geometry="exact" | "upstream"`.
    Raises:
        ValueError: a layer or head that the model does not have; one for a method that reads none.
    """

    layer = heads = None  # what a call reads that says nothing

    def __init__(self, name, look_class, formula):
        self.__name__, self.__doc__ = name, f"{formula.__doc__}\n\n{type(self).__doc__}"
        self.look_class, self.formula = look_class, formula
        self.reads = {"layers", "heads"} & inspect.signature(formula).parameters.keys()
        self.reads_prefill = formula in READS_PREFILL

    def __call__(self, image, prompt, general_prompt, model, processor, *, layer=None, heads=None, **look):
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        reader, maps = self.reading(model, layer, heads), []
        for start in range(0, len(images), LOOK_BATCH):
            seen = self.look_class(images[start : start + LOOK_BATCH], model, processor, **look)
            maps.extend(reader.of(seen, prompt, general_prompt))
        return maps if isinstance(image, (list, tuple)) else maps[0]

    def reading(self, model, layer=None, heads=None):
        """This function, for a layer or for heads of a model; see a call's arguments, and what they raise."""
        for what, value, name in (("layers", layer, "layer"), ("heads", heads, "heads")):
            if value is not None and what not in self.reads:
                own = "pixels" if not self.reads else " ".join(self.reads)
                raise ValueError(f"{self.__name__} reads {own}: {name}={value!r} has no meaning for it")
        if heads is not None:
            text = model.config.get_text_config()
            heads = parse_heads(heads) if isinstance(heads, str) else heads
            heads = valid_heads(heads, text.num_hidden_layers, text.num_attention_heads)
        reader = copy.copy(self)
        reader.layer, reader.heads = layer, heads
        reader.layers(model)
        return reader

    def of(self, look, prompts, general_prompt, of=None):
        """[float32 ndarray (h, w)] for a look that exists already; `prompts` and `of` as look.Look takes them."""
        read = {"layers": self.layers(look.model), "heads": self.heads}
        found = self.formula(look, prompts, general_prompt, **{name: read[name] for name in self.reads}, of=of)
        return [att_map.float().cpu().numpy() for att_map in found]

    def of_tiles(self, look, prompt, general_prompt, image=0):
        """The `_high` map of one of a look's images, joined from its tiles: float32 ndarray (rows * h, columns * w)."""
        looks, rows, columns = look.tiles(image)
        maps = [att_map for tiles in looks for att_map in self.of(tiles, prompt, general_prompt)]
        return join_maps(maps, rows, columns)

    def high_res(self, image, prompt, general_prompt, model, processor, *, layer=None, heads=None, **look):
        """`of_tiles` for an image, with the arguments of a call; see utils.high_res."""
        seen = self.look_class([image], model, processor, **look)
        return self.reading(model, layer, heads).of_tiles(seen, prompt, general_prompt)

    def layers(self, model):
        """The layers of a model that this function reads, ascending; none for pure_grad."""
        if "heads" in self.reads:
            return layers_of(self.heads, model)
        return self.look_class.layers(model, self.layer) if self.reads else ()
