"""Attention out of any transformers model, while it runs as it was loaded, and it is left as it was found.

`capture_attention` reads single softmax rows beside SDPA: nothing needs `output_attentions` or an eager model, and no
matrix ever holds more than the rows asked for. Nothing else here touches a model's attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vicrop.redirection import redirect

Given = ParamSpec("Given")
Got = TypeVar("Got")
# Arguments of an attention function that change nothing beside mask and scaling: how to run it, or what masks say.
KNOWN_ARGUMENTS = {
    "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "num_items_in_batch", "logits_to_keep", "output_router_logits",
}  # fmt: skip


class StopForward(Exception):
    """Leaves a forward pass once the last captured module has been read."""


# ----------------------------------------------------------------------------------------------------- small contexts
@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is another value for the moment."""
    own, found = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, found) if own else delattr(owner, name)


@contextmanager
def counted(module: nn.Module) -> Iterator[list]:
    """A list that grows by one with each forward pass of a module; not where another forward stands in for its own."""
    passes, forward = [], module.forward

    @wraps(forward)
    def counting(*args, **kwargs):
        passes.append(None)
        return forward(*args, **kwargs)

    with replaced(module, "forward", counting):
        yield passes


@contextmanager
def with_implementation(name: str, models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """These models run a registered attention function for the moment. Their configs say which one.

    Raises:
        ValueError: a model computes attention by itself, whatever its config says.
    """
    for model in models:
        if not model._can_set_attn_implementation():
            raise ValueError(f"the attention of {type(model).__name__} cannot be read: it has no attention interface")
    configs = {id(model.config): model.config for model in models}.values()
    found = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, found, strict=True):
            config._attn_implementation_internal = implementation


# ------------------------------------------------------------------------------------------------------------ capture
class AttentionCapture:
    """What `capture_attention` found: `probs[module]` is (batch, heads, rows, keys) float32, softmax over keys."""

    def __init__(self, modules: Sequence[nn.Module], graph: bool, stop: bool, leaf: bool,
                 words: Sequence[slice] = ()):  # fmt: skip
        self.modules, self.graph, self.stop, self.leaf, self.words = list(modules), graph, stop, leaf, words
        self.probs: dict[nn.Module, Tensor] = {}

    def read(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
             scaling: float) -> Tensor | None:  # fmt: skip
        """Store a module's rows; with a graph, also return the attention output (batch, rows, heads, dim) of them."""
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, dim=1).float()
        first = self.first_row(module, query)
        scores = query[:, :, first:].float() @ keys.transpose(2, 3) * scaling  # (batch, heads, rows, keys)
        if mask is not None:
            allowed = mask[:, :, first:, : keys.shape[2]]
            scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
        elif causal(module) and scores.shape[2] > 1:  # without a mask, attention that is causal is plainly so
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(later.triu(scores.shape[3] - scores.shape[2] + 1), float("-inf"))
        probs = scores.softmax(-1)
        if self.words:
            rows = zip(probs, self.words, strict=True)
            probs = torch.stack([each[:, own].mean(1, keepdim=True) for each, own in rows])
        if not self.graph or (self.leaf and not self.probs):
            # With a graph, only the first (lowest) module's softmax is a leaf. Later ones depend on it, so they stay in
            # the graph: were they leaves as well, the gradient of the lower ones would lose every path through them.
            probs = probs.detach()
        self.probs[module] = probs.requires_grad_() if self.graph and probs.is_leaf else probs
        if self.stop and len(self.probs) == len(self.modules):
            raise StopForward
        if not self.graph:
            return None
        return (probs.to(value.dtype) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)

    def first_row(self, module: nn.Module, query: Tensor) -> int:
        """The first query row to read: of causal attention the last ones only, of any other (a Q-Former's) all."""
        last = max((-own.start for own in self.words), default=1)
        return max(0, query.shape[2] - last) if causal(module) else 0


def causal(module: nn.Module) -> bool:
    """Does a query of an attention module see no later key?"""
    return getattr(module, "is_causal", True)


_CAPTURES: dict[nn.Module, AttentionCapture] = {}  # filled only inside `capture_attention`


def _refuse_unknown(module: nn.Module, arguments: dict[str, Any]) -> None:
    unknown = [name for name, value in arguments.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} computes its attention with {', '.join(unknown)}, which is not "
                         "known here: what is read of it would be wrong")  # fmt: skip


def _captured_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function of "captured": SDPA, and some rows of captured modules on the side."""
    _refuse_unknown(module, kwargs)
    capture, read = _CAPTURES.get(module), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if capture is not None and module not in capture.probs:  # later steps of a generation are not what was asked for
        read = capture.read(module, query, key, value, attention_mask, scale)
        if read is not None and read.shape[1] == query.shape[2]:
            return read, None
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = redirect(module, output, query, key, value, attention_mask, scale)
    return (output if read is None else torch.cat([output[:, : -read.shape[1]], read], 1)), None


AttentionInterface.register("captured", _captured_attention)
# Without a mask function of the same name, a continuation of several tokens from a cache would run without its causal
# mask, and silently.
AttentionMaskInterface.register("captured", sdpa_mask)


@contextmanager
def capture_attention(models: Sequence[PreTrainedModel], modules: Sequence[nn.Module], graph: bool = False,
                      stop: bool = False, leaf: bool = True,
                      words: Sequence[slice] = ()) -> Iterator[AttentionCapture]:  # fmt: skip
    """Read the softmax of some attention modules during the next forward pass: one row, where it is causal.

        with capture_attention([language_model], [layer.self_attn]) as captured:
            model(...)
        captured.probs[layer.self_attn]        # (batch, heads, 1, keys) float32, of the last query

    Args:
        models: the PreTrainedModels that hold the modules; their attention implementation is swapped, and put back on
            exit whatever happened.
        modules: attention modules in the order in which they run. Each is read once, at its first call.
        graph: keep autograd's graph from the first module's softmax (a leaf) upwards.
        stop: end the forward pass after the last module was read (the pass has no result then).
        leaf: with a graph, is the first module's softmax where it begins? Not if it has begun further below already.
        words: for each row of the batch the queries, counted from the end, of which the mean is read instead; without
            a graph.
    Raises:
        ValueError: a module's scores come from more than queries, keys, mask and scaling (a soft cap, sinks, ...).
        RuntimeError: a module never ran the attention function.
    """
    capture = AttentionCapture(modules, graph, stop, leaf, words)
    _CAPTURES.update(dict.fromkeys(capture.modules, capture))
    try:
        with with_implementation("captured", models):
            yield capture
    except StopForward:
        pass
    finally:
        for module in capture.modules:
            _CAPTURES.pop(module, None)
    missed = len(capture.modules) - len(capture.probs)
    if missed:
        raise RuntimeError(f"{missed} of {len(capture.modules)} captured modules never ran their attention function")


# ------------------------------------------------------------------------------------------------- left as it was found
class FrozenModel:
    """A model whose parts are listed once: finding them takes as long as a small model's layer."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, list(model.modules())
        self.offloaded = any("_hf_hook" in vars(module) for module in self.modules)

    @contextmanager
    def frozen_eval(self) -> Iterator[None]:
        """All modules in evaluation, weights frozen, nothing compiled, whatever grad mode the caller is in.

        Then all is put back, also what the model remembers of a prompt (Qwen's `rope_deltas`).
        """
        changes: list[tuple[Any, str, Any]] = [
            (module, "training", False) for module in self.modules if module.training
        ]
        weights = [weight for module in self.modules for weight in module._parameters.values() if weight is not None]
        changes += [(weight, "requires_grad", False) for weight in weights if weight.requires_grad]
        for module in self.modules:
            if vars(module).get("_compiled_call_impl") is not None:
                changes.append((module, "_compiled_call_impl", None))
            if "rope_deltas" in vars(module):
                changes.append((module, "rope_deltas", module.rope_deltas))
        found = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            for owner, name, value in found:
                setattr(owner, name, value)

    @contextmanager
    def checked_gradients(self) -> Iterator[None]:
        """A quantised model's layers must hand gradients on while this lasts: some backends' kernels drop them.

        Raises:
            ValueError: naming the layer's class and the model's quantisation.
        """
        settings = getattr(self.model.config, "quantization_config", None) or {}
        backend = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method

        def check(module, inputs, output):
            wanted = any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
            floating = isinstance(output, Tensor) and output.is_floating_point()
            if wanted and floating and not output.requires_grad:
                name = f"{type(module).__name__} of a model quantised by {getattr(backend, 'value', backend)}"
                raise ValueError(f"{name} hands no gradient on: use rel_att or loc_att, or other weights")

        leaves = [module for module in self.modules if not any(module.children())] if settings else []
        hooks = [module.register_forward_hook(check) for module in leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def frozen_eval(function: Callable[Concatenate[Any, Given], Got]) -> Callable[Concatenate[Any, Given], Got]:
    """Decorator: the model of a session, the first argument, is frozen and in evaluation while the function runs."""

    @wraps(function)
    def wrapped(session: Any, *args: Given.args, **kwargs: Given.kwargs) -> Got:
        with session.frozen.frozen_eval():
            return function(session, *args, **kwargs)

    return wrapped


# -------------------------------------------------------------------------------------------------------------- devices
def device_of(module: nn.Module) -> torch.device:
    """Where a module wants its inputs: where its weights are, or where accelerate brings them if they are offloaded."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
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
