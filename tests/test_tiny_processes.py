"""Training in several processes: together they take the step that one would take with the whole batch."""

import os
import socket
from functools import partial

import torch
from torch import nn
from torch.multiprocessing import spawn

from tiny import processes

INPUTS = torch.arange(12.0).view(4, 3)


def gradients_of(inputs: torch.Tensor) -> list[torch.Tensor | None]:
    """Of two layers of which the second is not used, averaged over the processes."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])
    layers[0](inputs).square().mean().backward()
    processes.average_gradients([*layers.parameters()])
    return [parameter.grad for parameter in layers.parameters()]


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def half(rank: int, folder: str, port: int) -> None:
    """One of two processes: write down what it is, and its gradients of its half of the batch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes.join()
    found = gradients_of(INPUTS.chunk(2)[rank])
    torch.save((processes.number(), processes.count(), found), f"{folder}/{rank}.pt")


def test_two_processes_have_the_gradients_of_the_whole_batch(tmp_path):
    spawn(partial(half, folder=str(tmp_path), port=free_port()), nprocs=2)
    for rank in (0, 1):
        number, count, found = torch.load(tmp_path / f"{rank}.pt")
        assert (number, count) == (rank, 2)
        for together, alone in zip(found, gradients_of(INPUTS), strict=True):
            assert (together is None) == (alone is None)
            if alone is not None:
                torch.testing.assert_close(together, alone)


def test_a_process_alone_keeps_its_gradients(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join()
    assert (processes.number(), processes.count()) == (0, 1)
    assert gradients_of(INPUTS)[0].abs().sum() > 0
