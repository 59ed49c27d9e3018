"""The official files of a benchmark: found by name, read row by row, and the images that tables hold as files."""

import ast
import base64
import csv
import filecmp
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from vicrop.dataset import field_of, shown
from vicrop.files import read_json, read_rows
from vicrop.images import name_of_content

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LONGEST = 1 << 30  # characters of a field of a table; an image of 8K has some 50 million
REFERENCE = 64  # an image of so many characters is the index of the row that has it (VLMEvalKit, image_base.py)


class Source:
    """A folder that has a release's files, at any depth, under their official names.

        with Source("downloads", "data/.gqa") as release:
            content = release.json("testdev_balanced_questions.json")

    Args:
        scratch: a folder for the images that tables hold, as files; it is made when it is needed, and deleted at the
            end.
    """

    def __init__(self, folder: str | Path, scratch: str | Path | None = None):
        self.folder, self.scratch = Path(folder), None if scratch is None else Path(scratch)
        if not self.folder.is_dir():
            raise ValueError(f"no folder {folder}: --source must be the folder of the official files")
        self.at = ""  # the file and entry that is being converted, for error messages
        self.by_name: dict[str, list[Path]] = {}
        seen = set()  # folders: links may lead in a circle
        for below, inner, names in os.walk(self.folder, followlinks=True):
            if os.path.realpath(below) in seen:
                inner.clear()
                continue
            seen.add(os.path.realpath(below))
            for name in names:
                self.by_name.setdefault(name, []).append(Path(below) / name)

    def __enter__(self) -> "Source":
        self._forget_unpacked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_unpacked()

    def _forget_unpacked(self) -> None:
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------------- files
    def matching(self, pattern: str) -> list[Path]:
        """The files whose name matches, sorted."""
        return sorted(path for paths in self.by_name.values() for path in paths if path.match(pattern))

    def find(self, pattern: str) -> Path:
        """The only file whose name matches; a ValueError if there is none, or more than one."""
        found = self.matching(pattern)
        if len(found) != 1:
            names = ", ".join(str(path.relative_to(self.folder)) for path in found[:5]) or "none"
            packed = "" if found else self.packed(lambda member: member.match(pattern))
            raise ValueError(f"{self.folder} must hold one {pattern}, found: {names}{packed}")
        return found[0]

    def json(self, pattern: str) -> Any:
        """The content of the only JSON file whose name matches."""
        return read_json(self.find(pattern))

    def lines(self, pattern: str) -> list[dict[str, Any]]:
        """The objects of the only file of JSON lines whose name matches."""
        return read_rows(self.find(pattern))

    def table(self, *patterns: str, field: str = "index") -> Iterator[dict[str, Any]]:
        """Yield the rows of a table: of the only .json or .tsv file that matches, or of all .parquet files that do.

        Args:
            patterns: several forms of the same release; the first that is there counts.
            field: which names a row in errors.
        """
        pattern = next((each for each in patterns if self.matching(each)), None)
        if pattern is None:
            raise ValueError(f"{self.folder} must hold {' or '.join(patterns)}, and holds none of them")
        if pattern.endswith(".parquet"):
            yield from self.each(parquet_rows(self.matching(pattern)), pattern, field)
        else:
            path = self.find(pattern)
            rows = tsv_rows(path) if pattern.endswith(".tsv") else read_rows(path)
            yield from self.each(rows, pattern, field)

    def each(self, entries: Iterable[Any], where: str, field: str) -> Iterator[Any]:
        """Yield the entries of the file `where`; meanwhile `at` names the entry, by its `field` if it has that."""
        for number, entry in enumerate(entries):
            named = isinstance(entry, dict) and field in entry
            self.at = f"{where}: " + (f"{field} {shown(entry[field])}" if named else f"entry {number}")
            yield entry
        self.at = ""

    # --------------------------------------------------------------------------------------------------------- images
    def unpacked(self, image: Any) -> str:
        """The name of the file that a table's image has now, in base64 or as `datasets` gives it; one of each content.

        Raises:
            ValueError: it is no image, or none that can be read.
        """
        if self.scratch is None:
            raise ValueError(f"{self.at}: there is no folder for the images of a table")
        try:
            content = image["bytes"] if isinstance(image, dict) else base64.b64decode(image, validate=True)
            name = name_of_content(content)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"{self.at}: {shown(image)} is no image in base64: {error}") from error
        path = self.scratch / name
        if name not in self.by_name:
            self.scratch.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.by_name[name] = [path]
        return name

    def image(self, name: str) -> Path | None:
        """The file of an image, by its official name, which may begin with folders; None if it is missing.

        Raises:
            ValueError: there are several such files, and they differ.
        """
        found = [path for path in self.by_name.get(Path(name).name, ()) if path.as_posix().endswith("/" + name)]
        if not all(filecmp.cmp(found[0], other, shallow=False) for other in found[1:]):
            raise ValueError(
                f"which one is {name}? {', '.join(map(str, found[:5]))} differ: choose a --source with one of them"
            )
        return min(found, default=None)

    def packed(self, is_wanted: Callable[[PurePosixPath], bool]) -> str:
        """The end of an error about missing files: which archive has one and must be unpacked; "" if none has.

        Args:
            is_wanted: is this member of an archive one of the missing files?
        """
        archives = [path for name, paths in self.by_name.items() if name.lower().endswith(ARCHIVES) for path in paths]
        for path in sorted(archives):
            member = next((each for each in map(PurePosixPath, members_of(path)) if is_wanted(each)), None)
            if member:
                return f"; {path} has {member}: unpack it there"
        return ""


def members_of(path: Path) -> list[str]:
    """The names of the members of a zip or tar archive; no names if it is broken."""
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()
        with tarfile.open(path) as archive:
            return archive.getnames()
    except (zipfile.BadZipFile, tarfile.TarError, OSError, zlib.error, EOFError):
        return []


# -------------------------------------------------------------------------------------------------------------- tables
def tsv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table with tabs, as pandas writes it. A file of many GB is never whole in memory."""
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")


def parquet_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files, their images as they are stored.

    Raises:
        ValueError: there is no `datasets` to read them with.
    """
    try:
        from datasets import Image, load_dataset  # an extra: most releases are JSON
    except ImportError as error:
        raise ValueError("parquet files are read with `datasets`: pip install 'vicrop[hub]'") from error
    rows = load_dataset("parquet", data_files=list(map(str, paths)), split="train", streaming=True)
    for name, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
    yield from rows


def list_of(value: Any) -> list[Any]:
    """A list, also where a table has it as the text of one, "['(A) red', '(B) blue']"; a ValueError shows what is none.

    Raises:
        ValueError: it is none.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{shown(value)} is no list: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{shown(value)} is no list")
    return found


def official(entry: dict, field: str, kind: type) -> str | int:
    """A field of an official entry that has its id or that of its image; an error shows the entry."""
    if field not in entry:
        raise KeyError(field)
    return field_of(entry, field, kind, f"entry {shown(entry)}")
