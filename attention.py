"""Attention out of any transformers model, and the maps made of it.

`watch` reads single softmax rows while the model runs SDPA; `Look` is what a model has seen of an image; the three
methods of ViCrop (arXiv 2502.17422, section 4) are short functions over a look. Nothing else here touches a model's
attention, and none of it needs `output_attentions` or an eager model.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
from functools import wraps

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils import high_res_split_threshold, join_maps, same_size

MAX_NEW_TOKENS = 20
GEOMETRIES = ("exact", "upstream")
LOOK_BATCH = 8  # at most so many images (tiles of a large one) go through the model together


# ------------------------------------------------------------------------------------------- reading attention rows
class _SeenEnough(Exception):
    """Leaves a forward pass once the last watched module has been read."""


class Watch:
    """What `watch` found: `watch[module]` is (batch, heads, 1, keys) float32, softmax over the keys."""

    def __init__(self, modules, graph, stop):
        self.modules, self.graph, self.stop = list(modules), graph, stop
        self.probs = {}

    def __getitem__(self, module):
        return self.probs[module]

    def read(self, module, query, key, value, mask, scaling):
        """Store the last query's row; with a graph, also return the attention output that runs through it."""
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, dim=1).float()
        scores = query[:, :, -1:].float() @ keys.transpose(2, 3) * scaling  # (batch, heads, 1, keys)
        if mask is not None:
            allowed = mask[:, :, -1:, : keys.shape[2]]
            scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
        probs = scores.softmax(-1)
        if self.graph and not self.probs:
            # Only the first (lowest) module's row is a leaf. Later rows depend on it, so they stay in the graph: were
            # they leaves as well, the gradient of the lower ones would lose every path through them.
            probs = probs.detach().requires_grad_()
        self.probs[module] = probs
        if self.stop and len(self.probs) == len(self.modules):
            raise _SeenEnough
        if not self.graph:
            return None
        return (probs.to(value.dtype) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)


_WATCHES = {}  # module -> Watch, filled only inside `watch`


def _watched_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that `watch` puts into a model: SDPA, and the last row of watched modules on the side."""
    watch = _WATCHES.get(module)
    if watch is not None and module not in watch.probs:  # a generation's later steps are not what was asked for
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = watch.read(module, query, key, value, attention_mask, scale)
        if output is not None:
            return output, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


AttentionInterface.register("watched", _watched_attention)
# Without a mask function of the same name, a continuation of several tokens from a cache would run without its causal
# mask, and silently.
AttentionMaskInterface.register("watched", sdpa_mask)


@contextmanager
def watch(model, modules, graph=False, stop=False):
    """Read the last query's softmax of some attention modules during the next forward pass through `model`.

        with watch(language_model, [layer.self_attn]) as seen:
            model(...)
        seen[layer.self_attn]                  # (batch, heads, 1, keys) float32

    Args:
        model: the PreTrainedModel that holds the modules; its attention implementation is swapped, and put back on
            exit whatever happened.
        modules: attention modules in the order in which the model runs them. Each is read once, at its first call.
        graph: keep autograd's graph from the first module's softmax (a leaf) upwards; for single-token steps.
        stop: end the forward pass after the last module was read (the pass has no result then).
    """
    seen, found = Watch(modules, graph, stop), model.config._attn_implementation
    model.set_attn_implementation("watched")
    _WATCHES.update(dict.fromkeys(seen.modules, seen))
    try:
        yield seen
    except _SeenEnough:
        pass
    finally:
        for module in seen.modules:
            _WATCHES.pop(module, None)
        model.set_attn_implementation(found)
    missed = len(seen.modules) - len(seen.probs)
    if missed:
        raise RuntimeError(f"{missed} of {len(seen.modules)} watched modules never ran their attention function")


@contextmanager
def undisturbed(model):
    """A model in evaluation, with frozen weights, whatever grad or inference mode the caller is in; then put back."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


def quietly(method):
    """Decorator for methods of a Look: the model is undisturbed while they run."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        with undisturbed(self.model):
            return method(self, *args, **kwargs)

    return wrapped


# -------------------------------------------------------------------------------------------------------- the look
class Look(ABC):
    """What a model has seen of a batch of images, open to any number of questions.

    The image comes before the question, so its keys and values are computed once (`_prefix`) and every question
    continues from them. A subclass says how its model encodes images and where their tokens go.

    Attributes:
        images: the PIL images, RGB.
        pixels: what the model is given of them, (batch, 3, H, W) here, in its dtype.
        regions: per image, the rectangle that its map covers (xyxy pixels of the image; may reach beyond it).
        grid: (h, w), the cells of the map.
        bbox_size: base side of the crop window in image pixels.
        options: the keywords of the look, for another one of the same kind.
    """

    images: list
    pixels: torch.Tensor
    regions: list
    grid: tuple
    bbox_size: int
    needs_square_tiles = False  # would a tile that is not square lose something, or gain padding?

    def __init__(self, model, processor, **options):
        self.model, self.processor, self.options = model, processor, options
        self._prefixes, self._rows, self._tiles = {}, {}, None

    # -- what a model has to say about itself
    @abstractmethod
    def prompt(self, question):
        """The whole prompt of a question about one image: the model's own template, filled in."""

    @abstractmethod
    def tokens(self, prompt, images=1):
        """(1, T) token ids of a prompt about `images` images, each image's placeholder expanded to its tokens."""

    @abstractmethod
    def image_span(self, ids):
        """(start, stop) of the first image's map tokens in `ids`, row 0 of the map first."""

    @abstractmethod
    def prefix_inputs(self, pixels):
        """Keyword arguments that give the model the looked-at images."""

    @abstractmethod
    def crop_inputs(self, crops):
        """Keyword arguments that give the model one more image each (a list of PIL images)."""

    @abstractmethod
    def edge_mask(self):
        """(batch, H, W) bool tensor over the model's input pixels: where the image has edges."""

    @property
    @abstractmethod
    def attention_modules(self):
        """The language model's attention modules, layer by layer."""

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
        for number in numbers:
            integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
            if not integer or not 0 <= number < count:
                valid = f'this model has layers 0 to {count - 1} (or layer="mean")'
                raise ValueError(f"layer {number!r} does not exist: {valid}")
        return tuple(sorted({int(number) for number in numbers}))

    # -- one pass over the image, shared by all questions
    def _prefix(self, ids):
        """KV cache of the tokens up to the end of the first image, computed once, to be continued."""
        head = tuple(ids[0, : self.image_span(ids)[1]].tolist())
        if head not in self._prefixes:
            self._prefixes[head] = self._prefill(ids, self.pixels)
        return continued(self._prefixes[head])

    def _prefill(self, ids, pixels):
        cache = DynamicCache(config=self.model.config.get_text_config())
        head = ids[:, : self.image_span(ids)[1]].expand(len(pixels), -1)
        self._base(head, cache, **self.prefix_inputs(pixels))
        return cache

    def _base(self, ids, cache, **inputs):
        """Hidden states of the model without its LM head, over the next tokens (batch, T) of a cache."""
        past = cache.get_seq_length()
        length = past + ids.shape[1]
        return self.model.model(
            input_ids=ids,
            attention_mask=ids.new_ones(len(ids), length),
            position_ids=torch.arange(past, length, device=ids.device).expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
            **inputs,
        ).last_hidden_state

    def _confidence(self, hidden):
        """v = log max softmax(z), one per image, z the logits after the last token."""
        logits = self.model.get_output_embeddings()(hidden[:, -1])
        return logits.float().log_softmax(-1).amax(-1)

    def _map_rows(self, seen, layers, ids):
        """(batch, layers, heads, h, w) from watched last rows."""
        start, stop = self.image_span(ids)
        rows = [seen[self.attention_modules[layer]][:, :, 0, start:stop] for layer in layers]
        return torch.stack([row.to(self.pixels.device) for row in rows], 1).unflatten(-1, self.grid)

    # -- the questions
    @quietly
    def attention(self, prompt, layers):
        """A_st: attention of the prompt's last token to the image tokens.

        Args:
            prompt: the whole prompt, template included.
            layers: zero-based layer numbers, ascending.
        Returns:
            (batch, layers, heads, h, w) float32 tensor, row 0 of the map at the top.
        """
        missing = [layer for layer in layers if (prompt, layer) not in self._rows]
        if missing:
            ids = self.tokens(prompt).expand(len(self.pixels), -1)
            cache = self._prefix(ids)
            modules = [self.attention_modules[layer] for layer in missing]
            # accelerate's offload hooks bring weights in and out around each module: leave those to finish the pass.
            stop = not any(hasattr(module, "_hf_hook") for module in self.model.modules())
            with watch(self._language_model(), modules, stop=stop) as seen:
                self._base(ids[:, cache.get_seq_length() :], cache)
            self._remember(prompt, missing, self._map_rows(seen, missing, ids))
        return torch.stack([self._rows[prompt, layer] for layer in layers], 1)

    @quietly
    def weighted_attention(self, prompt, layers):
        """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

        The prompt's last token influences no other token, so a single-token step on top of the cached rest gives the
        exact gradient.
        """
        ids = self.tokens(prompt).expand(len(self.pixels), -1)
        cache = self._prefix(ids)
        if cache.get_seq_length() < ids.shape[1] - 1:
            self._base(ids[:, cache.get_seq_length() : -1], cache)
        modules = [self.attention_modules[layer] for layer in layers]
        with torch.enable_grad(), watch(self._language_model(), modules, graph=True) as seen:
            v = self._confidence(self._base(ids[:, -1:], cache)).sum()
        gradients = dict(zip(modules, torch.autograd.grad(v, [seen[module] for module in modules]), strict=True))
        return self._map_rows(seen, layers, ids).detach() * self._map_rows(gradients, layers, ids).relu()

    @quietly
    def pixel_gradients(self, prompts):
        """G per prompt: L2 norm over colour of dv/d(normalised pixels); one vision forward serves all prompts.

        Returns:
            list of (batch, H, W) float32 tensors over the model's input pixels.
        """
        ids = [self.tokens(prompt) for prompt in prompts]
        heads = {tuple(each[0, : self.image_span(each)[1]].tolist()) for each in ids}
        if len(heads) > 1:
            raise ValueError("the prompts differ before the image: pure_grad needs one template for both")
        # One image at a time: unlike the other methods this one keeps the graph of a whole pass.
        images = [self._gradients_of(pixels, ids) for pixels in self.pixels.split(1)]
        return [torch.cat(of_prompt) for of_prompt in zip(*images, strict=True)]

    def _gradients_of(self, pixels, prompts):
        """Per prompt (token ids), the (1, H, W) gradient norm of one image."""
        norms = []
        with torch.enable_grad():
            pixels = pixels.detach().clone().requires_grad_()
            prefix = self._prefill(prompts[0], pixels)
            for ids in prompts:
                hidden = self._base(ids[:, prefix.get_seq_length() :], continued(prefix))
                gradient = torch.autograd.grad(self._confidence(hidden).sum(), pixels, retain_graph=True)[0]
                norms.append(gradient.float().norm(dim=1))
        return norms

    @quietly
    def answer(self, prompt, crops=None, layers=()):
        """Greedy answers, at most MAX_NEW_TOKENS tokens, one per image.

        Args:
            prompt: the whole prompt for one image.
            crops: one more image per image (PIL), appended after it; None asks about the images alone.
            layers: layers whose `attention(prompt, ...)` will be asked for: read off this answer's own prefill.
        """
        ids = self.tokens(prompt, images=2 if crops else 1)
        cache = self._prefix(ids)
        ids = ids.expand(len(self.pixels), -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        if crops:
            inputs |= self.crop_inputs(crops)
        modules = [self.attention_modules[layer] for layer in layers]
        with watch(self._language_model(), modules) if layers else nullcontext() as seen:
            output = generate_greedily(self.model, inputs)
        if layers:
            self._remember(prompt, layers, self._map_rows(seen, layers, ids))
        texts = self.processor.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _remember(self, prompt, layers, maps):
        for number, layer in enumerate(layers):
            self._rows[prompt, layer] = maps[:, number]

    def _language_model(self):
        return self.model.get_decoder()

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


def continued(cache):
    """A KV cache that goes on from `cache` and leaves it as it is.

    DynamicCache never writes in place (it concatenates), so its layers are copied but not their tensors; these may even
    carry a graph.
    """
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def generate_greedily(model, inputs):
    """Token ids (batch, T) of `model.generate`: greedy, short, with none of the checkpoint's own settings."""
    found, text = model.generation_config, model.config.get_text_config()
    end = found.eos_token_id if found.eos_token_id is not None else text.eos_token_id
    pad = found.pad_token_id if found.pad_token_id is not None else text.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    # Handed over as an argument, a config would still inherit penalties and the like from the model's own.
    model.generation_config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=pad)
    try:
        return model.generate(**inputs)
    finally:
        model.generation_config = found


def device_of(module):
    """Where a module wants its inputs: where its weights are, or where accelerate brings them if they are offloaded."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


# ----------------------------------------------------------------------------------------------------- the methods
def ratio(a, b):
    """a / b cell by cell. 0/0 is 1; x/0 is x over the smallest positive value of b's own map (h, w).

    Always finite: quotients end at 1e30, which no attention reaches unless b underflows.
    """
    positive = b.masked_fill(b <= 0, float("inf")).amin((-2, -1), keepdim=True)
    floor = torch.where(positive.isinf(), torch.ones_like(positive), positive)
    quotient = (a / torch.where(b > 0, b, floor)).clamp(max=1e30)
    return torch.where((a == 0) & (b == 0), torch.ones_like(a), quotient)


def relative_attention(look, prompt, general_prompt, layers):
    """rel_att, A(q) / A(q') with A the head-mean of A_st, per layer and then averaged. (batch, h, w) float32 tensor."""
    specific, general = (look.attention(each, layers).mean(2) for each in (prompt, general_prompt))
    return ratio(specific, general).mean(1)


def gradient_attention(look, prompt, general_prompt, layers):
    """grad_att, head-mean of A_st * relu(dv/dA_st), averaged over layers. (batch, h, w); needs no general prompt."""
    return look.weighted_attention(prompt, layers).mean((1, 2))


def pure_gradient(look, prompt, general_prompt):
    """pure_grad, G(q) / G(q') per pixel where the image has edges, averaged over each patch. (batch, h, w)."""
    specific, general = look.pixel_gradients([prompt, general_prompt])
    masked = ratio(specific, general) * look.edge_mask().to(specific.device)
    h, w = look.grid
    height, width = masked.shape[1] // h, masked.shape[2] // w
    patches = masked[:, : h * height, : w * width].reshape(-1, h, height, w, width)  # what no patch holds is not seen
    return patches.mean((2, 4))


READS_PREFILL = {relative_attention}  # made of rows that an answer's own first pass holds


class MapFunction:
    """A method on a model: `(image, prompt, general_prompt, model, processor) -> float32 ndarray (h, w)`.

    Args of a call:
        image: PIL image or path, or a list of them, which go through the model together and give (batch, h, w).
        prompt: the whole prompt of the question, template included.
        general_prompt: the same for the general question (`info.GENERAL_PROMPT`); grad_att does not need it.
        model, processor: as loaded, in any dtype and with any attention implementation; left as they were.
        layer: zero-based layer of the language model, a list of them, or "mean"; not for methods that read no layer.
        look: keywords of the model's look, such as `geometry="exact" | "upstream"`.
    Raises:
        ValueError: a layer that the model does not have; a layer for a method that reads none.
    """

    def __init__(self, name, look_class, formula):
        self.__name__, self.__doc__ = name, f"{formula.__doc__}\n\n{type(self).__doc__}"
        self.look_class, self.formula = look_class, formula
        self.reads_layers = "layers" in inspect.signature(formula).parameters
        self.reads_prefill = formula in READS_PREFILL

    def __call__(self, image, prompt, general_prompt, model, processor, *, layer=None, **look):
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        maps = []
        for start in range(0, len(images), LOOK_BATCH):
            seen = self.look_class(images[start : start + LOOK_BATCH], model, processor, **look)
            maps.extend(self.of(seen, prompt, general_prompt, layer))
        return np.stack(maps) if isinstance(image, (list, tuple)) else maps[0]

    def of(self, look, prompt, general_prompt, layer=None):
        """The same for a look that exists already: float32 ndarray (batch, h, w)."""
        layers = self.layers(look.model, layer)
        found = self.formula(look, prompt, general_prompt, *([layers] if self.reads_layers else []))
        return found.float().cpu().numpy()

    def of_tiles(self, look, prompt, general_prompt, layer=None):
        """The `_high` map of a look's one image, joined from its tiles: float32 ndarray (rows * h, columns * w)."""
        looks, rows, columns = look.tiles()
        maps = [att_map for tiles in looks for att_map in self.of(tiles, prompt, general_prompt, layer)]
        return join_maps(maps, rows, columns)

    def high_res(self, image, prompt, general_prompt, model, processor, *, layer=None, **look):
        """`of_tiles` for an image, with the arguments of a call; see utils.high_res."""
        return self.of_tiles(self.look_class([image], model, processor, **look), prompt, general_prompt, layer)

    def layers(self, model, layer=None):
        """The layers that a call with `layer` reads; none for pure_grad, for which a layer is an error."""
        if self.reads_layers:
            return self.look_class.layers(model, layer)
        if layer is not None:
            raise ValueError(f"{self.__name__} reads pixels, not a layer: layer={layer!r} has no meaning for it")
        return ()
