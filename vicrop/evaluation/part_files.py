"""Part files: while a run is on, each process appends to a file of its own, one JSON object a line.

A part begins with the settings of its process. A line with an id is a record, whatever the dataset calls its other
fields. Maps and notes on the run have no id.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from vicrop.dataset import Record, field_of
from vicrop.files import whole_lines


class PartFiles:
    """The part files of one result, in a folder; `append` writes to this process's own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: TextIO | None = None
        self._polled: dict[Path, int] = {}  # part file -> how many of its bytes `poll` has read

    def lines(self) -> dict[Path, list[dict]]:
        """{part file: its whole lines, parsed}, the oldest part first.

        Raises:
            ValueError: naming the part: it has a line that no run writes.
        """
        found = {}
        for part in sorted(self.folder.glob("*.jsonl")):  # names begin with the time
            try:
                text = part.read_bytes()
            except FileNotFoundError:
                continue  # another process has just merged it into the result file, which is read later
            found[part] = list(whole_lines(text))
            refuse_bad_lines(found[part], part)
        return found

    def poll(self) -> list[dict]:
        """Records that any process has finished since the last call."""
        found = []
        for part in self.folder.glob("*.jsonl"):
            try:
                with part.open("rb") as file:
                    file.seek(self._polled.get(part, 0))
                    text = file.read()
            except FileNotFoundError:
                continue
            whole = text.rfind(b"\n") + 1  # the last line may not be complete yet
            self._polled[part] = self._polled.get(part, 0) + whole
            lines = list(whole_lines(text[:whole]))
            refuse_bad_lines(lines, part)
            found += [line for line in lines if "id" in line]
        return found

    @property
    def begun(self) -> bool:
        """Has this process a part file that still exists? The process that finds all done deletes all parts."""
        return self._file is not None and bool(os.fstat(self._file.fileno()).st_nlink)

    @property
    def ever_begun(self) -> bool:
        """Has this process had a part file?"""
        return self._file is not None

    def begin(self) -> None:
        """Open a new part file for this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.jsonl").open("x")

    def append(self, lines: Sequence[dict]) -> None:
        """Write lines to this process's part file (after `begin`); they survive a kill once this returns."""
        assert self._file is not None, "begin() opens the part file"
        self._file.write("".join(json.dumps(each) + "\n" for each in lines))
        self._file.flush()

    def sync(self) -> None:
        """Write this process's part file to the disk, so that other machines see all of it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Close and delete all parts: their records are in the result file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.forget()

    def forget(self) -> None:
        """Delete all parts, whatever is in them."""
        shutil.rmtree(self.folder, ignore_errors=True)


def refuse_bad_lines(lines: Sequence[dict], part: Path) -> None:
    """ValueError, naming the part file, if a line has an invalid id, or if its settings or run are no objects."""
    for line in lines:
        if "id" in line:
            field_of(line, "id", Record, f"{part}: record {line['id']!r}")
        for name in ("settings", "run") if "id" not in line else ():
            if not isinstance(line.get(name, {}), dict):
                raise ValueError(f"{part} is none that run.py has written: its {name} must be an object, "
                                 f"not a {type(line[name]).__name__}")  # fmt: skip
