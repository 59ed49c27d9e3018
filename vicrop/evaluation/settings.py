"""The frozen settings of a run: the command line makes them (see run_options.py), other code only reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vicrop.choices import MethodChoice, ModelChoice
from vicrop.hub import HubDataset


@dataclass(frozen=True)
class RunSettings:
    """A run of some methods over the questions of a task.

    Attributes:
        model, how: the model, and how it chooses crops.
        task: its name, a part of the names of the results.
        question_path: its data.json; image_path: the folder of its images.
        metrics: {metric: grader} (see metrics.metrics_named); the first one is shown while it runs.
        save_path: the folder of the results.
        batch_size: questions that go through the model together; None: the device decides.
        total_chunks, chunk_id: the part of the task that this run is about.
        limit, ids: only the first records; only those whose ids this file lists.
        save_maps, retry_errors, overwrite: keep the maps; ask records with an error again; delete earlier results.
        hub: where the questions are copied from, if they are not there yet.
        ocr_tokens: ask with the texts that were read in the image (see tasks.with_ocr_tokens).
    """

    model: ModelChoice
    how: MethodChoice
    task: str
    question_path: str
    image_path: Path
    metrics: Mapping[str, str]
    save_path: Path
    batch_size: int | None = None
    total_chunks: int = 1
    chunk_id: int = 0
    limit: int | None = None
    ids: str | None = None
    save_maps: bool = False
    retry_errors: bool = False
    overwrite: bool = False
    hub: HubDataset | None = None
    ocr_tokens: bool = False

    @property
    def grader(self) -> str:
        """That of the first metric, for those who want only one."""
        return next(iter(self.metrics.values()))
