"""Which attention heads localize: the two criteria of "Your Large Vision-Language Model Only Needs A Few Attention
Heads For Visual Grounding" (arXiv 2503.06287, section 3), and both ways to choose heads by them.

A head is a pair (layer, head), counted from 0; attention is (layers, heads, h, w), of one text token to the cells of an
image, row 0 at the top.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

Head = tuple[int, int]  # (layer, head)

FIRST_LAYER = 2  # layers 0 and 1 look everywhere: they are left out before the elbow is taken
TOP_K = 3  # heads that make a map
COUNT_K = 10  # heads of a sample that are counted, to find those that are fixed
BINARIZE_THRESHOLD = 0.001
SIGMA, TRUNCATE = 1.0, 3  # of the Gaussian, in cells: a kernel of 7 x 7
TRIALS = 20  # random halvings behind the overlap of `halves_overlap`
NEIGHBOURS = np.ones((3, 3), dtype=int)  # cells that touch, also at a corner, belong together


# ------------------------------------------------------------------------------------------------------- the criteria
def chord_elbow(values: ArrayLike) -> float:
    """The value at which a sorted curve bends most: it lies farthest from the straight line between both ends.

    Args:
        values: any order, at least one.
    Returns:
        One of the values (the lowest, if they lie on a straight line).
    """
    values = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"an elbow is taken of finite values, at least one, not of {values[:10]}")
    distance = np.abs(values - np.linspace(values[0], values[-1], values.size))
    return float(values[np.flatnonzero(distance >= distance.max() - 1e-12 * np.ptp(values))[0]])


def _components(maps: np.ndarray, binarize_threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(labels, centred) of maps (n, h, w): 8-connected parts of what exceeds the map's mean, numbered over all maps."""
    centred = (maps - maps.mean((1, 2), keepdims=True)).clip(0)
    structure = np.zeros((3, 3, 3), dtype=int)
    structure[1] = NEIGHBOURS  # not from one map to the next
    labels: Any = ndimage.label(centred > binarize_threshold, structure)
    return labels[0], centred


def spatial_entropy(
    maps: ArrayLike, binarize_threshold: float = BINARIZE_THRESHOLD, weight: str = "area"
) -> np.ndarray:
    """How scattered maps are: H = -sum P_i log P_i over the connected components C_i of what exceeds the mean.

    The paper's equation for criterion 2: P_i = |C_i| / sum |C_j|, so one blob has 0 and two equal ones ln 2.

    Args:
        maps: (..., h, w) attention.
        binarize_threshold: how far above its map's mean a cell must be to count.
        weight: "area", a component weighs as many cells as it has; "mass", as much attention above the mean.
    Returns:
        (...) float64; infinite where a map has no component.
    """
    if weight not in ("area", "mass"):
        raise ValueError(f"entropy weighs components by area or mass, not by {weight!r}")
    maps = np.asarray(maps, dtype=np.float64)
    flat = maps.reshape(-1, *maps.shape[-2:])
    labels, centred = _components(flat, binarize_threshold)
    owner = np.zeros(labels.max() + 1, dtype=int)  # component -> the number of its map
    owner[labels] = np.arange(len(flat))[:, None, None]
    sizes = np.bincount(labels.ravel(), centred.ravel() if weight == "mass" else None)[1:].astype(np.float64)
    totals = np.bincount(owner[1:], sizes, len(flat))
    shares = sizes / totals[owner[1:]]
    entropy = np.bincount(owner[1:], -shares * np.log(shares), len(flat))
    return np.where(totals > 0, entropy, np.inf).reshape(maps.shape[:-2])


def bottom_row_lit(maps: ArrayLike, binarize_threshold: float = BINARIZE_THRESHOLD) -> np.ndarray:
    """(...) bool for maps (..., h, w): is the whole bottom row above the mean? Such heads look at no object."""
    maps = np.asarray(maps, dtype=np.float64)
    return (maps[..., -1, :] - maps.mean((-2, -1))[..., None] > binarize_threshold).all(-1)


@dataclass(frozen=True)
class Criteria:
    """What a head has to pass, and how many are taken; the `logic` group of the configuration."""

    top_k: int = TOP_K
    count_k: int = COUNT_K
    min_keep: int = 1
    binarize_threshold: float = BINARIZE_THRESHOLD
    weight: str = "area"

    def __post_init__(self):
        for name in ("top_k", "count_k", "min_keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")

    def measure(self, attention: ArrayLike) -> "Measures":
        """Measures of one sample's attention (layers, heads, h, w)."""
        attention = np.asarray(attention, dtype=np.float64)
        broken = int(np.count_nonzero(~np.isfinite(attention)))
        if broken:
            raise ValueError(f"{broken} of {attention.size} attention values are NaN or inf")
        return Measures(
            attention.sum((-2, -1)),
            spatial_entropy(attention, self.binarize_threshold, self.weight),
            bottom_row_lit(attention, self.binarize_threshold),
        )

    def attentive(self, sums: np.ndarray) -> np.ndarray:
        """(layers, heads) bool: criterion 1, S at least at its elbow; in layers from FIRST_LAYER on.

        Args:
            sums: (layers, heads), S of a sample, or its mean over many.
        """
        if len(sums) <= FIRST_LAYER:
            raise ValueError(f"localization heads lie in layers from {FIRST_LAYER} on: there are {len(sums)} layers")
        later = sums[FIRST_LAYER:]
        threshold = min(chord_elbow(later), np.sort(later, axis=None)[-min(self.min_keep, later.size)])
        passed = sums >= threshold
        passed[:FIRST_LAYER] = False
        return passed


@dataclass(frozen=True)
class Measures:
    """What the criteria see of a sample's heads; each (layers, heads)."""

    sums: np.ndarray  # S, the attention that goes to the image
    entropy: np.ndarray  # infinite without a component
    bottom: np.ndarray  # bool, is the bottom row lit from end to end?

    @property
    def compact(self) -> np.ndarray:
        """Criterion 2's conditions, whatever the entropy is."""
        return np.isfinite(self.entropy) & ~self.bottom


def _in_order(heads: Sequence[Head], *keys: np.ndarray) -> list[Head]:
    """Heads [(layer, head)] by the first of keys (layers, heads), ties by the next, then by their numbers."""
    return sorted(heads, key=lambda head: (*(key[head] for key in keys), head))


def _heads(mask: np.ndarray) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]


# ------------------------------------------------------------------------------------------------------ the selection
def ranked(measures: Measures, criteria: Criteria) -> tuple[list[Head], list[Head]]:
    """(heads that pass both criteria, those that do not), each [(layer, head)]: low entropy first, then high S."""
    mask = criteria.attentive(measures.sums) & measures.compact
    passed, others = (_in_order(_heads(each), measures.entropy, -measures.sums) for each in (mask, ~mask))
    return passed, others


def greedy(measures: Measures, criteria: Criteria) -> list[Head]:
    """The `top_k` best heads of one sample.

    Where none passes both criteria, those with most attention of the layers from FIRST_LAYER on.
    """
    passed, others = ranked(measures, criteria)
    later = [head for head in others if head[0] >= FIRST_LAYER]
    return (passed or _in_order(later, -measures.sums))[: criteria.top_k]


def counts(samples: Sequence[Measures], criteria: Criteria, attentive: np.ndarray | None = None) -> np.ndarray:
    """(layers, heads) int: in how many samples a head is among the `count_k` of lowest entropy.

    Args:
        attentive: (layers, heads) bool, the heads that may count; None: those that pass criterion 1 on average over the
            samples (the paper's section 3.3).
    """
    if attentive is None:
        attentive = criteria.attentive(np.mean([each.sums for each in samples], 0))
    found = np.zeros(attentive.shape, dtype=int)
    for each in samples:
        eligible = _heads(attentive & each.compact)
        for head in _in_order(eligible, each.entropy, -each.sums)[: criteria.count_k]:
            found[head] += 1
    return found


def mean_entropy(samples: Sequence[Measures]) -> np.ndarray:
    """(layers, heads): mean over the samples in which a head has a component; infinite where it never has."""
    entropies = np.ma.masked_invalid([each.entropy for each in samples])
    return entropies.mean(0).filled(np.inf)


def by_count(found: np.ndarray, entropy: np.ndarray) -> list[Head]:
    """Heads that count at all, those that count in most samples first; ties: lower mean entropy."""
    return _in_order(_heads(found > 0), -found, entropy)


def frequent(samples: Sequence[Measures], criteria: Criteria) -> list[Head]:
    """The `top_k` heads that count in most samples: the model's localization heads."""
    return by_count(counts(samples, criteria), mean_entropy(samples))[: criteria.top_k]


def halves_overlap(
    samples: Sequence[Measures], criteria: Criteria, images: Sequence[str | int], seed: int = 0
) -> float:
    """Share of the localization heads on which two disjoint halves agree; mean of TRIALS random halvings.

    Args:
        samples: [Measures]; images: what each is about. All samples of an image are in the same half: they are alike.
    Raises:
        ValueError: fewer than two images.
    """
    _, image = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    count = image.max(initial=-1) + 1
    if count < 2:
        raise ValueError(f"samples of {count} images cannot be halved: at least 2")
    rng, shares = np.random.default_rng(seed), []
    for _ in range(TRIALS):
        first = np.isin(image, rng.permutation(count)[: count // 2])
        halves = ([samples[number] for number in np.flatnonzero(half).tolist()] for half in (first, ~first))
        one, other = (set(frequent(half, criteria)) for half in halves)
        shares.append(len(one & other) / max(len(one), len(other), 1))
    return float(np.mean(shares))


# ------------------------------------------------------------------------------------------------------ names of heads
def head_name(head: Head) -> str:
    """(14, 24) is L14H24."""
    return "L{}H{}".format(*head)


def parse_heads(text: str) -> list[Head]:
    """[(layer, head)] of a list such as "L14H24,L14H13".

    Raises:
        ValueError: naming the part that is no head, or comes twice.
    """
    heads = []
    for part in text.split(","):
        found = re.fullmatch(r"L(\d+)H(\d+)", part.strip(), re.IGNORECASE)
        if not found:
            raise ValueError(f"{part.strip()!r} is no attention head: they are written as in L14H24,L14H13")
        heads.append((int(found[1]), int(found[2])))
    if len(set(heads)) < len(heads):
        raise ValueError(f"a head comes twice in {text!r}")
    return heads


def valid_heads(heads: Sequence[Head], layers: int, per_layer: int) -> Sequence[Head]:
    """The heads, if a model of so many layers and heads per layer has them all; else a ValueError."""
    for head in heads:
        if not (0 <= head[0] < layers and 0 <= head[1] < per_layer):
            has = f"layers 0 to {layers - 1}, each with heads 0 to {per_layer - 1}"
            raise ValueError(f"head {head_name(head)} does not exist: this model has {has}")
    return heads


def selected(
    measures: Measures, criteria: Criteria, selection: str, manual: Sequence[Head] | None = None
) -> tuple[list[Head], str | None]:
    """(heads [(layer, head)] of one sample, what has to be said about them or None).

    Args:
        selection: "fixed", those of `manual` that pass both criteria here; "greedy", the best of this sample; "all",
            every head of the model, a baseline.
        manual: the fixed heads. Where there are none, or none of them passes, the sample's best stand in: that is said.
    """
    if selection == "all":
        return _heads(np.ones_like(measures.bottom)), None
    if selection == "greedy":
        return greedy(measures, criteria), None
    if not manual:
        return greedy(measures, criteria), "no localization heads are known of this model: this sample's best stand in"
    valid_heads(manual, *measures.sums.shape)
    passed, _ = ranked(measures, criteria)
    kept = [head for head in manual if head in passed]
    if kept:
        return kept, None
    named = ", ".join(map(head_name, manual))
    return greedy(measures, criteria), f"none of {named} passes both criteria here: this sample's best stand in"


# ------------------------------------------------------------------------------------------------- the map of heads
def smoothed(maps: ArrayLike, sigma: float = SIGMA) -> np.ndarray:
    """Each of maps (..., h, w) after a Gaussian of `sigma` cells, cut off at 3 sigma; borders are mirrored."""
    maps = np.asarray(maps, dtype=np.float64)
    return ndimage.gaussian_filter(maps, (0,) * (maps.ndim - 2) + (sigma, sigma), truncate=TRUNCATE) if sigma else maps


def heads_map(maps: ArrayLike, sigma: float = SIGMA) -> np.ndarray:
    """(h, w) map of some heads, from theirs (heads, h, w): the sum of the smoothed ones."""
    return smoothed(maps, sigma).sum(0)
