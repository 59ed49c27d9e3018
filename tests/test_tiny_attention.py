"""Attention by its formula is torch's attention, and what training computes with it is what the model computes."""

import pytest
import torch
from torch.nn import functional as F

from tiny.models import FAMILIES
from tiny.packing import last_of_causal
from tiny.plain_attention import NAME, by_formula


def some(heads: int, groups: int, asked: int, seen: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (heads, asked), (groups, seen), (groups, seen)
    return [torch.randn(2, count, tokens, 16).to(dtype).requires_grad_() for count, tokens in shapes]


def with_gradients(attend, *inputs):
    output = attend(*inputs)
    return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_formula_is_torchs_attention_and_its_gradients_are(groups, masked):
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4) if masked else None
    inputs = some(4, groups, 5, 9)
    ours = with_gradients(lambda q, k, v: by_formula(q, k, v, 0.3, mask), *inputs)
    fused = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)  # noqa: E731
    for one, other in zip(ours, with_gradients(fused, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_in_bfloat16_packed_turns_attend_as_in_float32():
    exact = last_of_causal(*some(4, 2, 5, 9), 0.3)
    rounded = last_of_causal(*some(4, 2, 5, 9, torch.bfloat16), 0.3)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vision_tower_sees_the_same_with_it(name):
    family = FAMILIES[name]()
    tower = family.model.get_submodule(family.tower).eval()
    values = torch.randn(2, 3, *family.shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = family.features(values)
        tower.set_attn_implementation(NAME)
        assert tower.config._attn_implementation == NAME
        torch.testing.assert_close(family.features(values), stock, atol=1e-4, rtol=1e-4)
