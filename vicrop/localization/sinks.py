"""Attention sinks: cells of a map that a head lights whatever the question is. Found on many samples, then left out.

localization.pipeline stage=batch_analyze data.batch_attention_dir=FOLDER       # writes FOLDER/attention_sinks.npz
localization.pipeline ... logic.drop_sinks=FOLDER/attention_sinks.npz
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from vicrop.files import atomic_path
from vicrop.heads import BINARIZE_THRESHOLD

FILE = "attention_sinks.npz"
LIT_IN = 0.95  # of the samples, at least, a sink is lit in
LEAST = 20  # samples to find sinks in: in fewer any cell may be lit by chance


def lit(attention: np.ndarray, threshold: float = BINARIZE_THRESHOLD) -> np.ndarray:
    """(layers, heads, h, w) bool: the cells above the mean of their head's map, as criterion 2 sees them."""
    return attention - attention.mean((-2, -1), keepdims=True) > threshold


class SinkCounter:
    """Counts in how many samples each cell of each head is lit; all samples must have maps of one shape.

    Attributes:
        threshold: how far above its map's mean a lit cell is (heads.Criteria.binarize_threshold).
        shapes: those of the maps so far, (layers, heads, h, w).
    """

    def __init__(self, threshold: float = BINARIZE_THRESHOLD):
        self.threshold = threshold
        self.counts, self.samples = np.zeros(0), 0
        self.shapes: set[tuple[int, ...]] = set()

    def add(self, attention: np.ndarray) -> None:
        """Count a sample's attention, (layers, heads, h, w)."""
        self.shapes.add(attention.shape)
        if len(self.shapes) == 1:
            self.counts = lit(attention, self.threshold) + (self.counts if self.samples else 0)
            self.samples += 1

    @property
    def why_not(self) -> str | None:
        """Why sinks cannot be told from these samples; None if they can."""
        if len(self.shapes) > 1:
            return "the maps have different shapes, so no cell is the same in all of them"
        return None if self.samples >= LEAST else f"{self.samples} samples are fewer than {LEAST}"

    def sinks(self) -> np.ndarray:
        """(layers, heads, h, w) bool: the cells that are lit in LIT_IN of the samples."""
        return self.counts >= LIT_IN * self.samples


def write_sinks(path: Path, sinks: np.ndarray) -> None:
    """Write a file that `read_sinks` reads."""
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, sinks=sinks)


def read_sinks(path: str | Path) -> np.ndarray:
    """(layers, heads, h, w) bool of a file of `batch_analyze`, not to be written to; each file is loaded once.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is another one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: logic.drop_sinks must be one that stage=batch_analyze has written")
    return loaded(Path(path), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def loaded(path: Path, changed: int) -> np.ndarray:
    """What `read_sinks` returns of a file that was `changed` at a time: one that is written anew is loaded anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            sinks = file["sinks"].astype(bool)
    except Exception as error:  # a torn or foreign file may raise anything
        raise ValueError(f"{path} has no attention sinks: {type(error).__name__}: {error}") from error
    sinks.setflags(write=False)
    return sinks


def hash_of(path: str | Path) -> str:
    """What tells the sinks of a file from others."""
    return hashlib.sha256(read_sinks(path).tobytes()).hexdigest()[:16]


def without_sinks(attention: np.ndarray, path: str | Path | None) -> np.ndarray:
    """The attention (layers, heads, h, w) with nothing in the sinks of a file; as it is without one.

    Raises:
        ValueError: the file is about maps of another shape.
    """
    if path is None:
        return attention
    sinks = read_sinks(path)
    if sinks.shape != attention.shape:
        raise ValueError(f"{path} is about maps of shape {list(sinks.shape)}, and these are {list(attention.shape)}")
    return np.where(sinks, 0, attention)
