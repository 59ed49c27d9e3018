"""Losses of the stages of training, and how much is right: of cells by what is asked of them, of answers by kind."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from tiny.labels import MIDDLE, TARGETS
from tiny.models import Family
from tiny.packing import IGNORE

WIDTHS = [len(classes) for classes in TARGETS.values()]
CELL_WEIGHT = 0.25  # weight of the cells' loss beside that of the answers
NAME_LAYER = 3  # of the language model: behind it the end of a name tells where the named thing is
PLACE_WEIGHT = 0.2  # of the loss of places
REACH = 4.0  # how far from 0 the edges of a picture lie on the axes of places
Scores = dict[str, float]


def normalised(pixels: torch.Tensor, processor: ProcessorMixin) -> torch.Tensor:
    """(batch, 3, H, W) as the processor's image processor normalises (batch, H, W, 3) uint8."""
    image = processor.image_processor
    mean, std = (
        torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (image.image_mean, image.image_std)
    )
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def cell_loss(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Scores]:
    """Loss and scores of what the tower says of each cell: what is there, and where the middle of that is.

    Args:
        head: linear, from the tower's width to all classes of TARGETS.
        features: (batch, cells, width); labels: (batch, h, w, targets), as of tiny.labels.patch_labels.
    """
    classes, places = labels.flatten(0, 2).split((len(TARGETS), len(MIDDLE)), -1)
    features = features.flatten(0, 1)
    named, scores = class_loss(head(features).float(), classes)
    placed, errors = place_loss(features, places)
    return named + PLACE_WEIGHT * placed, scores | errors


def class_loss(logits: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, Scores]:
    """Loss and {target: accuracy} of naming what is at each cell.

    Args:
        logits: (cells, all classes of TARGETS); classes: (cells, targets), IGNORE where a target is not asked.
    """
    total, scores = 0.0, {}
    for (name, _), of_target, wanted in zip(TARGETS.items(), logits.split(WIDTHS, -1), classes.unbind(-1), strict=True):
        known = wanted != IGNORE
        if not known.any():
            continue
        of_target, wanted = of_target[known], wanted[known]
        weight = torch.ones(of_target.shape[-1], device=logits.device)
        if name.startswith("slot"):  # most texts are short
            weight[0] = 0.3
        total = total + F.cross_entropy(of_target, wanted, weight)
        asked = wanted > 0 if TARGETS[name][0] == "" else torch.ones_like(wanted, dtype=torch.bool)
        hits = of_target.argmax(-1) == wanted
        if asked.any():
            scores[name] = hits[asked].float().mean().item()
    return total, scores


def place_loss(features: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, Scores]:
    """Loss of where things are along two fixed axes of the normalised features, and {"x off": mean error, ...}.

    With axes that learn, as the head does, a trace of a place was enough, and the language model found none. Fixed
    ones make place a large part of what it is given: "left of" is then the sign of a difference.

    Args:
        features: (cells, width); places: (cells, axes of MIDDLE) in hundredths, IGNORE where nothing is.
    """
    axes = axes_of(features.shape[-1]).to(features)
    known = places[:, 0] != IGNORE
    found = F.rms_norm(features[known], features.shape[-1:]) @ axes
    error = found - REACH * (places[known].to(found) / 50 - 1)
    off = (error.detach().abs().mean(0) / (2 * REACH)).tolist() if known.any() else ()
    scores = {f"{axis} off": value for axis, value in zip(MIDDLE, off, strict=False)}
    return error.square().sum() / max(1, error.numel()), scores


@cache
def axes_of(width: int) -> torch.Tensor:
    """(width, axes of MIDDLE): orthonormal columns, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, len(MIDDLE), generator=generator))[0]


def patch_loss(family: Family, head: nn.Module, batch: dict) -> tuple[torch.Tensor, Scores]:
    """Loss and accuracies of the vision tower alone."""
    return cell_loss(head, family.features(normalised(batch["pixels"], family.processor)), batch["labels"])


def answer_loss(family: Family, head: nn.Module, batch: dict) -> tuple[torch.Tensor, Scores]:
    """Loss of the answers' tokens and of where named things are, and the share of answers that are right, by kind.

    Where a thing is, is asked of the token that ends its name, in the middle of the language model: it learns to look
    there. From answers alone it did not learn to look for two things before it compares them.
    """
    shown = [normalised(pixels, family.processor) for pixels in (batch["pixels"], *batch["crops"])]
    with output_of(family.model.get_decoder().layers[NAME_LAYER]) as outputs:
        hidden = family.hidden(batch, shown[0], shown[1:])[:, :-1]
    placed, errors = place_loss(outputs[0].flatten(0, 1), batch["labels"][..., 1:].flatten(0, 1))
    wanted = batch["labels"][:, 1:, 0]
    asked = wanted != IGNORE
    logits = family.model.get_output_embeddings()(hidden[asked]).float()
    loss = F.cross_entropy(logits, wanted[asked]) + PLACE_WEIGHT * placed
    scores = by_kind(logits.argmax(-1) == wanted[asked], asked, batch["kinds"])
    return loss, scores | {f"named {axis}": error for axis, error in errors.items()}


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within, what a module computes is appended to the list."""
    found = []
    keep = lambda _, __, output: found.append(output if torch.is_tensor(output) else output[0])  # noqa: E731
    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def mixed_loss(family: Family, head: nn.Module, batch: dict) -> tuple[torch.Tensor, Scores]:
    """The two together."""
    cells, of_cells = patch_loss(family, head, batch["patches"])
    answers, scores = answer_loss(family, head, batch["answers"])
    return answers + CELL_WEIGHT * cells, scores | {f"cell {name}": value for name, value in of_cells.items()}


def by_kind(hits: torch.Tensor, asked: torch.Tensor, kinds: list[list[str]]) -> Scores:
    """Share of answers of which all tokens are right, by kind.

    Args:
        hits: for each token of an answer, in order; asked: (rows, T) which tokens these are.
        kinds: for each image those of its turns, in order.
    """
    starts = asked & ~F.pad(asked, (1, 0))[:, :-1]
    turn = starts[asked].cumsum(0) - 1  # number of the answer that a token belongs to
    right = torch.ones(int(starts.sum()), device=hits.device).scatter_reduce(0, turn, hits.float(), "amin")
    found = defaultdict(list)
    for kind, value in zip((kind for of_image in kinds for kind in of_image), right.tolist(), strict=True):
        found[kind].append(value)
    return {kind: sum(values) / len(values) for kind, values in found.items()}
