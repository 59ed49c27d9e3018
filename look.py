"""The look: what a model has seen of an image, open to any number of questions.

Everything that this toolkit asks of a model goes through here: the attention that maps are made of, their gradients,
the answer, and the answer with a crop. They share one pass over the image.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from attention import device_of, quietly, watch
from info import OPTIONS
from utils import edge_mask, high_pass_filter, high_res_split_threshold, load_image, same_size

MAX_NEW_TOKENS = 20
LOOK_BATCH = 8  # at most so many images (tiles of a large one) go through the model together


class Ask(NamedTuple):
    """A question about one of a look's images."""

    image: int
    prompt: str  # whole, template included


class Script(NamedTuple):
    """A prompt as a language model reads it; the map's tokens are the last ones of the first image."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,), or (axes, T) for rotary positions of several axes
    stop: int  # where the first image ends


class Reading:
    """What a language model has read so far for a batch of asks: KV cache, and which of its slots are no padding.

    Rows of different lengths are padded on the left of each stretch that is read, so that all of them end together.
    """

    def __init__(self, cache, mask):
        self.cache, self.mask = cache, mask  # mask: (batch, slots) int

    def continued(self, rows=None):
        """A reading that goes on from this one and leaves it as it is; `rows` picks and repeats its rows.

        DynamicCache never writes in place (it concatenates), so its layers are copied but not their tensors; these may
        even carry a graph.
        """
        cache, mask = copy.copy(self.cache), self.mask
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        if rows is not None and rows != list(range(len(mask))):
            mask = mask[rows]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        return Reading(cache, mask)


class Look(ABC):
    """What a model has seen of a batch of images, open to any number of questions.

    The image comes before the question, so its keys and values are computed once (`_begin`) and every question
    continues from them: the maps, the answer, and the answer with a crop. All forward passes are `_read`: embeddings of
    tokens and images go through the language model. A subclass says how its model's images and prompts get there.

    Questions come as asks. Where a method takes `prompts`, that is one prompt for every image, or a list of prompts;
    `of` then says which image each is about (default: one each, in order).

    Attributes:
        images: the PIL images, RGB, of any sizes.
        pixels: their normalised pixels, float32 on the CPU, laid out as the model's processor does.
        inputs: what the vision tower is given of them (`preprocess`), pixels among it, in its dtype and on its device.
        regions: per image, the rectangle that its map covers (xyxy pixels of the image; may reach beyond it).
        grids: per image, (h, w), the cells of its map.
        bbox_size: base side of the crop window in image pixels.
        options: the keywords of the look, for another one of the same kind.
    """

    bbox_size: int
    needs_square_tiles = False  # would a tile that is not square lose something, or gain padding?
    before = 0  # image tokens before those of the map

    def __init__(self, images, model, processor, geometry="exact", **options):
        self.model, self.processor, self.options = model, processor, {"geometry": geometry, **options}
        self.check(model, **self.options)
        self.images = [load_image(image) for image in images]
        self.regions = [(0, 0, *image.size) for image in self.images]
        self.device = device_of(model.get_input_embeddings())
        self._prefixes, self._rows, self._tiles = {}, {}, {}

    @classmethod
    def check(cls, model, **options):
        """Raises ValueError, before any image is loaded, for a model or an option that such a look cannot have."""
        kinds = [inspect.signature(kind).parameters for kind in cls.__mro__ if issubclass(kind, Look)]
        known = [name for name in OPTIONS if any(name in parameters for parameters in kinds)]
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{cls.__name__} has no option {name!r}: it has {', '.join(known)}")
            choices = OPTIONS[name].get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{name} is one of {choices}, not {value!r}")

    # -- what a model has to say about itself
    @property
    @abstractmethod
    def vision(self):
        """The module that encodes images."""

    def preprocess(self, images):
        """{name: CPU tensor} of the vision side for PIL images, "pixel_values" among them."""
        return dict(self.processor.image_processor(images=images, return_tensors="pt"))

    def grids_of(self, inputs):
        """[(h, w)]: per image of `inputs`, the cells of its map."""
        count, _, *sides = inputs["pixel_values"].shape
        return [tuple(side // self.model.config.vision_config.patch_size for side in sides)] * count

    @abstractmethod
    def prompt(self, question):
        """The whole prompt of a question about one image: the model's own template, filled in."""

    def token_count(self, grid):
        """The number of tokens that stand for an image whose map has these cells (h, w)."""
        return self.before + grid[0] * grid[1]

    @property
    def block(self):
        """The text that stands for an image in a prompt; it holds the image token once."""
        return self.processor.image_token

    def tokens(self, prompt, counts):
        """(T,) token ids of a prompt about images of so many tokens each; it names one image.

        Raises:
            ValueError: the prompt has no place for an image, or several, or nothing after it.
        """
        block, token = self.block, self.processor.image_token
        if prompt.count(block) != 1 or prompt.count(token) != 1:
            found = f"{prompt.count(block)} times, and {token} {prompt.count(token)} times"
            raise ValueError(f"a prompt holds {block} exactly once, this one {found}: {prompt!r}")
        if prompt.endswith(block):
            raise ValueError(f"a prompt ends with a question, not with the image: {prompt!r}")
        text = prompt.replace(block, "".join(block.replace(token, token * count) for count in counts))
        return self.processor.tokenizer(text, return_tensors="pt").input_ids[0]

    def positions(self, ids, grids):
        """(..., T) positions of ids (T,) about images whose maps have these cells."""
        return torch.arange(len(ids), device=ids.device)

    def cells(self, rows, grid):
        """(layers, heads, h, w) from the attention to the map's tokens, (layers, heads, tokens)."""
        return rows.unflatten(-1, grid)

    def see(self, inputs):
        """[tensor] per image: its vision features, as much of its encoding as no question changes."""
        return list(self.model.get_image_features(**inputs).pooler_output)

    def embed(self, seen, prompts):
        """[(tokens, dim)]: what the language model gets to see, given vision features and a prompt for each."""
        return seen

    def canvas(self, values):
        """(copies, 3, H, W): values laid out as `pixels` of a single image, as pictures; some models see copies."""
        return values

    def record_fields(self, of, crops):
        """[{name: value}] that result records about these images (numbers) and crops carry beside the answers."""
        return [{} for _ in crops]

    @property
    def generator(self):
        """The model whose generation config ends an answer."""
        return self.model

    @property
    def attention_modules(self):
        """The language model's attention modules, layer by layer."""
        return [layer.self_attn for layer in self.model.get_decoder().layers]

    @staticmethod
    @abstractmethod
    def default_layer(model):
        """The layer to read where none is given: the checkpoint's `config.att_layer`, else the module's constant."""

    @classmethod
    def layers(cls, model, layer=None):
        """Ascending zero-based layer numbers for `layer`: an int, a list of ints, "mean" (all) or None (the default).

        Raises:
            ValueError: naming the layer that the model does not have and the range that it has.
        """
        count = model.config.get_text_config().num_hidden_layers
        if layer == "mean":
            return tuple(range(count))
        layer = cls.default_layer(model) if layer is None else layer
        numbers = layer if isinstance(layer, (list, tuple)) and layer else [layer]
        return tuple(sorted({valid_layer(number, count, "this model") for number in numbers}))

    # -- from questions to tensors
    def asks(self, prompts, of=None):
        """[Ask] for a prompt about every image, or for prompts about the images numbered in `of`."""
        if isinstance(prompts, str):
            return [Ask(image, prompts) for image in range(len(self.images))]
        return [Ask(image, prompt) for image, prompt in zip(of or range(len(self.images)), prompts, strict=True)]

    @cached_property
    def prepared(self):
        """What `preprocess` makes of the images, on the CPU; only now, for a look of tiles never shows the whole."""
        return self.preprocess(self.images)

    @property
    def pixels(self):
        return self.prepared["pixel_values"]

    @cached_property
    def inputs(self):
        return self.placed(self.prepared)

    @cached_property
    def grids(self):
        return self.grids_of(self.prepared)

    def placed(self, inputs):
        """The inputs where the vision tower wants them; floating ones in its dtype."""
        device, dtype = device_of(self.vision), self.vision.dtype
        floats = {name: dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
        return {name: value.to(device, floats[name]) for name, value in inputs.items()}

    def script(self, ask, *crops):
        """The Script of an ask about its image, and a crop with a map of `crops` cells (h, w)."""
        grids = [self.grids[ask.image], *crops]
        ids = self.tokens(ask.prompt, [self.token_count(grid) for grid in grids]).to(self.device)
        start = int((ids == self.model.config.image_token_id).nonzero()[0])
        return Script(ids, self.positions(ids, grids), start + self.token_count(grids[0]))

    @cached_property
    def seen(self):
        return self.see(self.inputs)

    # -- one pass over the image, shared by all questions
    def _begin(self, asks, scripts, prefixes=None, seen=None):
        """(reading, start, features, ends): what these asks need not read again, to be continued.

        Here that is everything up to the end of each image, read once per image. `start` is the number of the first
        token to read (None: the image's end), `features` those for the image tokens from there on, `ends` the slots at
        which the images of the rows will end. `prefixes` and `seen` stand in for the look's own.
        """
        prefixes = self._prefixes if prefixes is None else prefixes
        keys = [(ask.image, *script.ids[: script.stop].tolist()) for ask, script in zip(asks, scripts, strict=True)]
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        known = next((known for known in prefixes if first.keys() <= set(known)), None)
        if known is None:
            known = tuple(first)
            picked = [first[key] for key in known]
            prefixes[known] = self._encode([asks[n] for n in picked], [scripts[n] for n in picked], seen or self.seen)
        reading = prefixes[known].continued([known.index(key) for key in keys])
        return reading, None, [()] * len(asks), [reading.mask.shape[1]] * len(asks)

    def _encode(self, asks, scripts, seen):
        """A new reading that has read each script up to the end of its image."""
        features = [[each] for each in self.embed([seen[ask.image] for ask in asks], [ask.prompt for ask in asks])]
        reading = self.new_reading(len(asks))
        self._read(reading, [script.ids[: script.stop] for script in scripts],
                   [script.positions[..., : script.stop] for script in scripts], features)  # fmt: skip
        return reading

    def new_reading(self, count):
        cache = DynamicCache(config=self.model.config.get_text_config())
        return Reading(cache, torch.zeros(count, 0, dtype=torch.long, device=self.device))

    def _read(self, reading, ids, positions, features=()):
        """Hidden states (batch, T, dim) over the next tokens of a reading, a sequence per row; its last is at the end.

        Args:
            ids, positions: per row (T_i,) and (..., T_i).
            features: per row [(tokens, dim)], for the image tokens among its ids.
        """
        width = max(map(len, ids))
        image = self.model.config.image_token_id
        padding = [width - len(row) for row in ids]
        ids = torch.stack([F.pad(row, (pad, 0), value=int(image == 0)) for row, pad in zip(ids, padding, strict=True)])
        positions = torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(positions, padding, strict=True)], -2)
        real = torch.arange(width, device=self.device) >= torch.tensor(padding, device=self.device)[:, None]
        reading.mask = torch.cat([reading.mask, real.long()], 1)
        embeds = self.model.get_input_embeddings()(ids)
        features = [each for of_row in features for each in of_row]
        if features:
            features, places = torch.cat(features).to(embeds.device, embeds.dtype), ids == image
            if int(places.sum()) != len(features):  # it would go wrong without a word
                raise ValueError(f"{int(places.sum())} places for image tokens, and {len(features)} of them to fill in")
            embeds = embeds.masked_scatter(places[..., None], features)
        return self.model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=reading.mask,
            position_ids=positions,
            past_key_values=reading.cache,
            use_cache=True,
        ).last_hidden_state

    def _read_on(self, reading, scripts, start=None, stop=None, features=()):
        """`_read` of each script from its image's end (or token number `start`) to its end (or number `stop`)."""
        starts = [script.stop if start is None else start for script in scripts]
        ids = [script.ids[first:stop] for script, first in zip(scripts, starts, strict=True)]
        positions = [script.positions[..., first:stop] for script, first in zip(scripts, starts, strict=True)]
        return self._read(reading, ids, positions, features)

    def _logits(self, hidden):
        """(batch, vocabulary) float32 after the last token."""
        return self.model.get_output_embeddings()(hidden[:, -1]).float()

    def _confidence(self, hidden):
        """v = log max softmax(z), one per row."""
        return self._logits(hidden).log_softmax(-1).amax(-1)

    def _maps(self, found, layers, asks, ends):
        """[(layers, heads, h, w)] per ask from {module: (batch, heads, rows, keys)}, of each the last row.

        `ends` are the slots at which the rows' first images end.
        """
        rows = [found[self.attention_modules[layer]][:, :, -1].to(self.device) for layer in layers]
        maps = []
        for row, ask, end in zip(torch.stack(rows, 1), asks, ends, strict=True):  # row: (layers, heads, slots)
            grid = self.grids[ask.image]
            maps.append(self.cells(row[..., end - self.token_count(grid) + self.before : end], grid))
        return maps

    # -- the questions
    @quietly
    def attention(self, prompts, layers, of=None):
        """A_st: attention of a prompt's last token to its image (times A_ti where a connector is in between).

        Args:
            prompts, of: see the class.
            layers: zero-based layer numbers, ascending.
        Returns:
            [(layers, heads, h, w) float32 tensor] per prompt, row 0 of the map at the top.
        """
        asks = self.asks(prompts, of)
        missing = [layer for layer in layers if any((ask, layer) not in self._rows for ask in asks)]
        if missing:  # several questions about an image have its general prompt in common: it is read once
            new = [ask for ask in dict.fromkeys(asks) if any((ask, layer) not in self._rows for layer in missing)]
            scripts = [self.script(ask) for ask in new]
            reading, start, features, ends = self._begin(new, scripts)
            modules = [self.attention_modules[layer] for layer in missing]
            # accelerate's offload hooks bring weights in and out around each module: leave those to finish the pass.
            stop = not any(hasattr(module, "_hf_hook") for module in self.model.modules())
            with watch([self.model.get_decoder()], modules, stop=stop) as seen:
                self._read_on(reading, scripts, start, features=features)
            self._remember(seen.probs, missing, new, ends)
        return [torch.stack([self._rows[ask, layer] for layer in layers]) for ask in asks]

    def _remember(self, found, layers, asks, ends):
        for ask, maps in zip(asks, self._maps(found, layers, asks, ends), strict=True):
            self._rows.update({(ask, layer): att_map for layer, att_map in zip(layers, maps, strict=True)})

    @quietly
    def weighted_attention(self, prompts, layers, of=None):
        """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

        Where a connector is in between, that times A_ti * relu(dv/dA_ti).
        """
        asks = self.asks(prompts, of)
        scripts = [self.script(ask) for ask in asks]
        ends, models, modules, finish = self._before_gradients(asks, scripts, layers)
        with torch.enable_grad(), watch(models, modules, graph=True) as seen:
            v = self._confidence(finish()).sum()
        gradients = torch.autograd.grad(v, [seen[module] for module in modules])
        weighted = {
            module: seen[module].detach() * gradient.relu() for module, gradient in zip(modules, gradients, strict=True)
        }
        return self._maps(weighted, layers, asks, ends)

    def _before_gradients(self, asks, scripts, layers):
        """(ends, models, modules, finish): the part of a pass that needs no graph is done; `finish` is the rest.

        A prompt's last token influences no other token, so a single-token step on top of the cached rest gives the
        exact gradient.
        """
        reading, *_, ends = self._begin(asks, scripts)
        if any(script.stop < len(script.ids) - 1 for script in scripts):
            self._read_on(reading, scripts, stop=-1)
        modules = [self.attention_modules[layer] for layer in layers]
        return ends, [self.model.get_decoder()], modules, lambda: self._read_on(reading, scripts, start=-1)

    def alone(self, image):
        """A look at only one of the images: this one if it is its only one."""
        if len(self.images) == 1:
            return self
        return type(self)([self.images[image]], self.model, self.processor, **self.options)

    @quietly
    def pixel_gradients(self, prompts):
        """G per prompt for a single image: L2 norm over colour of dv/d(normalised pixels); one vision forward for all.

        Returns:
            [(H, W) float32 tensor] over the model's input pixels.
        """
        norms, prefixes = [], {}
        with torch.enable_grad():
            pixels = self.inputs["pixel_values"].detach().clone().requires_grad_()
            seen = self.see({**self.inputs, "pixel_values": pixels})
            for prompt in prompts:
                asks = self.asks(prompt)
                scripts = [self.script(ask) for ask in asks]
                reading, start, features, _ = self._begin(asks, scripts, prefixes, seen)
                v = self._confidence(self._read_on(reading, scripts, start, features=features)).sum()
                gradient = torch.autograd.grad(v, pixels, retain_graph=True)[0]
                norms.append(self.canvas(gradient.float()).sum(0).norm(dim=0))
        return norms

    def edge_mask(self):
        """(H, W) bool tensor over the model's input pixels of a single image: where it has edges."""
        shown = self.canvas(self.pixels)[0]
        if self.options["geometry"] == "upstream":  # the reference squashed the whole image, whatever the model saw
            strength = high_pass_filter(self.images[0], tuple(shown.shape[1:]), reduce=False)
            return torch.from_numpy(strength > np.median(strength))
        settings = self.processor.image_processor
        shown = shown.permute(1, 2, 0).numpy() * np.array(settings.image_std) + np.array(settings.image_mean)
        return torch.from_numpy(edge_mask(shown))

    @quietly
    def answer(self, prompts, crops=None, layers=(), of=None):
        """Greedy answers, at most MAX_NEW_TOKENS tokens, one per prompt.

        Args:
            prompts, of: see the class.
            crops: one more image per prompt (PIL), appended after the first; None asks about the images alone.
            layers: layers whose `attention(prompts, ...)` will be asked for: read off this answer's own prefill.
        """
        asks = self.asks(prompts, of)
        scripts, more = [self.script(ask) for ask in asks], [()] * len(asks)
        if crops:
            inputs = self.preprocess(crops)
            scripts = [self.script(ask, grid) for ask, grid in zip(asks, self.grids_of(inputs), strict=True)]
            more = [[each] for each in self.embed(self.see(self.placed(inputs)), [ask.prompt for ask in asks])]
        reading, start, features, ends = self._begin(asks, scripts)
        features = [[*own, *other] for own, other in zip(features, more, strict=True)]
        modules = [self.attention_modules[layer] for layer in layers]
        with watch([self.model.get_decoder()], modules) if layers else nullcontext() as seen:
            hidden = self._read_on(reading, scripts, start, features=features)
        if layers:
            self._remember(seen.probs, layers, asks, ends)
        return [
            self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            for tokens in self._continuation(hidden, [script.positions[..., -1:] for script in scripts], reading)
        ]

    def _continuation(self, hidden, positions, reading):
        """Token ids per row, greedily, up to an end token: what `generate` gives, with nothing set up anew."""
        configs = {model.generation_config for model in (self.model, self.generator)}
        ends = torch.tensor(end_tokens(*configs, tokenizer=self.processor.tokenizer), device=self.device)
        tokens = self._logits(hidden).argmax(-1, keepdim=True).to(self.device)  # (batch, 1)
        answers = tokens
        while answers.shape[1] < MAX_NEW_TOKENS and not torch.isin(answers, ends).any(1).all():
            positions = [position + 1 for position in positions]
            tokens = self._logits(self._read(reading, list(tokens), positions)).argmax(-1, keepdim=True).to(self.device)
            answers = torch.cat([answers, tokens], 1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        return [row[~over].tolist() for row, over in zip(answers, ended, strict=True)]

    # -- high resolution
    def tiles(self, image=0):
        """(looks, rows, columns): looks at the tiles of an image, row by row, at most LOOK_BATCH in each.

        The looks of a moderate image are kept, so that methods and questions share them. Those of a huge one would hold
        too many keys and values: they are made as they are asked for, and let go.
        """
        if image not in self._tiles:
            tiles, rows, columns = high_res_split_threshold(self.images[image])
            tiles = same_size(tiles, square=self.needs_square_tiles)
            chunks = [tiles[start : start + LOOK_BATCH] for start in range(0, len(tiles), LOOK_BATCH)]
            looks = (type(self)(chunk, self.model, self.processor, **self.options) for chunk in chunks)
            if len(chunks) > 1:
                return looks, rows, columns
            self._tiles[image] = list(looks), rows, columns
        return self._tiles[image]


def valid_layer(number, count, whose):
    """The number as an int, if it is one of `count` layers; else a ValueError that names the valid ones."""
    integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not integer or not 0 <= number < count:
        raise ValueError(f"layer {number!r} does not exist: {whose} has layers 0 to {count - 1}")
    return int(number)


def end_tokens(*configs, tokenizer):
    """Ids that end an answer: those of the generation configs, and the tokenizer's own.

    InstructBLIP's language model may name another token than the one that it was trained to end with.
    """
    found = [each for config in configs for each in np.atleast_1d(config.eos_token_id)] + [tokenizer.eos_token_id]
    found = sorted({int(token) for token in found if token is not None})
    if not found:
        raise ValueError("neither the generation config nor the tokenizer names a token that ends an answer")
    return found
