"""A dataset of the Hugging Face hub, copied once into a folder as data.json and image files, as any other task is.

The copy is what runs are about: without a network, and whatever becomes of the dataset. It needs `datasets` (the extra
`hub`) only while it is made.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicrop.dataset import refuse_bad_ids
from vicrop.files import atomic_path, file_lock, is_json, write_atomically
from vicrop.images import name_of_content

SPLIT = "test"  # where nothing is said
LABELS = ("answers", "answer")  # columns that are taken for labels where there are none by that name


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset, and the folder of its copy.

    Attributes:
        name: as `datasets.load_dataset` takes it, a hub id or a folder; subset: where it has several.
    """

    name: str
    split: str
    folder: Path
    subset: str | None = None

    @property
    def questions(self) -> Path:
        """The copy's data.json."""
        return self.folder / "data.json"

    def fetch(self) -> None:
        """Make the copy, unless it is there; other processes wait for it.

        Raises:
            FileNotFoundError: no `datasets` to read it with.
            ValueError: naming the dataset: no such dataset or split; ids that are not valid; a value that is no image.
        """
        if self.questions.is_file():
            return
        rows = self._rows()
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / ".fetch.lock"):
            if not self.questions.is_file():
                records = list(self._records(rows))
                refuse_bad_ids(records, self.name)
                write_atomically(self.questions, records)  # last: it says that all images are there
                print(f"{self.name}, split {self.split}: {len(records)} records are now in {self.questions}; "
                      "delete that folder to fetch them again", file=sys.stderr)  # fmt: skip

    def _rows(self) -> Any:
        """The rows as `datasets` has them."""
        try:
            from datasets import load_dataset  # an extra: most runs read files
        except ImportError as error:
            raise FileNotFoundError(
                f"no file {self.name}; to read it as a dataset of the Hugging Face hub, `pip install datasets`"
            ) from error
        try:
            return load_dataset(self.name, self.subset, split=self.split)
        except (OSError, ValueError) as error:  # it says which splits and subsets there are
            raise ValueError(f"{self.name} has no split {self.split!r} that can be read: {error}") from error

    def _records(self, rows: Any) -> Iterator[dict]:
        """A record of each row: an id if it has none, labels by that name, files in place of images."""
        from datasets import Image as Images

        images = [name for name, kind in rows.features.items() if isinstance(kind, Images)]
        for name in images:
            rows = rows.cast_column(name, Images(decode=False))  # the bytes of their files
        shown = "image" if "image" in images else next(iter(images), None)
        named = None if "labels" in rows.features else next(filter(rows.features.__contains__, LABELS), None)
        left_out = set()
        for number, row in enumerate(rows):
            record = {"id": str(number), **row}
            record |= {name: self._file_of(row[name], f"row {number}: {name}") for name in images}
            record |= {"image_path": record[shown]} if shown else {}
            record |= {"labels": row[named]} if named and is_labels(row[named]) else {}
            bad = {name for name, value in record.items() if not is_json(value)}
            left_out |= bad
            yield {name: value for name, value in record.items() if name not in bad}
        for said in (
            "" if "id" in rows.features else "it has no column id, so the ids are the numbers of its rows",
            f"it has no column labels, so they are those of {named}" if named else "",
            f"{', '.join(sorted(left_out))} cannot be written as JSON and are left out" if left_out else "",
        ):
            if said:
                print(f"{self.name}: {said}", file=sys.stderr)

    def _file_of(self, image: Mapping[str, Any] | None, what: str) -> str | None:
        """The name of the file that an image now has in the folder's `images`; one of each content."""
        if image is None:
            return None
        content = image["bytes"] or Path(image["path"]).read_bytes()
        try:
            name = name_of_content(content)
        except OSError as error:
            raise ValueError(f"{self.name}, {what} is no image that can be read: {error}") from error
        path = self.folder / "images" / name
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        return name


def is_labels(value: Any) -> bool:
    """Is a value what labels may be, a text or a list of texts?"""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
