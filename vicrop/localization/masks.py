"""How a map becomes a mask. The configuration (config.py) offers these by name."""

from collections.abc import Callable, Mapping

import numpy as np


def mean_relu(att_map: np.ndarray) -> np.ndarray:
    """(h, w) bool: the cells above the map's mean."""
    return att_map > att_map.mean()


MASKS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"mean_relu": mean_relu}  # logic.mask.method -> its function
