"""The frozen settings of a run: the command line makes them (see run_options.py), other code only reads them."""

from dataclasses import dataclass
from pathlib import Path

from vicrop.choices import MethodChoice, ModelChoice


@dataclass(frozen=True)
class RunSettings:
    """A run of some methods over the questions of a task.

    Attributes:
        model, how: the model, and how it chooses crops.
        task: a name of tables.TASKS.
        question_path: data.json, or the name of a hub dataset; image_path: the folder of its images.
        save_path: the folder of the results.
        batch_size: questions that go through the model together; None: the device decides.
        total_chunks, chunk_id: the part of the task that this run is about.
        limit, ids: only the first records; only those whose ids this file lists.
        save_maps, retry_errors, overwrite: keep the maps; ask records with an error again; delete earlier results.
    """

    model: ModelChoice
    how: MethodChoice
    task: str
    question_path: str
    image_path: Path
    save_path: Path
    batch_size: int | None = None
    total_chunks: int = 1
    chunk_id: int = 0
    limit: int | None = None
    ids: str | None = None
    save_maps: bool = False
    retry_errors: bool = False
    overwrite: bool = False
