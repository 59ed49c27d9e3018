"""Train an embedded model on generated scenes: hours on one CPU core; the last two stages are meant for a GPU.

    python -m tiny.train llava|blip|qwen2_5     # killed? The same command goes on from the last checkpoint.
    torchrun --nproc_per_node 2 -m tiny.train llava     # in two processes, which share every batch

The vision tower learns to name what is at each cell, and where the middle of that is; the rest learns to answer from
frozen vision, and to know at the end of a thing's name where it is; then with crops, too (image + one to three crops
around some thing or anywhere, drawn before and without any question); then everything learns together. Last, the tower
looks closely, at small signs, and everything learns at length. Each batch is a function of (stage, step) and the number
of the process, so a resumed run sees the same data. blip and qwen2_5 begin with the vision tower of a trained llava
(--tower), and any with what an earlier checkpoint of its kind has learned, if there is one (--begin).
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from tiny import processes
from tiny.inherit import begin
from tiny.lessons import (
    AnswerBatches,
    MixedBatches,
    PairedAnswerBatches,
    PatchBatches,
    SmallestMixedBatches,
    SmallestPatchBatches,
)
from tiny.losses import WIDTHS, Scores, answer_loss, mixed_loss, patch_loss
from tiny.models import FAMILIES, Family
from tiny.optimizers import optimizers_of
from tiny.plain_attention import NAME, pays
from vicrop.files import PACKAGE, atomic_path, write_atomically

SAVE_EVERY = 100  # steps between checkpoints
EVAL_EVERY = 500  # steps between looks at scenes that training never draws
EVAL_BATCHES, FINAL_EVAL_BATCHES = 8, 60  # of such a look, and of the one after a stage
EVAL_BATCH = 16  # images of each, at most
LOG_EVERY = 50  # steps between lines of the log
EMA_DECAY = 0.998  # of the running average of the weights: it reaches back some 500 steps
DONE = "done"  # the stage of a checkpoint behind all others


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    learning_rate: float
    batch: int
    data: type  # Dataset of whole batches, one per step
    trains: tuple[str, ...]  # name prefixes of the parameters that learn


EMBEDDED = PACKAGE / "embedded/streets"  # where finished models go
ANSWERS = ("lm_head", "language_model", "model.language_model")
READER = ("query_tokens", "qformer", "language_projection", *ANSWERS)
STAGES = {
    "llava": [
        Stage("look", 5000, 1.2e-3, 16, PatchBatches, ("model.vision_tower", "head")),
        Stage("read", 3600, 2.0e-3, 8, AnswerBatches, ("model.multi_modal_projector", *ANSWERS)),
        Stage("crops", 1200, 1.5e-3, 8, PairedAnswerBatches, ("model.multi_modal_projector", *ANSWERS)),
        Stage("together", 800, 6e-4, 8, MixedBatches, ("model", "lm_head", "head")),
        Stage("closely", 300, 1.0e-3, 64, SmallestPatchBatches, ("model.vision_tower", "head")),
        Stage("at length", 1300, 8e-4, 32, SmallestMixedBatches, ("model", "lm_head", "head")),
    ],
    # The other two begin with llava_streets' vision tower, so their look stage is short.
    "blip": [
        Stage("look", 800, 1.0e-3, 16, PatchBatches, ("vision_model", "head")),
        Stage("read", 4500, 2.0e-3, 8, AnswerBatches, READER),
        Stage("crops", 1200, 1.5e-3, 8, PairedAnswerBatches, READER),
        Stage("together", 800, 6e-4, 8, MixedBatches, ("vision_model", "head", *READER)),
        Stage("closely", 300, 1.0e-3, 64, SmallestPatchBatches, ("vision_model", "head")),
        Stage("at length", 1300, 8e-4, 32, SmallestMixedBatches, ("vision_model", "head", *READER)),
    ],
    "qwen2_5": [
        Stage("look", 1500, 1.2e-3, 16, PatchBatches, ("model.visual", "head")),
        Stage("read", 3300, 2.0e-3, 8, AnswerBatches, ("model.visual.merger", *ANSWERS)),
        Stage("crops", 1200, 1.5e-3, 8, PairedAnswerBatches, ("model.visual.merger", *ANSWERS)),
        Stage("together", 800, 6e-4, 8, MixedBatches, ("model", "lm_head", "head")),
        Stage("closely", 300, 1.0e-3, 64, SmallestPatchBatches, ("model.visual", "head")),
        Stage("at length", 1300, 8e-4, 32, SmallestMixedBatches, ("model", "lm_head", "head")),
    ],
}
LOSSES = {
    PatchBatches: patch_loss,
    SmallestPatchBatches: patch_loss,
    AnswerBatches: answer_loss,
    PairedAnswerBatches: answer_loss,
    MixedBatches: mixed_loss,
    SmallestMixedBatches: mixed_loss,
}


def schedule(step: int, stage: Stage) -> float:
    """Learning rate: 100 steps of warm-up, then half a cosine down to 3 %."""
    return (
        stage.learning_rate
        * min(1, (step + 1) / 100)
        * (0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)) + 0.03)
    )


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: a kill leaves the earlier one."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def loader(stage: Stage, family: Family, start: int, workers: int) -> DataLoader:
    """The batches of a stage from a step on: this process's part of them."""
    part = replace(stage, batch=max(1, stage.batch // processes.count()))
    return DataLoader(
        stage.data(part, family, f"train{processes.number() or ''}"),
        batch_size=None,
        sampler=range(start, stage.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )


def fast_bfloat16(device: torch.device) -> bool:
    """Does the device compute in bfloat16 at all? Processors without it emulate it, a hundred times slower."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with all of its tensors on a device."""
    if torch.is_tensor(batch):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    return [moved(value, device) for value in batch] if isinstance(batch, list) else batch


def forward(stage: Stage, learner: "Learner", batch: dict[str, Any]) -> tuple[torch.Tensor, Scores]:
    """Loss and scores of a batch."""
    device = learner.family.model.device
    batch = moved(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        return LOSSES[stage.data](learner.family, learner.head, batch)


@torch.no_grad()
def held_out(stage: Stage, learner: "Learner", batches: int = FINAL_EVAL_BATCHES) -> Scores:
    """{name: mean over the batches, in %} of the scores of the averaged weights on scenes that training never draws.

    They are shares that are right, and mean errors relative to the picture ("x off").
    """
    totals = defaultdict(list)
    data = stage.data(replace(stage, batch=min(stage.batch, EVAL_BATCH)), learner.family, "held-out")
    with learner.averaged():
        for step in range(batches):
            rng = random.Random(f"held-out {stage.name} {step}")
            for name, value in forward(stage, learner, data.make(rng, 1.0))[1].items():
                totals[name].append(value)
    return {name: round(100 * sum(v) / len(v), 1) for name, v in sorted(totals.items())}


class Learner:
    """A model with its head for cells, and the running average of their weights, which is what is kept in the end."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.family = FAMILIES[name]()
        width = self.family.features(torch.zeros(1, 3, *self.family.shape())).shape[-1]
        self.head = nn.Linear(width, sum(WIDTHS))
        self.modules = nn.ModuleDict({"model": self.family.model, "head": self.head}).train()
        self.start_average()

    def to(self, device: torch.device) -> None:
        """Move all weights, and let the vision tower attend in the way that is fast there."""
        self.modules.to(device)
        self.average.to(device)
        if fast_bfloat16(device) and pays(device, torch.bfloat16):
            self.family.model.get_submodule(self.family.tower).set_attn_implementation(NAME)

    def start_average(self) -> None:
        """Begin a running average with the present weights."""
        self.average = AveragedModel(self.modules, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def learns(self, prefixes: tuple[str, ...]) -> dict[str, nn.Parameter]:
        """{name: parameter} of those that learn in a stage; the others are frozen."""
        named = [*self.family.model.named_parameters()]
        named += [("head." + name, parameter) for name, parameter in self.head.named_parameters()]
        for name, parameter in named:
            parameter.requires_grad_(name.startswith(prefixes))
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def state(self) -> dict[str, Any]:
        """What of it belongs into a checkpoint."""
        return {"modules": self.modules.state_dict(), "average": self.average.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take it out of a checkpoint again."""
        self.modules.load_state_dict(state.pop("modules"))
        self.average.load_state_dict(state.pop("average"))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the averaged weights, in evaluation mode."""
        own = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average.module.state_dict())
        self.modules.eval()
        try:
            yield
        finally:
            self.modules.load_state_dict(own)
            self.modules.train()

    def keep_average(self) -> None:
        """Go on from the averaged weights."""
        self.modules.load_state_dict(self.average.module.state_dict())
        self.start_average()


def steps(
    stage: Stage, batches: Iterable, start: int, optimizers: Sequence[torch.optim.Optimizer], learner: Learner
) -> Iterator[int]:
    """Take a stage's training steps and say now and then how they go; yields the number of steps taken after each."""
    running, began = {}, time.monotonic()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    learns = [parameter for group in groups for parameter in group["params"]]
    for step, batch in enumerate(batches, start):
        for group in groups:
            group["lr"] = schedule(step, stage)
        loss, scores = forward(stage, learner, batch)
        loss.backward()
        processes.average_gradients(learns)
        nn.utils.clip_grad_norm_(learns, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        learner.average.update_parameters(learner.modules)
        for key, value in {"loss": loss.item(), **scores}.items():
            running[key] = 0.97 * running.get(key, value) + 0.03 * value
        if (step + 1) % LOG_EVERY == 0 and processes.number() == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            told = " ".join(f"{key}={value:.2f}" for key, value in sorted(running.items()))
            print(f"{stage.name} {step + 1}/{stage.steps} {pace:.2f} s/step {told}", flush=True)
        yield step + 1


def begun(
    name: str, device: torch.device, earlier: Path | None, tower: Path | None, checkpoint: Path
) -> tuple[Learner, dict[str, Any]]:
    """(learner, state): from the checkpoint, or else from what earlier models have learned."""
    learner = Learner(name)
    state = {"stage": STAGES[name][0].name, "step": 0, "seconds": 0.0, "scores": {}, "optimizer": None}
    if checkpoint.exists():
        state |= torch.load(checkpoint, map_location="cpu")
        learner.load(state)
        print(f"{checkpoint}: {state['stage']}, {state['step']} steps; it goes on from there")
    else:
        begin(name, learner.family, earlier, tower)
        learner.start_average()
    learner.to(device)
    return learner, state


def train(
    name: str,
    folder: Path,
    checkpoint: Path,
    device: torch.device,
    workers: int,
    earlier: Path | None = None,
    tower: Path | None = None,
) -> None:
    """Train through all stages, from the last checkpoint on, and write the finished model to `folder`."""
    learner, state = begun(name, device, earlier, tower, checkpoint)
    state |= {"device": str(device), "threads": torch.get_num_threads(), "processes": processes.count()}
    began, first = time.monotonic() - state["seconds"], processes.number() == 0

    def save(stage, step, **more):
        state.update(stage=stage, step=step, seconds=time.monotonic() - began)
        if first:
            save_checkpoint({**state, **learner.state(), **more}, checkpoint)

    names = [*(stage.name for stage in STAGES[name]), DONE]
    for number in range(names.index(state["stage"]), len(STAGES[name])):
        stage, start = STAGES[name][number], state["step"]
        optimizers = optimizers_of(learner.learns(stage.trains), stage.learning_rate)
        for optimizer, saved in zip(optimizers, state["optimizer"] or () if start else (), strict=False):
            optimizer.load_state_dict(saved)
        state["optimizer"] = None  # it is in the optimizers now, and goes into the next checkpoint from there
        for step in steps(stage, loader(stage, learner.family, start, workers), start, optimizers, learner):
            if step % SAVE_EVERY == 0:
                save(stage.name, step, optimizer=[optimizer.state_dict() for optimizer in optimizers])
            if step % EVAL_EVERY == 0 and first:
                print(f"{stage.name} {step} held-out {held_out(stage, learner, EVAL_BATCHES)}", flush=True)
        if first:
            state["scores"][stage.name] = held_out(stage, learner)
            print(f"{stage.name}: held-out accuracy {state['scores'][stage.name]}", flush=True)
        learner.keep_average()
        save(names[number + 1], 0)
    if first:
        finish(learner.family, state, folder)


def finish(family: Family, state: dict[str, Any], folder: Path) -> None:
    """Write the finished model, its processor and how it was trained; what the folder has else, as a card, stays."""
    for constant, value in {"reads": family.reads, **family.constants}.items():
        setattr(family.model.config, constant, value)
    made = {
        "seconds": round(state["seconds"]),
        "device": state.get("device"),
        "threads": state.get("threads"),
        "processes": state.get("processes"),
        "held_out": state["scores"],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary)
        family.model.eval().to(family.stored).save_pretrained(new)
        family.processor.save_pretrained(new)
        write_atomically(new / "training.json", made)
        for path in sorted(new.rglob("*")):  # each file at once: a kill leaves no half of one
            if path.is_file():
                to = folder / path.relative_to(new)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, to)
    size = sum(parameter.numel() for parameter in family.model.parameters()) / 1e6
    print(f"{folder}: {size:.2f} M parameters, {state['seconds'] / 60:.0f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--out", type=Path, help="where the model goes (default: vicrop/embedded/streets/MODEL)")
    parser.add_argument("--checkpoint", type=Path, help="default: tiny/checkpoints/MODEL.pt")
    parser.add_argument("--finish", action="store_true", help="write the model as it is in the checkpoint, and end")
    parser.add_argument("--begin", type=Path, help="folder of earlier checkpoints, as vicrop/embedded, to begin with")
    parser.add_argument("--tower", type=Path, default=EMBEDDED / "llava", help="llava whose tower to begin with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) - 1)), help="processes that draw scenes"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    out = args.out or EMBEDDED / args.model
    checkpoint = args.checkpoint or Path("tiny/checkpoints") / f"{args.model}.pt"
    if args.finish and not checkpoint.exists():
        parser.error(f"--finish needs a checkpoint, and there is none at {checkpoint}")
    if args.finish:
        learner, state = begun(args.model, torch.device("cpu"), None, None, checkpoint)
        learner.keep_average()
        finish(learner.family, state, out)
        return
    processes.join()
    try:
        train(args.model, out, checkpoint, torch.device(args.device), args.workers, args.begin, args.tower)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
