"""Attention of some heads sent elsewhere: what a causal test does to a model while it answers.

    with redirected({layer.self_attn: Redirection((3, 5), places, weights)}):
        session.answer(prompt)         # what these heads pay to the image goes to other parts of it

It works on attention.py's function, through which every pass of a session goes. Prefixes that a session keeps are not
touched: only tokens behind the image are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Redirection(NamedTuple):
    """Where the attention of some heads of a module goes, in place of where it went in the image.

    Attributes:
        heads: their numbers; places: (N,) slots of the image's tokens in the cache; weights: (N,) what each gets of all
            that the head pays to the image (they sum to 1).
    """

    heads: tuple[int, ...]
    places: Tensor
    weights: Tensor


_REDIRECTIONS: dict[nn.Module, Redirection] = {}  # filled only inside `redirected`


@contextmanager
def redirected(redirections: Mapping[nn.Module, Redirection]) -> Iterator[None]:
    """Within it the attention of these modules is redirected, for every token behind the image; one question at a time.

    Raises:
        ValueError: in a pass over several rows.
    """
    _REDIRECTIONS.update(redirections)
    try:
        yield
    finally:
        for module in redirections:
            _REDIRECTIONS.pop(module, None)


def redirect(module: nn.Module, output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
             scaling: float) -> Tensor:  # fmt: skip
    """What a module's attention gives, (batch, rows, heads, dim), with that of its redirected heads made anew.

    Args:
        output: what it gives as it is; the others as an attention function takes them.
    """
    wanted = _REDIRECTIONS.get(module)
    if wanted is None:
        return output
    if len(query) > 1:
        raise ValueError(f"attention is redirected for one question at a time, not for {len(query)}")
    slots, rows = key.shape[2], query.shape[2]
    places, weights = wanted.places.to(query.device), wanted.weights.to(query.device)
    before = max(0, int(places.max()) + 1 - (slots - rows))  # rows of the image, and what comes before it
    if before >= rows:
        return output
    heads = torch.tensor(wanted.heads, device=query.device)
    groups = heads // (query.shape[1] // key.shape[1])
    scores = query[0, heads, before:].float() @ key[0, groups].float().transpose(1, 2) * scaling  # (heads, rows, slots)
    if mask is None:  # plainly causal
        own = torch.arange(slots - rows + before, slots, device=query.device)
        scores = scores.masked_fill(torch.arange(slots, device=query.device) > own[:, None], float("-inf"))
    else:
        allowed = mask[0, :, before:, :slots]
        scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
    probs = scores.softmax(-1)
    probs[..., places] = probs[..., places].sum(-1, keepdim=True) * weights
    output = output.clone()
    output[0][before:, heads] = (probs.to(value.dtype) @ value[0, groups]).transpose(0, 1)
    return output
