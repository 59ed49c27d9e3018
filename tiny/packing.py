"""Several questions about an image in one sequence: they see the image and themselves, but not each other.

Equal to asking each question alone, for the price of one pass over the image. A mask over the whole sequence would say
the same, but most of it is what nothing attends to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tiny.plain_attention import by_formula, pays
from vicrop.attention import with_implementation

IGNORE = -100  # label of a token that is no part of an answer
NAME = "packed turns"


@dataclass(frozen=True)
class Turn:
    """A question and its answer in tokens.

    Attributes:
        asked, answer: ids. name_ends: (number of the asked token that ends a thing's name, x, y) of each named thing.
    """

    asked: Sequence[int] = ()
    answer: Sequence[int] = ()
    name_ends: Sequence[tuple[int, int, int]] = ()

    def __len__(self):
        return len(self.asked) + len(self.answer)

    def labels(self, before: int = 0) -> Tensor:
        """(before + tokens, 3): the answer's ids, then x and y of the thing whose name ends there; else IGNORE."""
        found = torch.full((before + len(self), 3), IGNORE)
        found[len(found) - len(self.answer) :, 0] = torch.tensor(self.answer)
        for place, *xy in self.name_ends:
            found[before + place, 1:] = torch.tensor(xy)
        return found


@dataclass(frozen=True)
class Slots:
    """Where the parts of a sequence lie, the same in all rows: tokens 0 to `prefix`, then a slot for each turn.

    The end of a slot that is longer than its turn is padding: behind all that matters, so nothing attends to it.
    """

    prefix: int
    ends: Sequence[int]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first token, first token behind) of each slot."""
        return list(zip([self.prefix, *self.ends], self.ends, strict=False))


def pack(prefix: Sequence[int], rows: Sequence[Sequence[Turn]], pad: int) -> tuple[Tensor, Tensor, Tensor, Slots]:
    """Rows of a prefix and several turns. Rows whose turns are sorted by length have the least padding.

    Returns:
        ids and positions, each (rows, T), labels (rows, T, 3) as Turn has them; where the slots are.
    """
    widths = [max(map(len, of_all)) for of_all in zip_longest(*rows, fillvalue=Turn())]
    ends = (len(prefix) + torch.tensor(widths).cumsum(0)).tolist()
    slots, shape = Slots(len(prefix), ends), (len(rows), ends[-1])
    ids, labels = torch.full(shape, pad), torch.full((*shape, 3), IGNORE)
    positions = torch.cat([torch.arange(len(prefix)), *(len(prefix) + torch.arange(width) for width in widths)])
    ids[:, : len(prefix)] = torch.tensor(prefix)
    for row, turns in enumerate(rows):
        for turn, (start, _) in zip(turns, slots.bounds, strict=False):
            ids[row, start : start + len(turn)] = torch.tensor([*turn.asked, *turn.answer])
            labels[row, start : start + len(turn)] = turn.labels()
    return ids, labels, positions.repeat(len(rows), 1), slots


@contextmanager
def packed_attention(decoder: PreTrainedModel, slots: Slots) -> Iterator[None]:
    """Within, a decoder reads sequences that are laid out in slots."""
    AttentionInterface.register(NAME, partial(attend, slots=slots))
    with with_implementation(NAME, [decoder]):
        yield


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    slots: Slots,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention (rows, T, heads, dim): the prefix sees itself, each slot the prefix and itself, all causally."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    widths = [slots.prefix, *(end - start for start, end in slots.bounds)]
    (first, *prefix), *turns = zip(*(each.split(widths, 2) for each in (query, key, value)), strict=True)
    found = [last_of_causal(first, *prefix, scale)]
    for asked, *own in turns:
        keys, values = (torch.cat(both, 2) for both in zip(prefix, own, strict=True))
        found.append(last_of_causal(asked, keys, values, scale))
    return torch.cat(found, 2).transpose(1, 2), None


def last_of_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention (rows, heads, T, dim) of the last T of S tokens, of which there are keys and values."""
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask.tril(key.shape[2] - query.shape[2])
    if pays(query.device, query.dtype):
        return by_formula(query, key, value, scale, mask)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # the slots say who sees whom
