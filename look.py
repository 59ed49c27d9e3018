"""The look: what a model has seen of an image, open to any number of questions.

Everything that this toolkit asks of a model goes through here: the attention that maps are made of, their gradients,
the answer, and the answer with a crop. They share one pass over the image.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
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
    said: tuple = ()  # token ids that follow it, the beginning of an answer


class Script(NamedTuple):
    """A prompt as a language model reads it; the map's tokens are the last ones of the first image."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,), or (axes, T) for rotary positions of several axes
    stop: int  # where the first image ends

    def part(self, first, last=None):
        """(ids, positions) of the tokens from number `first` up to `last`."""
        return self.ids[first:last], self.positions[..., first:last]


class Stretch(NamedTuple):
    """The next tokens of several scripts, a row for each, padded on the left so that all rows end together."""

    ids: torch.Tensor  # (batch, T)
    positions: torch.Tensor  # (..., batch, T)
    real: torch.Tensor  # (batch, T) int, 0 at padding
    features: list  # per row [(tokens, dim)], for the image tokens among its ids


class Reading:
    """What a language model has read for a batch of asks: KV cache, and which of its slots are no padding.

    `ahead` are stretches still unread: they go through the model together with the next one, in a single pass.
    """

    def __init__(self, cache, mask, ahead=()):
        self.cache, self.mask, self.ahead = cache, mask, list(ahead)  # mask: (batch, slots) int

    def reaches(self, depth):
        """Do so many layers hold all slots? A pass that was cut short left none in the layers that it never got to."""
        return all(self.cache.get_seq_length(layer) >= self.mask.shape[1] for layer in range(depth))

    def continued(self, rows):
        """A reading that goes on from the rows of this one, picked and repeated; it ends an earlier continuation.

        One cache serves them all, cut back to this reading's slots each time: a copy would be a second set of keys and
        values in memory. Only rows that are not just these are copied.
        """
        cache, mask, slots = self.cache, self.mask, self.mask.shape[1]
        if rows != list(range(len(mask))):
            cache, mask = copy.copy(cache), mask[rows]
            cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            keys, values = layer.keys[:, :, :slots], layer.values[:, :, :slots]
            layer.keys, layer.values = (keys, values) if cache is self.cache else (keys[rows], values[rows])
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
    instruction_aware = False  # do an image's tokens depend on the question, as a Q-Former's do?
    before = 0  # image tokens before those of the map

    def __init__(self, images, model, processor, geometry="exact", **options):
        self.model, self.processor, self.options = model, processor, {"geometry": geometry, **options}
        self.check(model, **self.options)
        self.images = [load_image(image) for image in images]
        self.regions = [(0, 0, *image.size) for image in self.images]
        self.device = device_of(model.get_input_embeddings())
        self.modules = list(model.modules())  # for `quietly`: finding them takes as long as a small model's layer
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

    @classmethod
    def prepare(cls, model, processor):
        """A checkpoint has been loaded: what its config leaves open is filled in, if that can be done.

        Raises:
            ValueError: its model and its processor do not fit together.
        """
        image, own = processor.image_token, model.config.image_token_id
        token, rows = processor.tokenizer.convert_tokens_to_ids(image), len(model.get_input_embeddings().weight)
        if token != own:
            raise ValueError(f"{image} is token {own} by its config.json, and {token} by its tokenizer")
        if not 0 <= own < rows:
            raise ValueError(f"{image} is token {own}, and its model has embeddings of tokens 0 to {rows - 1}")

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

    def phrase(self, text):
        """A prompt of an image and a text, without roles or instructions."""
        return f"{self.block}\n{text}"

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
    def asks(self, prompts, of=None, said=None):
        """[Ask] for a prompt about every image, or for prompts about the images numbered in `of`."""
        prompts = [prompts] * len(self.images) if isinstance(prompts, str) else prompts
        images = of or range(len(self.images))
        said = said or [()] * len(prompts)
        return [Ask(*ask) for ask in zip(images, prompts, map(tuple, said), strict=True)]

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
        ids = self.tokens(ask.prompt, [self.token_count(grid) for grid in grids])
        ids = torch.cat([ids, ids.new_tensor(ask.said)]).to(self.device)
        start = int((ids == self.model.config.image_token_id).nonzero()[0])
        return Script(ids, self.positions(ids, grids), start + self.token_count(grids[0]))

    @cached_property
    def seen(self):
        return self.see(self.inputs)

    # -- one pass over the image, shared by all questions
    def features(self, asks, seen):
        """Per ask [(tokens, dim)] for the tokens of its image, given vision features per image."""
        return [[each] for each in self.embed([seen[ask.image] for ask in asks], [ask.prompt for ask in asks])]

    def _begin(self, asks, scripts, depth=None, prefixes=None, seen=None):
        """(reading, end): all that these asks need not read again, and the slot at which their images end.

        That is everything up to there. It is read once, together with what the first question reads on, and kept for
        the others. `depth`: how many layers the coming pass will reach (None: all); `prefixes` and `seen` stand in for
        the look's own.
        """
        prefixes = self._prefixes if prefixes is None else prefixes
        depth = len(self.attention_modules) if depth is None else depth
        keys, first = asks, {}
        if not self.instruction_aware:
            keys = [(ask.image, *script.ids[: script.stop].tolist()) for ask, script in zip(asks, scripts, strict=True)]
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        known = next((known for known in prefixes if first.keys() <= set(known) and prefixes[known].reaches(depth)), ())
        if not known:
            known, picked = tuple(first), first.values()
            features = self.features([asks[number] for number in picked], seen or self.seen)
            reading = self._unread([scripts[number] for number in picked], features)
            prefixes[known] = Reading(reading.cache, reading.ahead[0].real)
            if len(known) == len(keys):
                return reading, reading.ahead[0].real.shape[1]
            self._read(reading)  # several questions about an image: it is read by itself, and then its rows repeated
        reading = prefixes[known].continued([known.index(key) for key in keys])
        return reading, reading.mask.shape[1]

    def _unread(self, scripts, features):
        """A reading that begins anew; it has each script up to the end of its image ahead of it."""
        stretch = self._stretch([script.part(0, script.stop) for script in scripts], features)
        return Reading(DynamicCache(), stretch.real[:, :0], [stretch])

    def _stretch(self, rows, features=None):
        """The Stretch of rows of (ids, positions), (T_i,) and (..., T_i)."""
        width, image = max(len(ids) for ids, _ in rows), self.model.config.image_token_id
        padding = [width - len(ids) for ids, _ in rows]
        filled = [(F.pad(ids, (pad, 0), value=int(image == 0)), F.pad(positions, (pad, 0)))
                  for (ids, positions), pad in zip(rows, padding, strict=True)]  # fmt: skip
        ids, positions = zip(*filled, strict=True)
        real = torch.arange(width, device=self.device) >= torch.tensor(padding, device=self.device)[:, None]
        return Stretch(torch.stack(ids), torch.stack(positions, -2), real.long(), features or [()] * len(rows))

    def _read(self, reading, *stretches):
        """Hidden states (batch, T, dim) over what a reading has ahead and the next stretches, in one pass."""
        stretches = [*reading.ahead, *stretches]
        ids, positions, real, features = zip(*stretches, strict=True)
        ids, positions = torch.cat(ids, -1), torch.cat(positions, -1)
        reading.mask, reading.ahead = torch.cat([reading.mask, *real], 1), []
        embeds = self.model.get_input_embeddings()(ids)
        features = [each for of_row in zip(*features, strict=True) for own in of_row for each in own]
        if features:
            features = torch.cat(features).to(embeds.device, embeds.dtype)
            places = ids == self.model.config.image_token_id
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

    def _read_on(self, reading, scripts, start=None, stop=None, features=None):
        """`_read` of each script from its image's end (or token number `start`) to its end (or number `stop`)."""
        rows = [script.part(script.stop if start is None else start, stop) for script in scripts]
        return self._read(reading, self._stretch(rows, features))

    def _logits(self, hidden):
        """(batch, vocabulary) float32 after the last token.

        Raises:
            ValueError: they are not finite: the likeliest of them would be token 0, whatever was asked.
        """
        return finite(self.model.get_output_embeddings()(hidden[:, -1])).float()

    def _confidence(self, hidden):
        """v = log max softmax(z), one per row."""
        return self._logits(hidden).log_softmax(-1).amax(-1)

    def _maps(self, found, layers, asks, end):
        """[(layers, heads, h, w)] per ask from {module: (batch, heads, rows, keys)}, of each the last row.

        `end` is the slot at which the asks' images end.
        """
        rows = [found[self.attention_modules[layer]][:, :, -1].to(self.device) for layer in layers]
        maps = []
        for row, ask in zip(torch.stack(rows, 1), asks, strict=True):  # row: (layers, heads, slots)
            grid = self.grids[ask.image]
            maps.append(self.cells(row[..., end - self.token_count(grid) + self.before : end], grid))
        return maps

    # -- the questions
    @quietly
    def attention(self, prompts, layers, of=None, said=None):
        """A_st: attention of a prompt's last token to its image (times A_ti where a connector is in between).

        Args:
            prompts, of: see the class.
            layers: zero-based layer numbers, ascending.
            said: per prompt the token ids that follow it; then it is the attention of the last of those.
        Returns:
            [(layers, heads, h, w) float32 tensor] per prompt, row 0 of the map at the top.
        """
        asks = self.asks(prompts, of, said)
        missing = [layer for layer in layers if any((ask, layer) not in self._rows for ask in asks)]
        if missing:  # several questions about an image have its general prompt in common: it is read once
            new = [ask for ask in dict.fromkeys(asks) if any((ask, layer) not in self._rows for layer in missing)]
            scripts = [self.script(ask) for ask in new]
            modules = [self.attention_modules[layer] for layer in missing]
            # accelerate's offload hooks bring weights in and out around each module: leave those to finish the pass.
            stop = not any(hasattr(module, "_hf_hook") for module in self.modules)
            # What is read anew for these rows alone is not kept.
            prefixes = dict(self._prefixes) if self.instruction_aware else self._prefixes
            reading, end = self._begin(new, scripts, missing[-1] + 1 if stop else None, prefixes)
            with watch([self.model.get_decoder()], modules, stop=stop) as seen:
                self._read_on(reading, scripts)
            self._remember(seen.probs, missing, new, end)
        return [torch.stack([self._rows[ask, layer] for layer in layers]) for ask in asks]

    def _remember(self, found, layers, asks, end):
        for ask, maps in zip(asks, self._maps(found, layers, asks, end), strict=True):
            self._rows.update({(ask, layer): att_map for layer, att_map in zip(layers, maps, strict=True)})

    @quietly
    def weighted_attention(self, prompts, layers, of=None):
        """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

        Where a connector is in between, that times A_ti * relu(dv/dA_ti).
        """
        asks = self.asks(prompts, of)
        scripts = [self.script(ask) for ask in asks]
        end, models, modules, finish = self._before_gradients(asks, scripts, layers)
        with torch.enable_grad(), watch(models, modules, graph=True) as seen:
            v = self._confidence(finish()).sum()
        gradients = torch.autograd.grad(v, [seen[module] for module in modules])
        weighted = {
            module: seen[module].detach() * gradient.relu() for module, gradient in zip(modules, gradients, strict=True)
        }
        return self._maps(weighted, layers, asks, end)

    def _before_gradients(self, asks, scripts, layers):
        """(end, models, modules, finish): the part of a pass that needs no graph is done; `finish` is the rest.

        A prompt's last token influences no other token, so a single-token step on top of the cached rest gives the
        exact gradient.
        """
        reading, end = self._begin(asks, scripts)
        if reading.ahead or any(script.stop < len(script.ids) - 1 for script in scripts):
            self._read_on(reading, scripts, stop=-1)
        modules = [self.attention_modules[layer] for layer in layers]
        return end, [self.model.get_decoder()], modules, lambda: self._read_on(reading, scripts, start=-1)

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
                reading, _ = self._begin(asks, scripts, prefixes=prefixes, seen=seen)
                v = self._confidence(self._read_on(reading, scripts)).sum()
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
        scripts, features = [self.script(ask) for ask in asks], None
        if crops:
            inputs = self.preprocess(crops)
            scripts = [self.script(ask, grid) for ask, grid in zip(asks, self.grids_of(inputs), strict=True)]
            shown = self.embed(self.see(self.placed(inputs)), [ask.prompt for ask in asks])
            features = [[each] for each in shown]
        reading, end = self._begin(asks, scripts)
        modules = [self.attention_modules[layer] for layer in layers]
        with watch([self.model.get_decoder()], modules) if layers else nullcontext() as seen:
            hidden = self._read_on(reading, scripts, features=features)
        if layers:
            self._remember(seen.probs, layers, asks, end)
        return [
            self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            for tokens in self._continuation(hidden, torch.stack([s.positions[..., -1:] for s in scripts], -2), reading)
        ]

    def _continuation(self, hidden, positions, reading):
        """Token ids per row, greedily, up to an end token: what `generate` gives, with nothing set up anew."""
        configs = {model.generation_config for model in (self.model, self.generator)}
        ends = torch.tensor(end_tokens(*configs, tokenizer=self.processor.tokenizer), device=self.device)
        tokens = self._logits(hidden).argmax(-1, keepdim=True).to(self.device)  # (batch, 1)
        answers = tokens
        while answers.shape[1] < MAX_NEW_TOKENS and not torch.isin(answers, ends).any(1).all():
            positions = positions + 1  # (..., batch, 1)
            step = Stretch(tokens, positions, torch.ones_like(tokens), [()] * len(tokens))
            tokens = self._logits(self._read(reading, step)).argmax(-1, keepdim=True).to(self.device)
            answers = torch.cat([answers, tokens], 1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        return [row[~over].tolist() for row, over in zip(answers, ended, strict=True)]

    def stock_inputs(self, ids, prompt):
        """What transformers' own `generate` is given for a prompt about a single image, besides how to decode."""
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.inputs}

    @quietly
    def generate(self, prompt, **options):
        """[token ids] of an answer about a single image by transformers' own `generate`, without special tokens.

        For what `answer` has not: sampling, beams, another length. It shares nothing with the rest of the look.

        Raises:
            ValueError: logits that are not finite.
        """
        (ask,) = self.asks(prompt)
        inputs = self.stock_inputs(self.script(ask).ids[None], prompt)
        with finite_logits(self.model.get_output_embeddings()):
            written = self.model.generate(**inputs, **options)[0].tolist()
        prompted = inputs["input_ids"][0].tolist()
        if written[: len(prompted)] == prompted:  # some models give it back, others do not
            written = written[len(prompted) :]
        special = set(self.processor.tokenizer.all_special_ids)
        return [token for token in written if token not in special]

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


def finite(logits):
    """The logits of next tokens, as they came from the model; a ValueError if one of them is NaN or infinite."""
    if not logits.isfinite().all():
        what = "NaN" if logits.isnan().any() else "infinite"
        raise ValueError(
            f"the logits of the next token are {what}, so there is no answer (they were computed in "
            f"{str(logits.dtype).removeprefix('torch.')}): float16 overflows, use --dtype bfloat16 or float32"
        )
    return logits


@contextmanager
def finite_logits(head):
    """Passes through a model's output embeddings end in a ValueError if the logits of the next token are not finite."""

    def check(module, inputs, logits):
        finite(logits[..., -1, :])

    hook = head.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def end_tokens(*configs, tokenizer):
    """Ids that end an answer: those of the generation configs, and the tokenizer's own.

    InstructBLIP's language model may name another token than the one that it was trained to end with.
    """
    found = [each for config in configs for each in np.atleast_1d(config.eos_token_id)] + [tokenizer.eos_token_id]
    found = sorted({int(token) for token in found if token is not None})
    if not found:
        raise ValueError("neither the generation config nor the tokenizer names a token that ends an answer")
    return found
