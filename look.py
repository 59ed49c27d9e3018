"""The look: what a model has seen of an image, open to any number of questions.

Everything that this toolkit asks of a model goes through here: the attention that maps are made of, their gradients,
the answer, and the answer with a crop. They share one pass over the image.
"""

import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from attention import device_of, quietly, watch
from info import OPTIONS
from utils import edge_mask, high_pass_filter, high_res_split_threshold, load_image, same_size

MAX_NEW_TOKENS = 20
LOOK_BATCH = 8  # at most so many images (tiles of a large one) go through the model together


class Script(NamedTuple):
    """A prompt as a language model reads it."""

    ids: torch.Tensor  # (batch, T)
    positions: torch.Tensor  # (batch, T), or (axes, batch, T) for rotary positions of several axes


class Look(ABC):
    """What a model has seen of a batch of images, open to any number of questions.

    The image comes before the question, so its keys and values are computed once (`_prefix`) and every question
    continues from them: the maps, the answer, and the answer with a crop. All forward passes are `_forward`, the
    embeddings of tokens and images through the language model. A subclass says how its model's images and prompts
    get there.

    Attributes:
        images: the PIL images, RGB; those of one look have maps of one size.
        pixels: their normalised pixels, float32 on the CPU, laid out as the model's processor does.
        inputs: what the vision tower is given of them (`preprocess`), pixels among it, in its dtype and on its device.
        regions: per image, the rectangle that its map covers (xyxy pixels of the image; may reach beyond it).
        grid: (h, w), the cells of the map.
        bbox_size: base side of the crop window in image pixels.
        options: the keywords of the look, for another one of the same kind.
    """

    grid: tuple
    bbox_size: int
    reads_question = False  # does the question reach the image's tokens (as in a Q-Former)?
    needs_square_tiles = False  # would a tile that is not square lose something, or gain padding?

    def __init__(self, images, model, processor, geometry="exact", **options):
        self.model, self.processor, self.options = model, processor, {"geometry": geometry, **options}
        self.check(model, **self.options)
        self.images = [load_image(image) for image in images]
        self.regions = [(0, 0, *image.size) for image in self.images]
        self.device = device_of(model.get_input_embeddings())
        prepared = self.preprocess(self.images)
        self.inputs, self.pixels = self.placed(prepared), prepared["pixel_values"]
        self._prefixes, self._rows, self._connector, self._tiles = {}, {}, {}, None

    @classmethod
    def check(cls, model, **options):
        """Raises ValueError, before any image is loaded, for a model or an option that such a look cannot have."""
        for name, value in options.items():
            choices = OPTIONS[name].get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{name} is one of {choices}, not {value!r}")

    # -- what a model has to say about itself
    @property
    @abstractmethod
    def vision(self):
        """The module that encodes images."""

    @abstractmethod
    def preprocess(self, images):
        """{name: CPU tensor} of the vision side for PIL images, "pixel_values" among them."""

    @abstractmethod
    def token_count(self, inputs):
        """The number of tokens that stand for each of the images in `inputs`."""

    @abstractmethod
    def prompt(self, question):
        """The whole prompt of a question about one image: the model's own template, filled in."""

    @property
    def block(self):
        """The text that stands for an image in a prompt; it holds the image token once."""
        return self.processor.image_token

    def tokens(self, prompt, counts):
        """(1, T) token ids of a prompt about images of so many tokens each; it names one image.

        Raises:
            ValueError: the prompt has no place for an image, or several, or nothing after it.
        """
        block, token = self.block, self.processor.image_token
        if prompt.count(block) != 1:
            raise ValueError(f"a prompt holds {block} exactly once, this one {prompt.count(block)} times: {prompt!r}")
        if prompt.endswith(block):
            raise ValueError(f"a prompt ends with a question, not with the image: {prompt!r}")
        text = prompt.replace(block, "".join(block.replace(token, token * count) for count in counts))
        return self.processor.tokenizer(text, return_tensors="pt").input_ids

    def positions(self, ids, shown):
        """(..., 1, T) positions of ids (1, T) about the images of `shown`, a list of `inputs`."""
        return torch.arange(ids.shape[1], device=ids.device)[None]

    @abstractmethod
    def image_span(self, ids):
        """(start, stop) of the first image's map tokens in `ids` (batch, T)."""

    def cells(self, rows, found):
        """(batch, layers, heads, h, w) from rows (batch, layers, heads, tokens); `found` holds all that was watched."""
        return rows.unflatten(-1, self.grid)

    def see(self, inputs):
        """(batch, ...) vision features: as much of the images' encoding as no question changes."""
        return torch.stack(list(self.model.get_image_features(**inputs).pooler_output))

    def embed(self, seen, prompt):
        """(batch, tokens, dim): what the language model gets to see, given vision features and the prompt."""
        return seen

    def canvas(self, values):
        """(batch, copies, 3, H, W): values laid out as `pixels`, as pictures; some models see several copies."""
        return values[:, None]

    def record_fields(self, crop):
        """{name: value} that a result record carries beside the answers."""
        return {}

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
        return tuple(sorted({valid_layer(number, count, 'this model (or layer="mean")') for number in numbers}))

    # -- one pass over the image, shared by all questions
    def placed(self, inputs):
        """The inputs where the vision tower wants them; floating ones in its dtype."""
        device, dtype = device_of(self.vision), self.vision.dtype
        floats = {name: dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
        return {name: value.to(device, floats[name]) for name, value in inputs.items()}

    def script(self, prompt, crops=None):
        """The Script of a prompt about each of the look's images, or (image, crop) with the crops' inputs."""
        shown = [self.inputs] if crops is None else [self.inputs, crops]
        ids = self.tokens(prompt, [self.token_count(inputs) for inputs in shown]).to(self.device)
        positions = self.positions(ids, shown)
        count = len(self.images)
        return Script(ids.expand(count, -1), positions.expand(*positions.shape[:-2], count, -1))

    @cached_property
    def seen(self):
        return self.see(self.inputs)

    def _prefix(self, prompt, script, prefixes=None, seen=None):
        """KV cache of the tokens up to the end of the first image, computed once, to be continued."""
        prefixes = self._prefixes if prefixes is None else prefixes
        stop = self.image_span(script.ids)[1]
        key = tuple(script.ids[0, :stop].tolist()), prompt if self.reads_question else None
        if key not in prefixes:
            cache = self.new_cache()
            self._encode(prompt, script, stop, cache, self.seen if seen is None else seen)
            prefixes[key] = cache
        return continued(prefixes[key])

    def new_cache(self):
        return DynamicCache(config=self.model.config.get_text_config())

    def _encode(self, prompt, script, stop, cache, seen):
        """Fill an empty cache with the first `stop` tokens."""
        self._forward(script.ids[:, :stop], script.positions[..., :stop], cache, self.embed(seen, prompt))

    def _forward(self, ids, positions, cache, features=None):
        """Hidden states (batch, T, dim) over the next tokens of a cache; `features` take the place of image tokens."""
        embeds = self.model.get_input_embeddings()(ids)
        if features is not None:
            image = (ids == self.model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(image, features.to(embeds.device, embeds.dtype))
        return self.model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=ids.new_ones(len(ids), cache.get_seq_length() + ids.shape[1]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _rest(self, script, cache, features=None, stop=None):
        """`_forward` over what the cache does not hold yet, up to token number `stop`."""
        start = cache.get_seq_length()
        return self._forward(script.ids[:, start:stop], script.positions[..., start:stop], cache, features)

    def _logits(self, hidden):
        """(batch, vocabulary) float32 after the last token."""
        return self.model.get_output_embeddings()(hidden[:, -1]).float()

    def _confidence(self, hidden):
        """v = log max softmax(z), one per image."""
        return self._logits(hidden).log_softmax(-1).amax(-1)

    def _maps(self, found, layers, script):
        """(batch, layers, heads, h, w) from {module: (batch, heads, rows, keys)}, of each the last row."""
        start, stop = self.image_span(script.ids)
        rows = [found[self.attention_modules[layer]][:, :, -1, start:stop].to(self.device) for layer in layers]
        return self.cells(torch.stack(rows, 1), found)

    # -- the questions
    @quietly
    def attention(self, prompt, layers):
        """A_st: attention of the prompt's last token to the image (times A_ti where a connector is in between).

        Args:
            prompt: the whole prompt, template included.
            layers: zero-based layer numbers, ascending.
        Returns:
            (batch, layers, heads, h, w) float32 tensor, row 0 of the map at the top.
        """
        missing = [layer for layer in layers if (prompt, layer) not in self._rows]
        if missing:
            script = self.script(prompt)
            cache = self._prefix(prompt, script)
            modules = [self.attention_modules[layer] for layer in missing]
            # accelerate's offload hooks bring weights in and out around each module: leave those to finish the pass.
            stop = not any(hasattr(module, "_hf_hook") for module in self.model.modules())
            with watch([self.model.get_decoder()], modules, stop=stop) as seen:
                self._rest(script, cache)
            self._remember(prompt, script, missing, seen)
        return torch.stack([self._rows[prompt, layer] for layer in layers], 1)

    def _remember(self, prompt, script, layers, seen):
        maps = self._maps({**seen.probs, **self._connector.get(prompt, {})}, layers, script)
        for number, layer in enumerate(layers):
            self._rows[prompt, layer] = maps[:, number]

    @quietly
    def weighted_attention(self, prompt, layers):
        """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

        Where a connector is in between, that times A_ti * relu(dv/dA_ti).
        """
        script = self.script(prompt)
        cache, models, modules = self._before_gradients(prompt, script, layers)
        with torch.enable_grad(), watch(models, modules, graph=True) as seen:
            features = None if cache.get_seq_length() else self.embed(self.seen, prompt)
            v = self._confidence(self._rest(script, cache, features)).sum()
        gradients = torch.autograd.grad(v, [seen[module] for module in modules])
        weighted = {
            module: seen[module].detach() * gradient.relu() for module, gradient in zip(modules, gradients, strict=True)
        }
        return self._maps(weighted, layers, script)

    def _before_gradients(self, prompt, script, layers):
        """(cache, models, modules): where to start a pass that keeps a graph, and what to watch in it.

        The prompt's last token influences no other token, so a single-token step on top of the cached rest gives the
        exact gradient.
        """
        cache = self._prefix(prompt, script)
        if cache.get_seq_length() < script.ids.shape[1] - 1:
            self._rest(script, cache, stop=-1)
        return cache, [self.model.get_decoder()], [self.attention_modules[layer] for layer in layers]

    @quietly
    def pixel_gradients(self, prompts):
        """G per prompt: L2 norm over colour of dv/d(normalised pixels); one vision forward serves all prompts.

        Returns:
            list of (batch, H, W) float32 tensors over the model's input pixels.
        """
        if len(self.images) > 1:  # one at a time: unlike the other methods this one keeps the graph of a whole pass
            alone = (type(self)([image], self.model, self.processor, **self.options) for image in self.images)
            return [torch.cat(norms) for norms in zip(*(look.pixel_gradients(prompts) for look in alone), strict=True)]
        with torch.enable_grad():
            pixels = self.inputs["pixel_values"].detach().clone().requires_grad_()
            seen, prefixes = self.see({**self.inputs, "pixel_values": pixels}), {}
            norms = []
            for prompt in prompts:
                script = self.script(prompt)
                v = self._confidence(self._rest(script, self._prefix(prompt, script, prefixes, seen))).sum()
                gradient = torch.autograd.grad(v, pixels, retain_graph=True)[0]
                norms.append(self.canvas(gradient.float()).sum(1).norm(dim=1))
        return norms

    def edge_mask(self):
        """(batch, H, W) bool tensor over the model's input pixels: where the image has edges."""
        shown = self.canvas(self.pixels)[:, 0]
        if self.options["geometry"] == "upstream":  # the reference squashed the whole image, whatever the model saw
            size = tuple(shown.shape[2:])
            strengths = [high_pass_filter(image, size, reduce=False) for image in self.images]
            return torch.from_numpy(np.stack([strength > np.median(strength) for strength in strengths]))
        settings = self.processor.image_processor
        shown = shown.permute(0, 2, 3, 1).numpy() * np.array(settings.image_std) + np.array(settings.image_mean)
        return torch.from_numpy(np.stack([edge_mask(pixels) for pixels in shown]))

    @quietly
    def answer(self, prompt, crops=None, layers=()):
        """Greedy answers, at most MAX_NEW_TOKENS tokens, one per image.

        Args:
            prompt: the whole prompt for one image.
            crops: one more image per image (PIL), appended after it; None asks about the images alone.
            layers: layers whose `attention(prompt, ...)` will be asked for: read off this answer's own prefill.
        """
        inputs = self.placed(self.preprocess(crops)) if crops else None
        script = self.script(prompt, inputs)
        cache = self._prefix(prompt, script)
        features = self.embed(self.see(inputs), prompt) if crops else None
        modules = [self.attention_modules[layer] for layer in layers]
        with watch([self.model.get_decoder()], modules) if layers else nullcontext() as seen:
            hidden = self._rest(script, cache, features)
        if layers:
            self._remember(prompt, script, layers, seen)
        return [
            self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            for tokens in self._continuation(hidden, script.positions[..., -1:], cache)
        ]

    def _continuation(self, hidden, positions, cache):
        """Token ids per image, greedily, up to an end token: what `generate` gives, with nothing set up anew."""
        ends = torch.tensor(end_tokens(self.generator), device=self.device)
        tokens = self._logits(hidden).argmax(-1, keepdim=True).to(self.device)  # (batch, 1)
        answers = tokens
        while answers.shape[1] < MAX_NEW_TOKENS and not torch.isin(answers, ends).any(1).all():
            positions = positions + 1
            tokens = self._logits(self._forward(tokens, positions, cache)).argmax(-1, keepdim=True).to(self.device)
            answers = torch.cat([answers, tokens], 1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        return [row[~over].tolist() for row, over in zip(answers, ended, strict=True)]

    # -- high resolution
    def tiles(self):
        """(looks, rows, columns): looks at the tiles of this look's one image, row by row, at most LOOK_BATCH in each.

        The looks of a moderate image are kept, so that methods and questions share them. Those of a huge one would hold
        too many keys and values: they are made as they are asked for, and let go.
        """
        if self._tiles is None:
            tiles, rows, columns = high_res_split_threshold(self.images[0])
            tiles = same_size(tiles, square=self.needs_square_tiles)
            chunks = [tiles[start : start + LOOK_BATCH] for start in range(0, len(tiles), LOOK_BATCH)]
            looks = (type(self)(chunk, self.model, self.processor, **self.options) for chunk in chunks)
            if len(chunks) > 1:
                return looks, rows, columns
            self._tiles = list(looks), rows, columns
        return self._tiles


def valid_layer(number, count, whose):
    """The number as an int, if it is one of `count` layers; else a ValueError that names the valid ones."""
    integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not integer or not 0 <= number < count:
        raise ValueError(f"layer {number!r} does not exist: {whose} has layers 0 to {count - 1}")
    return int(number)


def end_tokens(model):
    """Ids that end an answer: those with which the checkpoint generates, else those of its text config."""
    found = model.generation_config.eos_token_id
    found = model.config.get_text_config().eos_token_id if found is None else found
    return found if isinstance(found, list) else [found]


def continued(cache):
    """A KV cache that goes on from `cache` and leaves it as it is.

    DynamicCache never writes in place (it concatenates), so its layers are copied but not their tensors; these may even
    carry a graph.
    """
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
