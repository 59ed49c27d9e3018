"""Attention out of any transformers model, while it runs as it was loaded, and it is left as it was found.

`watch` reads single softmax rows beside SDPA: nothing needs `output_attentions` or an eager model, and no matrix ever
holds more than the rows asked for. Nothing else here touches a model's attention.
"""

from contextlib import contextmanager
from functools import wraps

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@contextmanager
def counted(module):
    """A list that grows by one with each forward pass of a module."""
    passes = []
    hook = module.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


class _SeenEnough(Exception):
    """Leaves a forward pass once the last watched module has been read."""


class Watch:
    """What `watch` found: `watch[module]` is (batch, heads, rows, keys) float32, softmax over the keys."""

    def __init__(self, modules, graph, stop):
        self.modules, self.graph, self.stop = list(modules), graph, stop
        self.probs = {}

    def __getitem__(self, module):
        return self.probs[module]

    def read(self, module, query, key, value, mask, scaling):
        """Store a module's rows; with a graph, also return the attention output (batch, rows, heads, dim) of them."""
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, dim=1).float()
        first = first_row(module, query)
        scores = query[:, :, first:].float() @ keys.transpose(2, 3) * scaling  # (batch, heads, rows, keys)
        if mask is not None:
            allowed = mask[:, :, first:, : keys.shape[2]]
            scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
        probs = scores.softmax(-1)
        if not self.graph or not self.probs:
            # With a graph, only the first (lowest) module's softmax is a leaf. Later ones depend on it, so they stay in
            # the graph: were they leaves as well, the gradient of the lower ones would lose every path through them.
            probs = probs.detach()
        self.probs[module] = probs.requires_grad_() if self.graph else probs
        if self.stop and len(self.probs) == len(self.modules):
            raise _SeenEnough
        if not self.graph:
            return None
        return (probs.to(value.dtype) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)


def first_row(module, query):
    """The first query row to read: of causal attention the last only, of any other (a Q-Former's) all."""
    return query.shape[2] - 1 if getattr(module, "is_causal", True) else 0


_WATCHES = {}  # module -> Watch, filled only inside `watch`


def _watched_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that `watch` puts into a model: SDPA, and some rows of watched modules on the side."""
    watch, read = _WATCHES.get(module), None
    if watch is not None and module not in watch.probs:  # a generation's later steps are not what was asked for
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        read = watch.read(module, query, key, value, attention_mask, scale)
        if read is not None and read.shape[1] == query.shape[2]:
            return read, None
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return (output if read is None else torch.cat([output[:, : -read.shape[1]], read], 1)), None


AttentionInterface.register("watched", _watched_attention)
# Without a mask function of the same name, a continuation of several tokens from a cache would run without its causal
# mask, and silently.
AttentionMaskInterface.register("watched", sdpa_mask)


@contextmanager
def watch(models, modules, graph=False, stop=False):
    """Read the softmax of some attention modules during the next forward pass: the last query's, where it is causal.

        with watch([language_model], [layer.self_attn]) as seen:
            model(...)
        seen[layer.self_attn]                  # (batch, heads, 1, keys) float32

    Args:
        models: the PreTrainedModels that hold the modules; their attention implementation is swapped, and put back on
            exit whatever happened.
        modules: attention modules in the order in which they run. Each is read once, at its first call.
        graph: keep autograd's graph from the first module's softmax (a leaf) upwards.
        stop: end the forward pass after the last module was read (the pass has no result then).
    """
    seen, found = Watch(modules, graph, stop), [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("watched")
    _WATCHES.update(dict.fromkeys(seen.modules, seen))
    try:
        yield seen
    except _SeenEnough:
        pass
    finally:
        for module in seen.modules:
            _WATCHES.pop(module, None)
        for model, implementation in zip(models, found, strict=True):
            model.set_attn_implementation(implementation)
    missed = len(seen.modules) - len(seen.probs)
    if missed:
        raise RuntimeError(f"{missed} of {len(seen.modules)} watched modules never ran their attention function")


@contextmanager
def undisturbed(modules):
    """All modules of a model (a list) in evaluation, with frozen weights, whatever grad or inference mode the caller is
    in; then put back."""
    training = [module for module in modules if module.training]
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    learning = [weight for weight in weights if weight.requires_grad]
    for module in training:
        module.training = False
    for weight in learning:
        weight.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for weight in learning:
            weight.requires_grad_(True)


def quietly(method):
    """Decorator for methods of a Look: the model is undisturbed while they run."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        with undisturbed(self.modules):
            return method(self, *args, **kwargs)

    return wrapped


def device_of(module):
    """Where a module wants its inputs: where its weights are, or where accelerate brings them if they are offloaded."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def brought_in(module):
    """A module's own parameters are there to be used, as in its forward pass, also if accelerate has offloaded them."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
