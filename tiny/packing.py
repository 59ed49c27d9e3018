"""Several questions about an image in one sequence: they see the image and themselves, but not each other.

Equal to asking each question alone, for the price of one pass over the image. A mask over the whole sequence would say
the same, but most of it is what nothing attends to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from vicrop.attention import with_implementation

IGNORE = -100  # label of a token that is no part of an answer
NAME = "packed turns"
Turn = tuple[Sequence[int], Sequence[int]]  # ids of what is asked, ids of the answer


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
        ids, labels (IGNORE but at the answers) and positions, each (rows, T); where the slots are.
    """
    widths = [max(len(asked) + len(answer) for asked, answer in of_all if asked) for of_all in columns(rows)]
    ends = (len(prefix) + torch.tensor(widths).cumsum(0)).tolist()
    slots, shape = Slots(len(prefix), ends), (len(rows), ends[-1])
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    positions = torch.cat([torch.arange(len(prefix)), *(len(prefix) + torch.arange(width) for width in widths)])
    ids[:, : len(prefix)] = torch.tensor(prefix)
    for row, turns in enumerate(rows):
        for (asked, answer), (start, _) in zip(turns, slots.bounds, strict=False):
            begin, end = start + len(asked), start + len(asked) + len(answer)
            ids[row, start:end] = torch.tensor([*asked, *answer])
            labels[row, begin:end] = torch.tensor(answer)
    return ids, labels, positions.repeat(len(rows), 1), slots


def columns(rows: Sequence[Sequence[Turn]]) -> Iterator[tuple[Turn, ...]]:
    """The first turns of all rows, the second ones, ...; an empty one where a row has fewer."""
    return zip_longest(*rows, fillvalue=((), ()))


@contextmanager
def packed_attention(decoder: PreTrainedModel, slots: Slots) -> Iterator[None]:
    """Within, a decoder reads sequences that are laid out in slots."""
    AttentionInterface.register(NAME, partial(attend, slots=slots))
    with with_implementation(NAME, [decoder]):
        yield


def attend(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, *, slots: Slots, **_
) -> tuple[Tensor, None]:
    """Attention (rows, T, heads, dim): the prefix sees itself, each slot the prefix and itself, all causally."""
    same = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    widths = [slots.prefix, *(end - start for start, end in slots.bounds)]
    (first, *prefix), *turns = zip(*(each.split(widths, 2) for each in (query, key, value)), strict=True)
    found = [F.scaled_dot_product_attention(first, *prefix, is_causal=True, **same)]
    for asked, *own in turns:
        keys, values = (torch.cat(both, 2) for both in zip(prefix, own, strict=True))
        seen = torch.ones(asked.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(slots.prefix)
        found.append(F.scaled_dot_product_attention(asked, keys, values, seen, **same))
    return torch.cat(found, 2).transpose(1, 2), None


AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # the slots say who sees whom
