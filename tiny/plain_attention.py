"""Attention by its formula: for bfloat16 on a processor, where torch's fused one is slow with heads this small."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "by its formula"


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Is it faster than torch's fused attention there?"""
    return device.type == "cpu" and dtype == torch.bfloat16


def by_formula(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, T, dim): softmax(scale query key^T) value, in the precision of the three.

    Args:
        query: (batch, heads, T, dim). key, value: (batch, heads or a divisor of them, S, dim).
        mask: (T, S), true where a query sees a key; None: everywhere.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        scores = (scale * query) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -1e4)
        return scores.softmax(-1) @ value


def attend_to_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers, for vision towers: every cell sees every cell that it is called with."""
    if attention_mask is not None:
        raise ValueError("attention of vision towers must have no mask")
    return by_formula(query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, attend_to_all)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
