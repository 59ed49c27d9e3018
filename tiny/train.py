"""Train an embedded model from nothing on generated scenes: minutes on a GPU, a few hours on two CPU cores.

    python -m tiny.train llava          # killed? The same command goes on from the last checkpoint.

Three stages: the vision tower learns to name the sign under each patch; the language model learns to answer from frozen
vision; then everything learns together, half of the time on pairs (image + random crop around *some* sign, chosen
before and without the question). Each batch is a function of (stage, step) alone, so a resumed run sees the same data.
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

from info import GENERAL_PROMPT
from llava_methods import PROMPT
from tiny.models import MODELS, PATCH, RESOLUTION
from tiny.scenes import COLORS, NUMBER_QUESTIONS, PRESENCE_QUESTIONS, SIDES, describe, make_scene, size_class

GRID = RESOLUTION // PATCH
COLOR_INDEX = {color: index for index, color in enumerate(COLORS)}
IGNORE = -100
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
def pixels(scene, rng, window=None):
    """What the model sees of a scene: (RESOLUTION, RESOLUTION, 3) uint8, squashed exactly as the processor squashes.

    The window is drawn at a random one to four times the resolution first, so that the model meets sharp and
    downscaled edges alike, as it will in photos of any size and in crops.
    """
    x1, y1, x2, y2 = window or (0, 0, *scene.size)
    scale = rng.uniform(1.0, 4.0) * RESOLUTION / math.sqrt((x2 - x1) * (y2 - y1))
    image = scene.render(window, scale)
    return np.array(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))


def window_around(scene, rng, box, zoom=(1.3, 6.0)):
    """A near-square window (xyxy) of `zoom` times the box's side somewhere around it, inside the canvas."""
    width, height = scene.size
    side = (box[3] - box[1]) * math.exp(rng.uniform(*map(math.log, zoom)))
    wide, high = min(width, side * rng.uniform(0.85, 1.2)), min(height, side)
    x = (box[0] + box[2]) / 2 - wide / 2 + rng.uniform(-0.35, 0.35) * max(0, wide - (box[2] - box[0]))
    y = (box[1] + box[3]) / 2 - high / 2 + rng.uniform(-0.35, 0.35) * max(0, high - (box[3] - box[1]))
    x, y = min(max(0, x), width - wide), min(max(0, y), height - high)
    return x, y, x + wide, y + high


def patch_labels(scene, window=None):
    """Per patch, (GRID, GRID, 2) int: 1 + colour index of the sign that covers it (0: none), and its digit."""
    x1, y1, x2, y2 = window or (0, 0, *scene.size)
    labels = np.zeros((GRID, GRID, 2), np.int64)
    labels[..., 1] = IGNORE
    scale = np.array([GRID / (x2 - x1), GRID / (y2 - y1)] * 2)
    for sign in scene.signs:
        a, b, c, d = box = (np.array(sign.box) - (x1, y1, x1, y1)) * scale  # in patches
        inside = np.clip(box, 0, GRID)
        area, visible = (c - a) * (d - b), (inside[2] - inside[0]) * (inside[3] - inside[1])
        if visible <= 0:
            continue
        digit = int(sign.digit) if visible > 0.9 * area and min(c - a, d - b) > 0.65 else IGNORE
        for row in range(int(inside[1]), math.ceil(inside[3])):
            for column in range(int(inside[0]), math.ceil(inside[2])):
                overlap = (min(c, column + 1) - max(a, column)) * (min(d, row + 1) - max(b, row))
                if overlap > 0.4 or overlap > 0.45 * area:
                    labels[row, column] = 1 + COLOR_INDEX[sign.color], digit
    return labels


class Batches(torch.utils.data.Dataset):
    """Batch `step` of a stage, made from the random state (seed, stage, step): restartable, by any worker."""

    def __init__(self, stage, seed, language=None):
        self.stage, self.seed, self.language = stage, seed, language

    def __len__(self):
        return self.stage.steps

    def __getitem__(self, step):
        rng = random.Random(f"{self.seed} {self.stage.name} {step}")
        return self.make(rng, step / self.stage.steps)


class PatchBatches(Batches):
    """Crowded scenes for the vision tower: many signs per image, large ones first."""

    def make(self, rng, progress):
        low = 0.16 if progress < 0.08 else 0.1 if progress < 0.25 else 0.055
        images, labels = [], []
        for _ in range(self.stage.batch):
            scene = make_scene(rng, 640, rng.randint(6, 16), (low, 0.42), repeat_colors=True)
            anchor = rng.choice(scene.signs).box
            window = window_around(scene, rng, anchor, (1.3, 5.0)) if rng.random() < 0.3 else None
            images.append(pixels(scene, rng, window))
            labels.append(patch_labels(scene, window))
        return {"pixels": torch.from_numpy(np.stack(images)), "labels": torch.from_numpy(np.stack(labels))}


class Language:
    """Token ids of prompts and answers, as the model's own processor would make them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        image, text = PROMPT.split("<image>")
        assert not image, "the prompt template is expected to begin with the image"
        self.text = text

    def turn(self, question, answer):
        """(prompt ids after the image, answer ids with the end token)."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        return encode(self.text.format(question=question)), encode(" " + answer) + [self.tokenizer.eos_token_id]

    def turns(self, scene, rng):
        """Independent single questions about one scene: [(question, answer, sign or None)]."""
        turns = [(rng.choice(NUMBER_QUESTIONS).format(color=s.color), s.digit, s) for s in scene.signs]
        present = {sign.color for sign in scene.signs}
        for color in (rng.choice(sorted(present)), rng.choice(sorted(set(COLORS) - present))):
            question = rng.choice(PRESENCE_QUESTIONS).format(color=color)
            turns.append((question, "yes" if color in present else "no", None))
        return [*turns, (GENERAL_PROMPT, describe(scene), None)]


def pack(prefix, turns, length, pad):
    """One sequence of a shared prefix and several turns that see the prefix and themselves, but not each other.

    Equal to asking each question alone, for the price of one pass over the image.
    Returns:
        ids, labels, positions (length,) and mask (length, length), True where attention is allowed.
    """
    ids, labels = torch.full((length,), pad), torch.full((length,), IGNORE)
    positions, mask = torch.zeros(length, dtype=torch.long), torch.eye(length, dtype=torch.bool)
    start = len(prefix)
    ids[:start], positions[:start] = torch.tensor(prefix), torch.arange(start)
    mask[:start, :start] = True
    for prompt, answer in turns:
        end = start + len(prompt) + len(answer)
        ids[start:end] = torch.tensor(prompt + answer)
        labels[start + len(prompt) : end] = torch.tensor(answer)
        positions[start:end] = len(prefix) + torch.arange(end - start)
        mask[start:end, : len(prefix)] = mask[start:end, start:end] = True
        start = end
    return ids, labels, positions, mask.tril()


class AnswerBatches(Batches):
    """Questions about single images, a share `pairs` of the batches about pairs (image, crop around some sign)."""

    pairs = 0.0

    def curriculum(self, progress):
        """(most signs per scene, smallest side)."""
        return (
            (1, 0.12)
            if progress < 0.06
            else (3, 0.12)
            if progress < 0.25
            else (5, 0.08)
            if progress < 0.5
            else (5, SIDES[0])
        )

    def make(self, rng, progress):
        most, low = self.curriculum(progress)
        pair = bool(self.pairs) and rng.random() < self.pairs
        prefix = [self.language.tokenizer.bos_token_id]
        prefix += [self.language.tokenizer.image_token_id] * (GRID * GRID * (2 if pair else 1))
        images, sequences, sizes = [], [], []
        for _ in range(self.stage.batch):
            scene = make_scene(rng, 640, rng.randint(min(2, most), most), (low, SIDES[1]))
            images.append(pixels(scene, rng))
            if pair:  # a crop around some sign, drawn before any question is: never the method's, never the asked one's
                images.append(pixels(scene, rng, window_around(scene, rng, rng.choice(scene.signs).box)))
            turns = self.language.turns(scene, rng)
            sequences.append([self.language.turn(question, answer) for question, answer, _ in turns])
            sizes.append([size_class(sign, scene.size) if sign else "other" for *_, sign in turns])
        length = len(prefix) + max(sum(len(p) + len(a) for p, a in turns) for turns in sequences)
        packed = [pack(prefix, turns, length, self.language.tokenizer.pad_token_id) for turns in sequences]
        ids, labels, positions, mask = map(torch.stack, zip(*packed, strict=True))
        return {
            "pixels": torch.from_numpy(np.stack(images)), "input_ids": ids, "labels": labels,
            "position_ids": positions, "mask": mask[:, None], "sizes": sizes, "pair": pair,
        }  # fmt: skip


class PairedAnswerBatches(AnswerBatches):
    pairs = 0.55

    def curriculum(self, progress):
        return 5, SIDES[0]


# -------------------------------------------------------------------------------------------------------- losses
def normalised(batch, processor, device):
    image = processor.image_processor
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (image.image_mean, image.image_std))
    return (batch["pixels"].to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_loss(model, head, batch, values):
    """Loss and {name: accuracy} of naming, per patch, the colour and the digit of the sign that covers it."""
    logits = head(
        model.model.vision_tower(pixel_values=values, output_hidden_states=True).hidden_states[-1][:, 1:]
    ).float()
    labels = batch["labels"].flatten(1, 2).to(values.device)  # (B, patches, 2)
    color, digit = logits.split([len(COLORS) + 1, 10], -1)
    readable = labels[..., 1] != IGNORE
    loss = F.cross_entropy(color.flatten(0, 1), labels[..., 0].flatten())
    loss = loss + F.cross_entropy(digit[readable], labels[..., 1][readable])
    hit = lambda scores, wanted: (scores.argmax(-1) == wanted).float().mean().item()  # noqa: E731
    return loss, {"color": hit(color, labels[..., 0]), "digit": hit(digit[readable], labels[..., 1][readable])}


def answer_loss(model, head, batch, values):
    """Loss and accuracies of the answers' tokens; the first answer token of number questions is scored by sign size."""
    device = values.device
    hidden = model.model(
        input_ids=batch["input_ids"].to(device),
        pixel_values=values,
        position_ids=batch["position_ids"].to(device),
        attention_mask=batch["mask"].to(device),
    ).last_hidden_state[:, :-1]
    wanted = batch["labels"][:, 1:].to(device)
    asked = wanted != IGNORE
    logits = model.lm_head(hidden[asked]).float()
    loss = F.cross_entropy(logits, wanted[asked])
    hits = torch.full(wanted.shape, False, device=device)
    hits[asked] = logits.argmax(-1) == wanted[asked]
    scores = {}
    first = asked & ~F.pad(asked, (1, 0))[:, :-1]  # the first token of each answer, in order of the turns
    for row, sizes in enumerate(batch["sizes"]):
        for size, hit in zip(sizes, hits[row][first[row]].tolist(), strict=True):
            scores.setdefault(("pair_" if batch["pair"] else "") + size, []).append(hit)
    return loss, {name: sum(values) / len(values) for name, values in scores.items()}


# ------------------------------------------------------------------------------------------------------ training
STAGES = {
    "llava": [
        Stage("look", 5000, 1.5e-3, 32, PatchBatches, ("model.vision_tower", "head")),
        Stage(
            "read", 1600, 1.0e-3, 16, AnswerBatches, ("model.multi_modal_projector", "model.language_model", "lm_head")
        ),
        Stage("together", 2200, 6e-4, 12, PairedAnswerBatches, ("model", "lm_head")),
    ],
}
ATT_LAYERS = {
    "llava": 2
}  # the layer that rel_att and grad_att read by default: see the model card for how it was chosen
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


def loader(stage, language, start, workers):
    data = stage.data(stage, "train", language)
    return torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=range(start, stage.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )


def forward(stage, model, head, batch, processor, device):
    with torch.autocast(device.type, torch.bfloat16):
        return LOSSES[stage.data](model, head, batch, normalised(batch, processor, device))


@torch.no_grad()
def held_out(stage, model, head, processor, language, device, batches=40):
    """{name: accuracy in %} on scenes that training never draws (their random state has another seed)."""
    model.eval()
    totals, data = {}, stage.data(stage, "held-out", language)
    for step in range(batches):
        rng = random.Random(f"held-out {stage.name} {step}")
        for name, value in forward(stage, model, head, data.make(rng, 1.0), processor, device)[1].items():
            totals.setdefault(name, []).append(value)
    model.train()
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
    model, processor = MODELS[name]([PROMPT.format(question=GENERAL_PROMPT)])
    head = nn.Linear(model.config.vision_config.hidden_size, len(COLORS) + 1 + 10)
    model.to(device).train(), head.to(device)
    language = Language(processor.tokenizer)
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
        bar = tqdm(loader(stage, language, start, workers), desc=stage.name, initial=start, total=stage.steps)
        loss_of = partial(forward, stage, model, head, processor=processor, device=device)
        for step in steps(stage, bar, start, optimizer, learns, loss_of):
            if step % SAVE_EVERY == 0:
                save(number, step, optimizer=optimizer.state_dict())
        state["scores"][stage.name] = held_out(stage, model, head, processor, language, device)
        print(f"{stage.name}: held-out accuracy {state['scores'][stage.name]}", flush=True)
        save(number + 1, 0)
    model.config.att_layer = ATT_LAYERS[name]
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
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
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, help="where the finished model goes (default: data/tiny/MODEL)")
    parser.add_argument("--checkpoint", type=Path, help="default: tiny/checkpoints/MODEL.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) - 1)), help="processes that draw scenes"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    out = args.out or Path("data/tiny") / args.model
    checkpoint = args.checkpoint or Path("tiny/checkpoints") / f"{args.model}.pt"
    train(args.model, out, checkpoint, torch.device(args.device), args.workers)


if __name__ == "__main__":
    main()
