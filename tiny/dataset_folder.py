"""The folder of a drawn dataset: data.json, images/ and grounding.jsonl, which are of one set or not there."""

import json
from collections.abc import Sequence
from pathlib import Path

from vicrop.dataset import GROUNDING
from vicrop.files import atomic_path, write_atomically


def begin_folder(out: Path, pictures: str, overwrite: bool = False) -> None:
    """Make a folder ready for a new set.

    Args:
        pictures: pattern of the names that the set's pictures have; those of an earlier or killed one are removed.
        overwrite: replace a set that is there.
    Raises:
        FileExistsError: there is a set, and it is not to be overwritten.
    """
    if (out / "data.json").exists() and not overwrite:
        raise FileExistsError(f"{out} has a data.json already: choose another --out, or add --overwrite")
    (out / "images").mkdir(parents=True, exist_ok=True)
    for path in (out / "data.json", out / GROUNDING, *(out / "images").glob(pictures)):
        path.unlink(missing_ok=True)


def finish_folder(out: Path, records: Sequence[dict], phrases: Sequence[dict]) -> None:
    """Write the questions and the phrases; data.json is last, so that a set that has it is whole."""
    with atomic_path(out / GROUNDING) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in phrases))
    write_atomically(out / "data.json", list(records))
