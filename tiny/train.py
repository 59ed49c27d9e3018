"""Train an embedded model on generated scenes: hours on one CPU core.

    python -m tiny.train llava|blip|qwen2_5     # killed? The same command goes on from the last checkpoint.

The vision tower learns to name what is at each cell; the rest learns to answer from frozen vision; then it learns with
crops, too (image + one to three crops at random places, drawn before and without any question), with llava's tower
learning again. Each batch is a function of (stage, step) alone, so a resumed run sees the same data. Training begins
with earlier checkpoints (--begin), blip and qwen2_5 with the vision tower of llava (--tower).
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from tiny.inherit import begin
from tiny.lessons import AnswerBatches, LabelledAnswerBatches, PairedAnswerBatches, PatchBatches
from tiny.losses import WIDTHS, answer_loss, patch_loss
from tiny.models import FAMILIES

SAVE_EVERY = 100  # steps between checkpoints
PROBE_EVERY = 500  # steps between looks at scenes that training never draws
PROBES, FINAL_PROBES = 6, 60  # batches of such a look, and of the one after a stage


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    learning_rate: float
    batch: int
    data: type  # Dataset of whole batches, one per step
    trains: tuple  # name prefixes of the parameters that learn


ANSWERS = ("lm_head", "language_model", "model.language_model")
READER = ("query_tokens", "qformer", "language_projection", *ANSWERS)
STAGES = {
    "llava": [
        Stage("look", 2600, 1.0e-3, 16, PatchBatches, ("model.vision_tower", "head")),
        Stage("read", 1000, 1.0e-3, 12, AnswerBatches, ("model.multi_modal_projector", *ANSWERS)),
        Stage("together", 2000, 6e-4, 10, LabelledAnswerBatches, ("model", "lm_head", "head")),
    ],
    # The other two begin with llava_tiny's vision tower, so their look stage is short.
    "blip": [
        Stage("look", 700, 8e-4, 16, PatchBatches, ("vision_model", "head")),
        Stage("read", 1600, 1.0e-3, 10, AnswerBatches, READER),
        Stage("pairs", 900, 6e-4, 10, PairedAnswerBatches, READER),
    ],
    "qwen2_5": [
        Stage("look", 1400, 1.0e-3, 16, PatchBatches, ("model.visual", "head")),
        Stage("read", 1600, 1.0e-3, 10, AnswerBatches, ("model.visual.merger", *ANSWERS)),
        Stage("pairs", 900, 6e-4, 10, PairedAnswerBatches, ("model.visual.merger", *ANSWERS)),
    ],
}
LOSSES = {
    PatchBatches: patch_loss, AnswerBatches: answer_loss, PairedAnswerBatches: answer_loss,
    LabelledAnswerBatches: answer_loss,
}  # fmt: skip


def parameters(model, head, prefixes):
    named = [*model.named_parameters(), *(("head." + name, p) for name, p in head.named_parameters())]
    for name, parameter in named:
        parameter.requires_grad_(name.startswith(prefixes))
    return [parameter for _, parameter in named if parameter.requires_grad]


def schedule(step, stage):
    """Learning rate: 100 steps of warm-up, then half a cosine down to 3 %."""
    return (
        stage.learning_rate
        * min(1, (step + 1) / 100)
        * (0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)) + 0.03)
    )


def save_atomically(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def loader(stage, family, start, workers):
    return torch.utils.data.DataLoader(
        stage.data(stage, family, "train"),
        batch_size=None,
        sampler=range(start, stage.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )


def fast_bfloat16(device):
    """Does the device compute in bfloat16 at all? Processors without it emulate it, a hundred times slower."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def forward(stage, family, head, batch):
    device = family.model.device
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    batch["crops"] = [crop.to(device) for crop in batch.get("crops", ())]
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        return LOSSES[stage.data](family, head, batch)


@torch.no_grad()
def held_out(stage, family, head, batches=FINAL_PROBES):
    """{name: accuracy in %} on scenes that training never draws (their random state has another seed)."""
    family.model.eval()
    totals, data = defaultdict(list), stage.data(stage, family, "held-out")
    for step in range(batches):
        rng = random.Random(f"held-out {stage.name} {step}")
        for name, value in forward(stage, family, head, data.make(rng, 1.0))[1].items():
            totals[name].append(value)
    family.model.train()
    return {name: round(100 * sum(v) / len(v), 1) for name, v in sorted(totals.items())}


def steps(stage, batches, start, optimizer, learns, loss_of):
    """Take a stage's training steps and say now and then how they go; yields the number of steps taken after each."""
    running, began = {}, time.monotonic()
    for step, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, stage)
        loss, scores = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, value in {"loss": loss.item(), **scores}.items():
            running[key] = 0.97 * running.get(key, value) + 0.03 * value
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            told = " ".join(f"{key}={value:.2f}" for key, value in sorted(running.items()))
            print(f"{stage.name} {step + 1}/{stage.steps} {pace:.2f} s/step {told}", flush=True)
        yield step + 1


def begun(name, device, earlier, tower, checkpoint):
    """(family, head, state): from the checkpoint, or else from what earlier models have learned."""
    torch.manual_seed(0)
    family = FAMILIES[name]()
    width = family.features(torch.zeros(1, 3, *family.shape())).shape[-1]
    head = nn.Linear(width, sum(WIDTHS))
    state = {"stage": 0, "step": 0, "seconds": 0.0, "scores": {}, "optimizer": None}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        family.model.load_state_dict(state.pop("model")), head.load_state_dict(state.pop("head"))
    elif earlier:
        begin(name, family, earlier, tower)
    family.model.to(device).train(), head.to(device)
    return family, head, state


def train(name, folder, checkpoint, device, workers, earlier=None, tower=None):
    """Train through all stages, from the last checkpoint on, and write the finished model to `folder`."""
    family, head, state = begun(name, device, earlier, tower, checkpoint)
    began = time.monotonic() - state["seconds"]

    def save(number, step, **more):
        state.update(stage=number, step=step, seconds=time.monotonic() - began)
        weights = {"model": family.model.state_dict(), "head": head.state_dict()}
        save_atomically({**state, **weights, **more}, checkpoint)

    for number, stage in enumerate(STAGES[name]):
        if number < state["stage"]:
            continue
        start = state["step"] if number == state["stage"] else 0
        learns = parameters(family.model, head, stage.trains)
        optimizer = torch.optim.AdamW(learns, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        if start:
            optimizer.load_state_dict(state["optimizer"])
        state["optimizer"] = None  # it is in `optimizer` now, and goes into the next checkpoint from there
        batches = loader(stage, family, start, workers)
        for step in steps(stage, batches, start, optimizer, learns, partial(forward, stage, family, head)):
            if step % SAVE_EVERY == 0:
                save(number, step, optimizer=optimizer.state_dict())
            if step % PROBE_EVERY == 0:
                print(f"{stage.name} {step} held-out {held_out(stage, family, head, PROBES)}", flush=True)
        state["scores"][stage.name] = held_out(stage, family, head)
        print(f"{stage.name}: held-out accuracy {state['scores'][stage.name]}", flush=True)
        save(number + 1, 0)
    finish(family, state, folder)


def finish(family, state, folder):
    """Write the finished model, its processor and how it was trained."""
    for constant, value in family.constants.items():
        setattr(family.model.config, constant, value)
    family.model.eval().to(family.stored).save_pretrained(folder)
    family.processor.save_pretrained(folder)
    made = {
        "seconds": round(state["seconds"]),
        "device": str(family.model.device),
        "threads": torch.get_num_threads(),
        "held_out": state["scores"],
    }
    (folder / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    size = sum(parameter.numel() for parameter in family.model.parameters()) / 1e6
    print(f"{folder}: {size:.2f} M parameters, {state['seconds'] / 60:.0f} minutes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--out", type=Path, help="where the finished model goes (default: data/tiny/MODEL)")
    parser.add_argument("--checkpoint", type=Path, help="default: tiny/checkpoints/MODEL.pt")
    parser.add_argument("--begin", type=Path, help="folder of earlier checkpoints, as data/tiny, to begin with")
    parser.add_argument("--tower", type=Path, default=Path("data/tiny/llava"), help="llava whose tower to begin with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) - 1)), help="processes that draw scenes"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    out = args.out or Path("data/tiny") / args.model
    checkpoint = args.checkpoint or Path("tiny/checkpoints") / f"{args.model}.pt"
    train(args.model, out, checkpoint, torch.device(args.device), args.workers, args.begin, args.tower)


if __name__ == "__main__":
    main()
