"""Calls in batches, and what a decoder has read of them: padded batches, KV caches, prefixes that calls share."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from decoder_call import DecoderCall, arguments_of


# ------------------------------------------------------------------------------------------------------------ batches
@dataclass(frozen=True)
class PaddedBatch:
    """Parts of several calls as one batch, a row for each, padded on the left so that all rows end together."""

    arguments: dict[str, Any]  # the decoder's, but for the 2-D mask
    real: Tensor  # (batch, T) bool, False at padding
    padded: bool  # is there any?

    @classmethod
    def of(cls, parts: Sequence[DecoderCall]) -> "PaddedBatch":
        """Of parts that are all batchable; of a single one whatever it is."""
        if len(parts) == 1:
            (part,) = parts
            real = torch.ones(1, part.embeds.shape[1], dtype=torch.bool, device=part.embeds.device)
            return cls(part.arguments(), real, False)
        width = max(part.embeds.shape[1] for part in parts)
        pads = [width - part.embeds.shape[1] for part in parts]
        pairs = list(zip(parts, pads, strict=True))
        embeds = torch.cat([F.pad(part.embeds, (0, 0, pad, 0)) for part, pad in pairs])
        positions = torch.cat([F.pad(part.positions, (pad, 0)) for part, pad in pairs], -2)
        per_token = {
            name: torch.cat([_padded_tokens(part.per_token[name], pad) for part, pad in pairs])
            for name in parts[0].per_token or {}
        }
        deepstack = None
        if parts[0].deepstack is not None:  # features of all rows, one after the other, as their places are
            shown = torch.cat([F.pad(part.deepstack[0], (pad, 0)) for part, pad in pairs])
            deepstack = shown, [torch.cat(each) for each in zip(*(part.deepstack[1] for part in parts), strict=True)]
        real = torch.arange(width, device=embeds.device) >= torch.tensor(pads, device=embeds.device)[:, None]
        return cls(arguments_of(embeds, positions, None, deepstack, per_token, parts[0].constants), real, any(pads))


def _padded_tokens(value: Tensor, pad: int) -> Tensor:
    return F.pad(value, (0, 0) * (value.dim() - 2) + (pad, 0))


# ------------------------------------------------------------------------------------------------------------- caches
class _OutOfPlace:
    """For recurrent layers of a cache: a new state takes the old one's place, which others may still hold."""

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        self._own(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self._own(self.recurrent_states, state_idx)
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def _own(self, states, state_idx):
        if states[state_idx] is not None:
            states[state_idx] = states[state_idx].clone()


def new_cache(decoder: PreTrainedModel) -> DynamicCache:
    """An empty cache for a decoder. It forgets nothing: masks know of sliding windows, and slices need what was."""
    cache = DynamicCache(config=decoder.config)
    cache.layers = [_lasting(layer) for layer in cache.layers]
    return cache


def _lasting(layer):
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        twin = object.__new__(type("OutOfPlace", (_OutOfPlace, type(layer)), {}))
        twin.__dict__.update(layer.__dict__)
        return twin
    return layer


def takes_padding(decoder: PreTrainedModel) -> bool:
    """May padding stand between a row's tokens? Not in a sliding window, and not where states advance on it."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=decoder.config).layers)


class PrefixCache:
    """What a decoder has read for a batch of rows: KV cache, and which of its slots are no padding.

    `pending` are batches still unread: they go through the decoder together with the next one, in a single pass.
    """

    def __init__(self, cache: DynamicCache, real: Tensor, padded: bool, pending: Sequence[PaddedBatch] = ()):
        self.cache, self.real, self.padded, self.pending = cache, real, padded, list(pending)  # real: (batch, slots)

    @property
    def slots(self) -> int:
        """The number of tokens in the cache, padding among them."""
        return self.real.shape[1]

    def covers_layers(self, depth: int) -> bool:
        """Do so many layers hold all slots? A pass that was cut short left none in those that it never reached."""
        return all(layer.get_seq_length() >= self.slots for layer in self._attending()[:depth])

    def _attending(self) -> list:
        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]

    def can_be_cut(self) -> bool:
        """Can a continuation be taken back by cutting keys and values? Recurrent states cannot."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def fork(self, rows: list[int]) -> "PrefixCache":
        """A cache that goes on from some rows of this one, picked and repeated; it ends an earlier continuation.

        One set of keys and values serves them all, cut back to this one's slots each time: a copy would be a second set
        in memory. Only rows that are not just these are copied, and recurrent states, which cannot be cut back.
        """
        same = rows == list(range(len(self.real)))
        if self.can_be_cut() and same:
            for layer in self._attending():
                if layer.is_initialized:
                    layer.keys, layer.values = (each[:, :, : self.slots] for each in (layer.keys, layer.values))
            return PrefixCache(self.cache, self.real, self.padded)
        cache = copy.copy(self.cache)
        cache.layers = [_forked(layer, self.slots, None if same else rows) for layer in cache.layers]
        return PrefixCache(cache, self.real[rows], self.padded)

    def extend(self, decoder: PreTrainedModel, *batches: PaddedBatch) -> Any:
        """The decoder's output over what is pending and the next batches, in one pass."""
        batches = [*self.pending, *batches]
        arguments = batches[0].arguments if len(batches) == 1 else _joined([each.arguments for each in batches])
        self.real, self.pending = torch.cat([self.real, *(each.real for each in batches)], 1), []
        self.padded = self.padded or any(each.padded for each in batches)
        if self.padded:
            arguments = arguments | {"attention_mask": self.real.long()}
        return decoder(**arguments, past_key_values=self.cache, use_cache=True)


def _forked(layer, slots, rows):
    """A layer of a cache that goes on by itself from some rows (None: all) of the first so many slots."""
    twin = copy.copy(layer)  # keys and values are shared until they grow; recurrent states are replaced, not changed
    states = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
    twin.__dict__.update(states)
    if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None:
        keys, values = (each[:, :, :slots] for each in (layer.keys, layer.values))
        twin.keys, twin.values = (keys, values) if rows is None else (keys[rows], values[rows])
    return twin


def _joined(arguments: list[dict[str, Any]]) -> dict[str, Any]:
    """The decoder's arguments for batches of the same rows, one after the other."""
    found = dict(arguments[0])
    for name, first in arguments[0].items():
        values = [each[name] for each in arguments]
        if name == "position_ids":
            found[name] = torch.cat(values, -1)
        elif name == "deepstack_visual_embeds":
            found[name] = _by_row([each["visual_pos_masks"] for each in arguments], values)
        elif isinstance(first, Tensor):
            found[name] = torch.cat(values, 1)
    return found


def _by_row(shown: list[Tensor], features: list[list[Tensor]]) -> list[Tensor]:
    """Deepstack features of batches that follow each other, in the order of their places: row by row."""
    counts = [each.sum(1).tolist() for each in shown]
    layers = []
    for layer in zip(*features, strict=True):
        pieces = [each.split(count) for each, count in zip(layer, counts, strict=True)]
        layers.append(torch.cat([piece for row in zip(*pieces, strict=True) for piece in row]))
    return layers


# ----------------------------------------------------------------------------------------------------- shared prefixes
@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginning of calls about an image, as far as they are the same; each stands for itself, whatever it holds."""

    image: int
    call: DecoderCall  # of these tokens only

    @property
    def stop(self) -> int:
        """The first token that is no part of it."""
        return self.call.length


class Row(NamedTuple):
    """A call in two parts: what it shares with others about its image, and the rest."""

    prefix: Prefix | None  # None: nothing is shared, and `rest` is all of it
    rest: DecoderCall


class PrefixStore:
    """Prefixes that a decoder has read, for all calls that begin alike. What does not begin alike is read anew.

    Attributes:
        shared: is any call's beginning one that others can share? None before there was a call.
    """

    kept_caches = 4  # so many at most: an instruction-aware model needs one for every question

    def __init__(self, decoder: PreTrainedModel):
        self.decoder, self.shared = decoder, None
        # May a pass end before the last layer? Not where later layers have states that would miss it.
        self.can_stop = all(type(layer) is DynamicLayer for layer in new_cache(decoder).layers)
        self.prefixes: list[Prefix] = []
        self.caches: list[tuple[list[Prefix], PrefixCache]] = []

    def row(self, image: int, call: DecoderCall) -> Row:
        """A call as a Row; the image's tokens and what must go with them are its prefix."""
        prefix = self._prefix_of(image, call)
        self.shared = self.shared is not False and prefix is not None
        return Row(prefix, call if prefix is None else call.part(prefix.stop))

    def _prefix_of(self, image: int, call: DecoderCall) -> Prefix | None:
        for prefix in self.prefixes:
            if prefix.image == image and call.begins_like(prefix.call, prefix.stop):
                return prefix
        first = int(call.image_at[-1]) + 1  # a closing mark may belong to a block of tokens that see each other
        stop = next((n for n in range(first, min(first + 3, call.length)) if not call.sees_past(n)), None)
        if stop is None:
            return None
        self.prefixes.append(Prefix(image, call.part(0, stop).owned()))
        return self.prefixes[-1]

    def begin(self, rows: Sequence[Row], depth: int) -> tuple[PrefixCache, list[int]]:
        """(a cache that holds the rows' prefixes or has them pending, for each row what a token's number lacks to its
        slot).

        Args:
            depth: how many layers the coming pass will reach.
        """
        if any(row.prefix is None for row in rows):
            device, width = rows[0].rest.embeds.device, max(row.rest.length for row in rows)
            real = torch.ones(len(rows), 0, dtype=torch.bool, device=device)
            return PrefixCache(new_cache(self.decoder), real, False), [width - row.rest.length for row in rows]
        wanted = list(dict.fromkeys(row.prefix for row in rows))
        held, cache = next(((held, cache) for held, cache in self.caches
                            if set(wanted) <= set(held) and cache.covers_layers(depth)), (wanted, None))  # fmt: skip
        if cache is None:
            cache, pending = self._unread(wanted)
            if len(wanted) == len(rows) and pending.arguments["attention_mask"] is None and cache.can_be_cut():
                # Each row has a prefix of its own: it is read together with what the row reads on.
                begun = PrefixCache(cache.cache, cache.real[:, :0], False, [pending])
                return begun, [cache.slots - row.prefix.stop for row in rows]
            PrefixCache(cache.cache, cache.real[:, :0], False, [pending]).extend(self.decoder)
        forked = cache.fork([held.index(row.prefix) for row in rows])
        return forked, [cache.slots - row.prefix.stop for row in rows]

    def _unread(self, prefixes: list[Prefix]) -> tuple[PrefixCache, PaddedBatch]:
        """(the cache that will hold these prefixes, what has to be read for that); it is kept."""
        pending = PaddedBatch.of([prefix.call for prefix in prefixes])
        cache = PrefixCache(new_cache(self.decoder), pending.real, pending.padded)
        others = [(held, each) for held, each in self.caches if not set(held) <= set(prefixes)]
        self.caches = [*others[-(self.kept_caches - 1) :], (prefixes, cache)]
        return cache, pending
