"""Intervals and tests for the difference that a crop makes. Needs no torch."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import binomtest


def bootstrap_interval(
    differences: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], rounds: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of a mean: whole clusters (images) are drawn, with replacement.

    Clusters with the same sum and number of differences are interchangeable, so that their kinds are drawn, by a
    multinomial: the same distribution, in a fraction of the time.

    Args:
        differences: (n,) array; clusters: n hashable names.
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums, counts = np.bincount(cluster, differences), np.bincount(cluster)
    kinds, number = np.unique(np.stack([sums.round(9), counts], 1), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(sums), number / len(sums), size=rounds)  # (rounds, kinds)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    return tuple(float(bound) for bound in np.percentile(means, (2.5, 97.5)))


def mcnemar(fixed: int, broken: int) -> float:
    """Two-sided exact p of McNemar's test: are answers fixed and broken equally often?"""
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
