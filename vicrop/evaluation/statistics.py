"""Intervals and tests for the difference that a crop makes. Needs no torch."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import binomtest


def bootstrap_interval(
    differences: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], rounds: int, seed: int,
    weights: np.ndarray | None = None,
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile interval of a mean, by a bootstrap that draws whole clusters (images) with replacement.

    Clusters with the same sum and number of differences are interchangeable. So a multinomial draws how often each kind
    of cluster comes: the distribution is the same, and it takes a fraction of the time.

    Args:
        differences: (n,) values; clusters: for each the name of its cluster.
        weights: (n,), not negative: then it is not the mean, but the sum of the values by the sum of the weights.
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums, counts = np.bincount(cluster, differences), np.bincount(cluster, weights)
    kinds, number = np.unique(np.stack([sums.round(9), counts], 1), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(sums), number / len(sums), size=rounds)  # (rounds, kinds)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p of McNemar's test: are answers fixed and broken equally often?"""
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
