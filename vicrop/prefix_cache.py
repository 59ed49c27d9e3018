"""Calls in batches, and what a decoder has read of them: padded batches, KV caches, prefixes that calls share."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from vicrop.attention import with_implementation
from vicrop.decoder_call import DecoderCall, arguments_of


# ------------------------------------------------------------------------------------------------------------ batches
@dataclass(frozen=True)
class PaddedBatch:
    """Parts of several calls as one batch, a row for each, padded on the left so that all rows end together."""

    arguments: dict[str, Any]  # the decoder's, but for the 2-D mask
    real: Tensor  # (batch, T) bool, False at padding
    padded: bool  # is there any?

    @classmethod
    def of(cls, rows: Sequence[Sequence[DecoderCall]]) -> "PaddedBatch":
        """Of rows of parts that follow each other; the first parts of all rows end together, the second ones, ...

        Parts are batchable; a single part is whatever it is.
        """
        columns = list(zip(*rows, strict=True))
        widths = [max(part.tokens for part in column) for column in columns]
        padded = any(part.tokens < width for column, width in zip(columns, widths, strict=True) for part in column)

        def laid_out(values: Callable[[Any], Tensor], axis: int = 1, batch_axis: int = 0) -> Tensor:
            blocks = [torch.cat([left_padded(values(part), axis, width) for part in column], batch_axis)
                      for column, width in zip(columns, widths, strict=True)]  # fmt: skip
            return torch.cat(blocks, axis) if len(blocks) > 1 else blocks[0]

        (first, *more), *others = rows
        real = laid_out(lambda part: torch.ones_like(part.embeds[..., 0], dtype=torch.bool))
        if not more and not others:
            return cls(first.arguments(), real, padded)
        embeds, positions = laid_out(lambda part: part.embeds), laid_out(lambda part: part.positions, -1, -2)
        per_token = {name: laid_out(lambda part, name=name: part.per_token[name]) for name in first.per_token}
        deepstack = None
        if first.deepstack is not None:  # features of all rows, one after the other, as their places are
            parts: list[Any] = [part for row in rows for part in row]
            features = [torch.cat(layer) for layer in zip(*(part.deepstack.features for part in parts), strict=True)]
            shown = laid_out(lambda part: part.deepstack.shown)
            deepstack = first.deepstack._replace(shown=shown, features=features)
        return cls(arguments_of(embeds, positions, None, deepstack, per_token, first.constants), real, padded)


@lru_cache
def cache_argument(kind: type[PreTrainedModel]) -> str:
    """What models of a class call the argument for a KV cache: transformers renames it in 5.24."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def on_top_of(cache: DynamicCache, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments with which a model reads on top of a KV cache, and adds to it."""
    return {cache_argument(type(model)): cache, "use_cache": True}


def left_padded(values: Tensor, axis: int, width: int) -> Tensor:
    """The values with zeros before them along an axis, so that it is `width` long."""
    missing = list(values.shape)
    missing[axis] = width - values.shape[axis]
    return torch.cat([values.new_zeros(missing), values], axis) if missing[axis] else values


# ------------------------------------------------------------------------------------------------------------- caches
_Recurrent: Any = object  # stands for the class of transformers that the next one is mixed into


class _OutOfPlace(_Recurrent):
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


def _lasting(layer: Any) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        twin = object.__new__(type("OutOfPlace", (_OutOfPlace, type(layer)), {}))
        twin.__dict__.update(layer.__dict__)
        return twin
    return layer


class PrefixCache:
    """What a decoder has read for a batch of rows: KV cache, and which of its slots are no padding.

    `pending` are calls still unread, one per row: they go through the decoder with the next ones, in a single pass.
    """

    def __init__(self, cache: DynamicCache, real: Tensor, padded: bool, pending: Sequence[DecoderCall] = ()):
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

    def drop(self, counts: Sequence[int]) -> None:
        """Take back the last so many tokens of each row: those of all rows are cut, what others have more is masked."""
        most, least = max(counts), min(counts)
        if least:
            self.real = self.real[:, :-least]
            for layer in self._attending():
                layer.keys, layer.values = (each[:, :, :-least] for each in (layer.keys, layer.values))
        if most > least:
            left = torch.tensor(counts, device=self.real.device)[:, None] - least  # (batch, 1)
            behind = torch.arange(self.slots, 0, -1, device=self.real.device)  # 1 is the last slot
            self.real, self.padded = self.real & (behind > left), True

    def detach(self) -> None:
        """Let go of autograd's graph."""
        for layer in self._attending():
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def step(self, speaker: PreTrainedModel) -> dict[str, Any]:
        """The arguments with which a model reads one more token of each row on top of this."""
        if self.padded:
            self.real = torch.cat([self.real, self.real.new_ones(len(self.real), 1)], 1)
        mask = self.real.long() if self.padded else None
        return {"attention_mask": mask, **on_top_of(self.cache, speaker)}

    def extend(self, decoder: PreTrainedModel, parts: Sequence[DecoderCall]) -> Any:
        """The decoder's output over what is pending and the rows' next parts, in one pass."""
        rows = zip(self.pending, parts, strict=True) if self.pending else ([part] for part in parts)
        batch = PaddedBatch.of(list(rows))
        self.real, self.padded, self.pending = torch.cat([self.real, batch.real], 1), self.padded or batch.padded, []
        mask = {"attention_mask": self.real.long()} if self.padded else {}
        with with_implementation("captured", [decoder]):  # masks are made for it, however the model was loaded
            return decoder(**batch.arguments | mask | on_top_of(self.cache, decoder))


def _forked(layer: Any, slots: int, rows: list[int] | None) -> Any:
    """A layer of a cache that goes on by itself from some rows (None: all) of the first so many slots."""
    twin = copy.copy(layer)  # keys and values are shared until they grow; recurrent states are changed in place
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # states, and what is known of them, by number
            own = {key: each.clone() if isinstance(each, Tensor) else each for key, each in value.items()}
            setattr(twin, name, own)
    if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None and layer.values is not None:
        keys, values = (each[:, :, :slots] for each in (layer.keys, layer.values))
        twin.keys, twin.values = (keys, values) if rows is None else (keys[rows], values[rows])
    return twin


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

    Args:
        images: how many images the calls are about; so many caches are kept, and a few for questions of one image.
    """

    kept_caches, kept_prefixes = 3, 64

    def __init__(self, decoder: PreTrainedModel, images: int = 1):
        self.decoder, self.kept_caches = decoder, self.kept_caches + images
        layers = DynamicCache(config=decoder.config).layers
        # May padding stand between a row's tokens? Not in a sliding window, and not where states advance on it. May a
        # pass end before the last layer? Not where later layers have states that would miss it.
        self.takes_padding = all(type(layer) is DynamicLayer for layer in layers)
        self.can_stop = not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self.takes_drafts = self.can_stop  # states cannot go back to before a wrong token, keys and values can
        self.prefixes: list[Prefix] = []
        self.caches: list[tuple[list[Prefix], PrefixCache]] = []
        self.beginnings: list[int | None] = []  # the image of each beginning that was new; None where it had no end

    @property
    def shared(self) -> bool | None:
        """Do all calls about an image continue from one prefix? None before there was a call."""
        new = self.beginnings
        return len(set(new) - {None}) == len(new) if new else None

    def row(self, image: int, call: DecoderCall) -> Row:
        """A call as a Row; the image's tokens and what must go with them are its prefix."""
        for prefix in self.prefixes:
            if prefix.image == image and call.begins_like(prefix.call, prefix.stop):
                return Row(prefix, call.part(prefix.stop))
        first = int(call.image_at[-1]) + 1  # a closing mark may belong to a block of tokens that see each other
        stop = next((n for n in range(first, min(first + 3, call.length)) if not call.sees_past(n)), None)
        self.beginnings.append(None if stop is None else image)
        if stop is None:
            return Row(None, call)
        prefix = Prefix(image, call.part(0, stop).owned())
        self.prefixes = [*self.prefixes[-self.kept_prefixes :], prefix]
        return Row(prefix, call.part(stop))

    def begin(self, rows: Sequence[Row], depth: int) -> tuple[PrefixCache, list[int]]:
        """(a cache that holds the rows' prefixes or has them pending, for each row what a token's number lacks to its
        slot).

        Args:
            depth: how many layers the coming pass will reach.
        """
        prefixes = [row.prefix for row in rows if row.prefix is not None]
        if len(prefixes) < len(rows):
            device, width = rows[0].rest.embeds.device, max(row.rest.length for row in rows)
            real = torch.ones(len(rows), 0, dtype=torch.bool, device=device)
            return PrefixCache(new_cache(self.decoder), real, False), [width - row.rest.length for row in rows]
        wanted = list(dict.fromkeys(prefixes))
        held, cache = next(((held, cache) for held, cache in reversed(self.caches)
                            if set(wanted) <= set(held) and cache.covers_layers(depth)), (wanted, None))  # fmt: skip
        if cache is None:
            calls = [prefix.call for prefix in wanted]
            batch = PaddedBatch.of([[call] for call in calls])
            cache = PrefixCache(new_cache(self.decoder), batch.real, batch.padded)
            begun = PrefixCache(cache.cache, cache.real[:, :0], False, calls)
            if len(wanted) == len(rows) and cache.can_be_cut() and all(call.batchable for call in calls):
                # Each row has a prefix of its own: it is read together with what the row reads on.
                self._keep(wanted, cache)
                return begun, [cache.slots - prefix.stop for prefix in prefixes]
            begun.pending = []
            begun.extend(self.decoder, calls)  # only then is it kept: a pass that failed leaves states that look whole
        self._keep(held, cache)
        forked = cache.fork([held.index(prefix) for prefix in prefixes])
        return forked, [cache.slots - prefix.stop for prefix in prefixes]

    def _keep(self, held: list[Prefix], cache: PrefixCache) -> None:
        """As the one that was used last; those that hold nothing else go, and the ones that were not used for long."""
        others = [pair for pair in self.caches if pair[1] is not cache and not set(pair[0]) <= set(held)]
        self.caches = [*others[-(self.kept_caches - 1) :], (held, cache)]
