"""What a model's own forward hands its decoder for a prompt, and slices of that over a KV cache.

    call = captured_call(model, decoder, inputs, ids)     # the model prepares the prompt; its decoder does not run
    decoder(**call.arguments(0, 9), past_key_values=cache, use_cache=True)      # the first nine tokens
    decoder(**call.arguments(9), past_key_values=cache, use_cache=True)         # and the others, on top of them

Embeddings, positions, masks and deepstack features are the model's. Nothing here knows a family.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from vicrop.attention import replaced, with_implementation

BLOCK = 1024  # rows of a mask that are made at once, to be looked at
# What a decoder is handed that says how to run it, not what to read.
SWITCHES = ("past_key_values", "cache_position", "use_cache", "labels", "return_dict",
            "output_attentions", "output_hidden_states")  # fmt: skip

# Arguments by which features go into some of a decoder's layers: which tokens get some, and what each layer adds there.
DEEPSTACKS = (("visual_pos_masks", "deepstack_visual_embeds"), ("vision_mask", "deepstack_features"))


# ------------------------------------------------------------------------------------------------------------- masks
@dataclass(frozen=True)
class MaskRule:
    """A mask as the function that makes its rows, so that tokens x tokens never exist at once."""

    make: Callable[..., Any]  # transformers' sdpa_mask, with the model's mask function filled in

    def rows(self, start: int, stop: int) -> Tensor | None:
        """(1, 1, stop - start, stop) bool, or None where that is plainly causal and SDPA needs none."""
        return self.make(q_length=stop - start, kv_length=stop, q_offset=start)

    def sees_past(self, stop: int, length: int) -> bool:
        """Does any of the first `stop` tokens see one of the later ones, up to `length`?"""
        later = {"kv_length": length - stop, "kv_offset": stop, "allow_is_causal_skip": False}
        starts = range(0, stop, BLOCK)
        return any(bool(self.make(q_length=min(BLOCK, stop - at), q_offset=at, **later).any()) for at in starts)

    def causal(self, start: int, stop: int) -> bool:
        """Does none of the tokens from `start` to `stop` see a later one of them?"""
        rows = self.rows(start, stop) if start < stop else None
        return rows is None or not bool(rows[..., start:].triu(1).any())


def _rule(batch_size: int, device: Any, mask_function: Callable, attention_mask=None, **options: Any) -> MaskRule:
    """The mask function of "deferred": it keeps how a mask is made, and makes none."""
    _kept_mask(attention_mask)
    kept = {name: options[name] for name in ("allow_is_causal_skip", "local_size", "use_vmap") if name in options}
    return MaskRule(partial(sdpa_mask, batch_size=1, mask_function=mask_function, device=device, **kept))


AttentionInterface.register("deferred", sdpa_attention_forward)
AttentionMaskInterface.register("deferred", _rule)


def _kept_mask(mask: Any) -> MaskRule | None:
    """A mask as handed to a decoder; a 2-D one of a single prompt says nothing: no token of it is padding.

    Raises:
        ValueError: the model masks tokens, or has made a table of all tokens by all tokens by itself.
    """
    if mask is None or isinstance(mask, MaskRule):
        return mask
    if mask.dim() != 2 or not bool(mask.all()):
        raise ValueError(f"the model hands its decoder a mask of shape {tuple(mask.shape)} of its own making")
    return None


# -------------------------------------------------------------------------------------------------------------- calls
class Deepstack(NamedTuple):
    """Features of an image's tokens that a decoder adds in its layers."""

    shown: Tensor  # (1, tokens) or (1, tokens, 1) bool: which tokens get some
    features: list[Tensor]  # (those tokens, dim), of a layer each
    names: tuple[str, str]  # of the decoder's arguments
    layers: tuple[int, ...] | None  # where it takes a table by layer; else a list

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Deepstack | None":
        """Taken out of what a decoder is handed; None if there is none."""
        found = [(kept.pop(shown, None), kept.pop(features, None), (shown, features)) for shown, features in DEEPSTACKS]
        for shown, features, names in found:
            if features is not None:
                layers = tuple(features) if isinstance(features, dict) else None
                return cls(shown, list(features if layers is None else features.values()), names, layers)
        return None

    def part(self, first: int, last: int) -> "Deepstack":
        """The same for tokens from number `first` up to `last`."""
        low, high = int(self.shown[:, :first].sum()), int(self.shown[:, :last].sum())
        return self._replace(shown=self.shown[:, first:last], features=[each[low:high] for each in self.features])

    def arguments(self) -> dict[str, Any]:
        """As the decoder takes it."""
        features: Any = self.features if self.layers is None else dict(zip(self.layers, self.features, strict=True))
        return dict(zip(self.names, (self.shown, features), strict=True))


@dataclass(frozen=True)
class DecoderCall:
    """What a model's own forward hands its decoder for one prompt of T tokens, from token `start` on.

    Attributes:
        ids: (T,) token ids, all of them, on the CPU.
        image_at: (N,) numbers of the tokens that stand for the first image.
        embeds: (1, T - start, dim).
        positions: (..., 1, T - start), several axes where rotary positions have several.
        masks: per kind of layer, or under None for all of them; None where attention is plainly causal.
        deepstack: features that are added in layers, or None.
        per_token: {name: (1, T - start, ...)} further arguments with a value for each token.
        constants: {name: value} further arguments.
        through: attention of a connector's tokens to the patches of each image (images, heads, N, patches), if any.
    """

    ids: Tensor
    image_at: Tensor
    embeds: Tensor
    positions: Tensor
    masks: dict[str | None, MaskRule | None]
    deepstack: Deepstack | None
    per_token: dict[str, Tensor]
    constants: dict[str, Any]
    through: Tensor | None = None
    start: int = 0

    @property
    def length(self) -> int:
        """T, the prompt's number of tokens."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """The number of tokens that this part is about, from `start` on."""
        return self.embeds.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that keeping this call takes."""
        through, deepstack = (
            [] if self.through is None else [self.through],
            self.deepstack.features if self.deepstack else [],
        )
        return sum(each.nbytes for each in (self.embeds, *through, *deepstack, *self.per_token.values()))

    @property
    def batchable(self) -> bool:
        """Can it go through the decoder beside others, with padding between? Not where the model made its own masks."""
        return self.masks == {None: None}

    def rows_of_masks(self, start: int, stop: int) -> Any:
        """The masks of tokens `start` to `stop`, as the decoder takes them."""
        rows = {kind: mask and mask.rows(start, stop) for kind, mask in self.masks.items()}
        return rows.get(None, rows)

    def part(self, start: int, stop: int | None = None) -> "DecoderCall":
        """The same for tokens from number `start` up to `stop` only (default: the last one)."""
        first, last = start - self.start, (self.length if stop is None else stop) - self.start
        cut = {name: value[:, first:last] for name, value in self.per_token.items()}
        deepstack = self.deepstack and self.deepstack.part(first, last)
        ids = self.ids[: self.start + last]
        embeds, positions = self.embeds[:, first:last], self.positions[..., first:last]
        return replace(self, ids=ids, embeds=embeds, positions=positions, deepstack=deepstack, per_token=cut,
                       start=start)  # fmt: skip

    def owned(self) -> "DecoderCall":
        """The same, holding no more memory than its own tokens need."""
        cut, deepstack = {name: value.clone() for name, value in self.per_token.items()}, self.deepstack
        if deepstack is not None:
            features = [each.clone() for each in deepstack.features]
            deepstack = deepstack._replace(shown=deepstack.shown.clone(), features=features)
        embeds, positions = self.embeds.clone(), self.positions.clone()
        return replace(self, embeds=embeds, positions=positions, per_token=cut, deepstack=deepstack)

    def sees_past(self, stop: int) -> bool:
        """Does any of the first `stop` tokens see a later one? Then they cannot be read without it."""
        return any(mask is not None and mask.sees_past(stop, self.length) for mask in self.masks.values())

    def causal_from(self, stop: int) -> bool:
        """Does no token see a later one from number `stop` on? Then those may be read that turn out to be wrong."""
        return not self.sees_past(stop) and all(mask is None or mask.causal(stop, self.length)
                                                for mask in self.masks.values())  # fmt: skip

    def begins_like(self, other: "DecoderCall", stop: int) -> bool:
        """Is the decoder handed the very same for the first `stop` tokens, and do they see nothing behind?"""
        if min(self.length, other.length) < stop or not torch.equal(self.ids[:stop], other.ids[:stop]):
            return False
        if self.sees_past(stop):
            return False
        mine, others = (call.part(0, stop) for call in (self, other))
        return all(type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
                   for a, b in zip(mine.handed(), others.handed(), strict=True))  # fmt: skip

    def handed(self) -> Iterator[Any]:
        """All that the decoder is handed, value by value; of masks a block of rows at a time."""
        yield from (self.embeds, self.positions, *self.per_token.values(), *self.constants.values())
        yield from self.deepstack.features if self.deepstack else ()
        for at in range(0, 0 if self.batchable else self.length, BLOCK):
            rows = self.rows_of_masks(at, min(at + BLOCK, self.length))
            yield from rows.values() if isinstance(rows, dict) else [rows]

    def arguments(self, start: int | None = None, stop: int | None = None) -> dict[str, Any]:
        """The decoder's arguments for tokens `start` to `stop` (default: all) on top of a cache of those before."""
        part = self.part(self.start if start is None else start, stop)
        rows = part.rows_of_masks(part.start, part.length)
        return arguments_of(part.embeds, part.positions, rows, part.deepstack, part.per_token, part.constants)


def arguments_of(embeds: Tensor, positions: Tensor, masks: Any, deepstack: Deepstack | None,
                 per_token: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """A decoder's arguments, under the names that transformers gives them."""
    found = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": masks, **constants}
    if deepstack is not None:
        found |= deepstack.arguments()
    return found | per_token


class _Unread(BaseModelOutputWithPast):
    """A decoder's output that has nothing else that a model may look for behind it (what went to which experts)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def captured_call(model: nn.Module, decoder: PreTrainedModel, inputs: dict[str, Any], ids: Tensor,
                  image_at: Tensor) -> DecoderCall:  # fmt: skip
    """The DecoderCall of a prompt: the model's own forward runs, and its decoder only keeps what it is handed.

    The forward goes on to its end, over a single token: whatever wraps a module (accelerate's offload, say) finishes.

    Args:
        inputs: what the model's forward is given, `input_ids` among it; ids, image_at: see DecoderCall.
    Raises:
        ValueError: the decoder is handed something that cannot be cut into tokens.
    """
    kept: dict[str, Any] = {}

    def keep(*, inputs_embeds, **others):  # by name, or nothing would say what an argument is
        kept.update(others, inputs_embeds=inputs_embeds)
        return _Unread(last_hidden_state=inputs_embeds[:, -1:])

    with with_implementation("deferred", [decoder]), replaced(decoder, "forward", keep):
        model(**inputs, use_cache=True)
    return _call_of(kept, ids, image_at)


def _call_of(kept: dict[str, Any], ids: Tensor, image_at: Tensor) -> DecoderCall:
    embeds, positions, masks = (kept.pop(name, None) for name in ("inputs_embeds", "position_ids", "attention_mask"))
    deepstack = Deepstack.of(kept)
    if embeds is None or embeds.shape[1] != len(ids):
        count = "no" if embeds is None else embeds.shape[1]
        raise ValueError(f"the decoder is handed {count} embeddings for a prompt of {len(ids)} tokens")
    masks = {kind: _kept_mask(each) for kind, each in (masks if isinstance(masks, dict) else {None: masks}).items()}
    per_token, constants = {}, {}
    for name, value in kept.items():
        if name in SWITCHES or value is None or isinstance(value, Cache):  # a cache, by any name: ours are used
            continue
        if isinstance(value, Tensor) and value.dim() > 1:
            if value.shape[1] != len(ids):
                raise ValueError(f"{name} of shape {tuple(value.shape)} has no axis for {len(ids)} tokens")
            per_token[name] = value
        elif isinstance(value, (dict, list, tuple, Tensor)):
            raise ValueError(f"the decoder is handed {name}, and nothing says how it is cut into tokens")
        else:
            constants[name] = value
    if positions is None:
        positions = torch.arange(len(ids), device=embeds.device)[None]
    return DecoderCall(ids, image_at, embeds, positions, masks, deepstack, per_token, constants)
