"""Train an embedded model on generated scenes: minutes on a GPU, an hour or two on two CPU cores.

    python -m tiny.train llava|blip|qwen2_5     # killed? The same command goes on from the last checkpoint.

Three stages: the vision tower learns to name the sign under each patch; the rest learns to answer from frozen vision;
then it learns pairs too, half of the time (image + random crop around *some* sign, chosen before and without the
question), with llava's tower learning again. Each batch is a function of (stage, step) alone, so a resumed run sees the
same data. blip and qwen2_5 begin with the vision tower of vicrop/embedded/llava.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from tiny.models import FAMILIES, IGNORE
from tiny.scenes import (
    ASPECTS,
    COLORS,
    NUMBER_QUESTIONS,
    PRESENCE_QUESTIONS,
    SIDES,
    describe,
    make_scene,
    size_class,
)
from vicrop.files import PACKAGE
from vicrop.tables import GENERAL_PROMPT

COLOR_INDEX = {color: index for index, color in enumerate(COLORS)}
LEGIBLE = 5.2  # a digit on a sign narrower than this many pixels is not asked of the vision tower
SAVE_EVERY = 200  # steps between checkpoints


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    learning_rate: float
    batch: int
    data: type  # Dataset of whole batches, one per step
    trains: tuple  # name prefixes of the parameters that learn


# ---------------------------------------------------------------------------------------------------------- data
def pixels(scene, rng, shape, window=None):
    """What the model sees of a scene: (height, width, 3) uint8 of that `shape`, resized as the processor resizes.

    The window is drawn at a random one to four times the resolution first, so that the model meets sharp and
    downscaled edges alike, as it will in photos of any size and in crops.
    """
    x1, y1, x2, y2 = window or (0, 0, *scene.size)
    height, width = shape
    scale = rng.uniform(1.0, 4.0) * math.sqrt(height * width / ((x2 - x1) * (y2 - y1)))
    image = scene.render(window, scale)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def window_around(scene, rng, box, zoom=(1.3, 6.0)):
    """A near-square window (xyxy) of `zoom` times the box's side somewhere around it, inside the canvas."""
    width, height = scene.size
    side = (box[3] - box[1]) * math.exp(rng.uniform(*map(math.log, zoom)))
    wide, high = min(width, side * rng.uniform(0.85, 1.2)), min(height, side)
    x = (box[0] + box[2]) / 2 - wide / 2 + rng.uniform(-0.35, 0.35) * max(0, wide - (box[2] - box[0]))
    y = (box[1] + box[3]) / 2 - high / 2 + rng.uniform(-0.35, 0.35) * max(0, high - (box[3] - box[1]))
    x, y = min(max(0, x), width - wide), min(max(0, y), height - high)
    return x, y, x + wide, y + high


def patch_labels(scene, shape, cell, window=None):
    """Per map cell, (h, w, 2) int: 1 + colour index of the sign that covers it (0: none), and its digit."""
    x1, y1, x2, y2 = window or (0, 0, *scene.size)
    h, w = (side // cell for side in shape)
    labels = np.zeros((h, w, 2), np.int64)
    labels[..., 1] = IGNORE
    scale = np.array([w / (x2 - x1), h / (y2 - y1)] * 2)
    for sign in scene.signs:
        a, b, c, d = box = (np.array(sign.box) - (x1, y1, x1, y1)) * scale  # in cells
        inside = np.clip(box, 0, [w, h, w, h])
        area, visible = (c - a) * (d - b), (inside[2] - inside[0]) * (inside[3] - inside[1])
        if visible <= 0:
            continue
        digit = int(sign.digit) if visible > 0.9 * area and min(c - a, d - b) * cell > LEGIBLE else IGNORE
        for row in range(int(inside[1]), math.ceil(inside[3])):
            for column in range(int(inside[0]), math.ceil(inside[2])):
                overlap = (min(c, column + 1) - max(a, column)) * (min(d, row + 1) - max(b, row))
                if overlap > 0.4 or overlap > 0.45 * area:
                    labels[row, column] = 1 + COLOR_INDEX[sign.color], digit
    return labels


class Batches(torch.utils.data.Dataset):
    """Batch `step` of a stage, made from the random state (seed, stage, step): restartable, by any worker."""

    def __init__(self, stage, family, seed):
        self.stage, self.family, self.seed = stage, family, seed

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, step):
        return self.make(random.Random(f"{self.seed} {self.stage.name} {step}"), step / self.stage.steps)

    def frame(self, rng):
        """(aspect ratio of a batch's scenes or None for any, shape of what the model is shown of them)."""
        aspect = rng.choice(ASPECTS) if self.family.keeps_aspect else None
        return aspect, self.family.shape(aspect or 1.0)


class PatchBatches(Batches):
    """Crowded scenes for the vision tower: many signs per image, large ones first."""

    def make(self, rng, progress):
        low = 0.16 if progress < 0.08 else 0.1 if progress < 0.25 else 0.055
        aspect, shape = self.frame(rng)
        images, labels = [], []
        for _ in range(self.stage.batch):
            scene = make_scene(rng, 640, rng.randint(6, 16), (low, 0.42), repeat_colors=True, aspect=aspect)
            anchor = rng.choice(scene.signs).box
            window = window_around(scene, rng, anchor, (1.3, 5.0)) if rng.random() < 0.3 else None
            images.append(pixels(scene, rng, shape, window))
            labels.append(patch_labels(scene, shape, self.family.cell, window))
        return {"pixels": torch.from_numpy(np.stack(images)), "labels": torch.from_numpy(np.stack(labels))}


def turns_about(scene, rng, most=None):
    """Independent single questions about one scene: [(question, answer, sign or None)]; a choice of `most` of them."""
    turns = [(rng.choice(NUMBER_QUESTIONS).format(color=sign.color), sign.digit, sign) for sign in scene.signs]
    present = {sign.color for sign in scene.signs}
    for color in (rng.choice(sorted(present)), rng.choice(sorted(set(COLORS) - present))):
        question = rng.choice(PRESENCE_QUESTIONS).format(color=color)
        turns.append((question, "yes" if color in present else "no", None))
    turns.append((GENERAL_PROMPT, describe(scene), None))
    return turns if most is None or len(turns) <= most else rng.sample(turns, most)


class AnswerBatches(Batches):
    """Questions about single images, a share `pairs` of the batches about pairs (image, crop around some sign)."""

    pairs = 0.0

    # (until this share of the stage, most signs per scene, smallest side)
    curriculum = ((0.06, 1, 0.12), (0.25, 3, 0.12), (0.5, 5, 0.08), (1.0, 5, SIDES[0]))

    def make(self, rng, progress):
        most, low = next(lesson for until, *lesson in self.curriculum if progress <= until)
        pair = bool(self.pairs) and rng.random() < self.pairs
        aspect, shape = self.frame(rng)
        shapes = [shape, self.family.shape()] if pair else [shape]
        images, crops, asked, sizes = [], [], [], []
        for _ in range(self.stage.batch):
            scene = make_scene(rng, 640, rng.randint(min(2, most), most), (low, SIDES[1]), aspect=aspect)
            images.append(torch.from_numpy(pixels(scene, rng, shape)))
            if pair:  # a crop around some sign, drawn before any question is: never the method's, never the asked one's
                window = window_around(scene, rng, rng.choice(scene.signs).box)
                crops.append(torch.from_numpy(pixels(scene, rng, shapes[1], window)))
            turns = turns_about(scene, rng, self.family.turns_per_image)
            asked.append([self.family.turn(question, answer) for question, answer, _ in turns])
            sizes.append([size_class(sign, scene.size) if sign else "other" for *_, sign in turns])
        batch = {"pixels": torch.stack(images), "sizes": sizes, **self.family.collate(asked, shapes)}
        return batch | {"crops": torch.stack(crops)} if pair else batch


class PairedAnswerBatches(AnswerBatches):
    pairs = 0.55
    curriculum = AnswerBatches.curriculum[-1:]


# -------------------------------------------------------------------------------------------------------- losses
def normalised(pixels, processor):
    """(batch, 3, H, W) as the processor's image processor normalises (batch, H, W, 3) uint8."""
    image = processor.image_processor
    mean, std = (
        torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (image.image_mean, image.image_std)
    )
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_loss(family, head, batch):
    """Loss and {name: accuracy} of naming, per map cell, the colour and the digit of the sign that covers it."""
    logits = head(family.features(normalised(batch["pixels"], family.processor))).float()
    labels = batch["labels"].flatten(1, 2)  # (B, cells, 2)
    color, digit = logits.split([len(COLORS) + 1, 10], -1)
    readable = labels[..., 1] != IGNORE
    loss = F.cross_entropy(color.flatten(0, 1), labels[..., 0].flatten())
    loss = loss + F.cross_entropy(digit[readable], labels[..., 1][readable])
    hit = lambda scores, wanted: (scores.argmax(-1) == wanted).float().mean().item()  # noqa: E731
    return loss, {"color": hit(color, labels[..., 0]), "digit": hit(digit[readable], labels[..., 1][readable])}


def answer_loss(family, head, batch):
    """Loss and accuracies of the answers' tokens; the first answer token of number questions is scored by sign size."""
    shown = [normalised(batch[name], family.processor) if name in batch else None for name in ("pixels", "crops")]
    hidden = family.hidden(batch, *shown)[:, :-1]
    wanted = batch["labels"][:, 1:]
    asked = wanted != IGNORE
    logits = family.model.get_output_embeddings()(hidden[asked]).float()
    loss = F.cross_entropy(logits, wanted[asked])
    hits = torch.zeros_like(asked)
    hits[asked] = logits.argmax(-1) == wanted[asked]
    first = asked & ~F.pad(asked, (1, 0))[:, :-1]  # the first token of each answer, in order of the turns
    scores, kind = {}, "pair_" if "crops" in batch else ""
    sizes = [size for of_image in batch["sizes"] for size in of_image]
    for size, hit in zip(sizes, hits[first].tolist(), strict=True):
        scores.setdefault(kind + size, []).append(hit)
    return loss, {name: sum(values) / len(values) for name, values in scores.items()}


# ------------------------------------------------------------------------------------------------------ training
ANSWERS = ("lm_head", "language_model", "model.language_model")
STAGES = {
    "llava": [
        Stage("look", 5000, 1.5e-3, 32, PatchBatches, ("model.vision_tower", "head")),
        Stage("read", 1600, 1.0e-3, 16, AnswerBatches, ("model.multi_modal_projector", *ANSWERS)),
        Stage("together", 2200, 6e-4, 12, PairedAnswerBatches, ("model", "lm_head")),
    ],
    # The other two begin with llava_tiny's vision tower (see tiny.models), so their look stage is short.
    "blip": [
        Stage("look", 700, 8e-4, 16, PatchBatches, ("vision_model", "head")),
        Stage("read", 1600, 1.0e-3, 10, AnswerBatches, ("query_tokens", "qformer", "language_projection", *ANSWERS)),
        Stage(
            "pairs", 900, 6e-4, 10, PairedAnswerBatches, ("query_tokens", "qformer", "language_projection", *ANSWERS)
        ),
    ],
    "qwen2_5": [
        Stage("look", 1400, 1.0e-3, 16, PatchBatches, ("model.visual", "head")),
        Stage("read", 1600, 1.0e-3, 10, AnswerBatches, ("model.visual.merger", *ANSWERS)),
        Stage("pairs", 900, 6e-4, 10, PairedAnswerBatches, ("model.visual.merger", *ANSWERS)),
    ],
}
LOSSES = {PatchBatches: patch_loss, AnswerBatches: answer_loss, PairedAnswerBatches: answer_loss}


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
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
        return LOSSES[stage.data](family, head, batch)


@torch.no_grad()
def held_out(stage, family, head, batches=40):
    """{name: accuracy in %} on scenes that training never draws (their random state has another seed)."""
    family.model.eval()
    totals, data = {}, stage.data(stage, family, "held-out")
    for step in range(batches):
        rng = random.Random(f"held-out {stage.name} {step}")
        for name, value in forward(stage, family, head, data.make(rng, 1.0))[1].items():
            totals.setdefault(name, []).append(value)
    family.model.train()
    return {name: round(100 * sum(v) / len(v), 1) for name, v in sorted(totals.items())}


def steps(stage, bar, start, optimizer, learns, loss_of):
    """Take a stage's training steps over the batches of a tqdm bar; yields the number of steps taken after each."""
    running = {}
    for step, batch in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, stage)
        loss, scores = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, value in {"loss": loss.item(), **scores}.items():
            running[key] = 0.97 * running.get(key, value) + 0.03 * value
        if step % 20 == 0:
            bar.set_postfix({key: f"{value:.2f}" for key, value in sorted(running.items())}, refresh=False)
        yield step + 1


def train(name, folder, checkpoint, device, workers):
    torch.manual_seed(0)
    family = FAMILIES[name]()
    model, width = family.model, family.features(torch.zeros(1, 3, *family.shape())).shape[-1]
    head = nn.Linear(width, len(COLORS) + 1 + 10)
    model.to(device).train(), head.to(device)
    state = {"stage": 0, "step": 0, "seconds": 0.0, "scores": {}, "optimizer": None}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state.pop("model")), head.load_state_dict(state.pop("head"))
    began = time.monotonic() - state["seconds"]

    def save(number, step, **more):
        state.update(stage=number, step=step, seconds=time.monotonic() - began)
        save_atomically({**state, "model": model.state_dict(), "head": head.state_dict(), **more}, checkpoint)

    for number, stage in enumerate(STAGES[name]):
        if number < state["stage"]:
            continue
        start = state["step"] if number == state["stage"] else 0
        learns = parameters(model, head, stage.trains)
        optimizer = torch.optim.AdamW(learns, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
        if start:
            optimizer.load_state_dict(state["optimizer"])
        state["optimizer"] = None  # it is in `optimizer` now, and goes into the next checkpoint from there
        bar = tqdm(loader(stage, family, start, workers), desc=stage.name, initial=start, total=stage.steps)
        for step in steps(stage, bar, start, optimizer, learns, partial(forward, stage, family, head)):
            if step % SAVE_EVERY == 0:
                save(number, step, optimizer=optimizer.state_dict())
        state["scores"][stage.name] = held_out(stage, family, head)
        print(f"{stage.name}: held-out accuracy {state['scores'][stage.name]}", flush=True)
        save(number + 1, 0)
    for constant, value in family.constants.items():
        setattr(model.config, constant, value)
    model.eval().to(family.stored).save_pretrained(folder)
    family.processor.save_pretrained(folder)
    made = {
        "seconds": round(state["seconds"]),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "held_out": state["scores"],
    }
    (folder / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{folder}: {size:.2f} M parameters, {state['seconds'] / 60:.0f} minutes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--out", type=Path, help="where the finished model goes (default: vicrop/embedded/MODEL)")
    parser.add_argument("--checkpoint", type=Path, help="default: tiny/checkpoints/MODEL.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) - 1)), help="processes that draw scenes"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    out = args.out or PACKAGE / "embedded" / args.model
    checkpoint = args.checkpoint or Path("tiny/checkpoints") / f"{args.model}.pt"
    train(args.model, out, checkpoint, torch.device(args.device), args.workers)


if __name__ == "__main__":
    main()
