"""The sessions of a dataset's images: records about an image share one, and few are alive."""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from accelerate.utils.memory import clear_device_cache

from vicrop.dataset import check_record
from vicrop.evaluation.batching import BatchSession
from vicrop.loaded import LoadedModel
from vicrop.session import ImageSession


class Sessions:
    """The sessions of the images of records, made when a batch needs them; at most two exist at a time.

    Attributes:
        read: {"prefix_shared", "batched"}: each is true if it was true of all sessions so far.
    """

    def __init__(self, loaded: LoadedModel, folder: Path):
        self.loaded, self.folder = loaded, folder
        self.read: dict[str, bool] = {}
        self.alive: deque[ImageSession] = deque(maxlen=2)
        # Two are enough: records come in the order of their images, and only the next batch is prepared ahead.
        self.of_images = lru_cache(maxsize=2)(self._of_images)

    def _of_images(self, paths: tuple[Path, ...]) -> ImageSession:
        session = self.loaded.session(paths)
        session.inputs  # noqa: B018 (made here, in the loading thread)
        self.note_how_read()
        self.alive.append(session)
        return session

    def of(self, batch: Sequence[dict]) -> BatchSession:
        """(session of the different images of a batch, for each record the number of its image)."""
        paths = [check_record(record, self.folder) for record in batch]
        unique = tuple(dict.fromkeys(paths))
        return self.of_images(unique), [unique.index(path) for path in paths]

    def of_one(self, record: dict) -> BatchSession:
        """`of` a single record, after the memory of earlier batches has been freed."""
        self.of_images.cache_clear()
        self.note_how_read()
        self.alive.clear()
        clear_device_cache(garbage_collection=True)
        return self.of([record])

    def note_how_read(self) -> dict[str, bool]:
        """Update `read` from the sessions that exist, and return it."""
        for session in list(self.alive):
            for name, value in (("prefix_shared", session.store.shared), ("batched", session.batched)):
                if value is not None:
                    self.read[name] = self.read.get(name, True) and value
        return self.read
