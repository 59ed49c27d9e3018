"""The optimizers of training: Muon for the matrices between hidden states, AdamW for everything else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import _muon

from vicrop.attention import replaced

OUTER = ("embed", "lm_head", "head.", "query_tokens")  # parts of names of weights that face tokens, pixels or classes


class Float32Muon(torch.optim.Muon):
    """Muon whose orthogonalisation is computed in float32: processors without bfloat16 need 40 times as long in it."""

    def step(self, closure: Callable | None = None) -> Any:
        """A step of all parameters."""
        with replaced(_muon, "_zeropower_via_newtonschulz", orthogonalised):
            return super().step(closure)


def orthogonalised(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest matrix with equal singular values, roughly, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if gradient.shape[0] <= gradient.shape[1] else wide.T


def optimizers_of(learns: dict[str, nn.Parameter], learning_rate: float) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] for named parameters; Muon's steps are as large as AdamW's, and it needs fewer of them."""
    inner = {name for name, weight in learns.items() if weight.dim() == 2 and not any(part in name for part in OUTER)}
    matrices, others = [learns[name] for name in sorted(inner)], [learns[name] for name in sorted(set(learns) - inner)]
    kind = torch.optim.Muon if matrices and matrices[0].is_cuda else Float32Muon
    return [
        kind(matrices, learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    ]
