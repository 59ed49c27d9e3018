"""Training in several processes, which draw different scenes and average their gradients.

torchrun --nproc_per_node 2 -m tiny.train llava     # on two cores of a processor
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed, nn

PATIENCE = timedelta(hours=2)  # the others wait while the first one looks at held-out scenes


def join() -> None:
    """Meet the other processes, if torchrun has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.init_process_group("gloo", timeout=PATIENCE)


def number() -> int:
    """Of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Let every process have the mean of all gradients; which parameters have one must be the same in all."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient) / count())
