"""Files: where they are, JSON in both directions, a lock, and names that a file takes only when it is whole."""

import errno
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

PACKAGE = Path(__file__).resolve().parent
# What relative names are about: the clone that the package lies in; an installed package has none, and they are about
# the folder in which it is used.
ROOT = PACKAGE.parent if (PACKAGE.parent / "run.py").is_file() else Path.cwd()
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # what file systems without them say


def in_repository(path: str | Path) -> Path:
    """A path as given, if it is absolute or exists here; else relative to the repository."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else ROOT / path


def place_name(path: str | Path) -> str:
    """A folder or file as it is written down in settings: as seen from ROOT, embedded models as in tables.MODELS."""
    path = Path(path).resolve()
    return os.path.relpath(path, PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT)


def patient_threads() -> None:
    """Have threads sleep while they wait: spinning ones crawl on cores that do other work. Before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def safe_name(name: str | Path) -> str:
    """A model's or task's name as a part of a file name: no slash, and folders that are called alike stay apart.

    Short names stay as they are; Qwen/Qwen3-VL-8B is Qwen--Qwen3-VL-8B; a folder is its own name and a few letters
    that tell it from others, weights~3f2a9c.
    """
    if Path(name).is_dir():
        digest = hashlib.sha256(str(Path(name).resolve()).encode()).hexdigest()
        name = f"{Path(name).resolve().name}~{digest[:6]}"
    return re.sub(r"[^\w.~-]", "_", str(name).strip("/").replace("/", "--"))


def clone_commit() -> str | None:
    """The commit of the clone that the package lies in; None for an installed one, or without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8; a ValueError that names it if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; a ValueError that names it if it is broken."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no complete JSON file: {error}") from error


def read_rows(path: str | Path) -> list:
    """The objects of a file that is a JSON list or JSON lines; raises ValueError, naming the file, if it is neither."""
    text = read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from error
    rows = [rows] if isinstance(rows, dict) else rows  # a single line
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of records")
    return rows


def read_meta(path: str | Path) -> dict:
    """What a result's .meta.json says of how it was made; empty if there is none.

    Raises:
        ValueError: naming the file: it is broken, or none that run.py has written.
    """
    meta = read_json(path) if Path(path).exists() else {}
    wrong = f"{path} is none that run.py has written"
    if not isinstance(meta, dict):
        raise ValueError(f"{wrong}: it must be an object, not a {type(meta).__name__}")
    for part in ("settings", "scoring", "counts", "runs"):
        if not isinstance(meta.get(part, {}), dict):
            raise ValueError(f"{wrong}: its {part} must be an object, not a {type(meta[part]).__name__}")
    if not all(isinstance(run, dict) for run in meta.get("runs", {}).values()):
        raise ValueError(f"{wrong}: each of its runs must be an object")
    if not isinstance(meta.get("settings", {}).get("image_path", ""), str):
        raise ValueError(f"{wrong}: its image_path must be a text")
    for name in ("metrics", "sha256") if "scoring" in meta else ():
        said = meta["scoring"].get(name)
        if not isinstance(said, dict) or not all(isinstance(each, str) for each in said.values()):
            raise ValueError(f"{wrong}: {name} of its scoring must be an object of texts")
    if not isinstance(meta.get("counts", {}).get("dataset", 0), int):
        raise ValueError(f"{wrong}: its count of the dataset must be a whole number")
    return meta


def is_json(value: Any) -> bool:
    """Can a value be written as JSON?"""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def whole_lines(text: bytes) -> Iterator[dict]:
    """The JSON objects of a part file's bytes; a line torn by a kill is left out: its record is done again."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # no JSON, or cut within a character
            continue
        if isinstance(found, dict):
            yield found


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which then takes the name: a reader sees the old file or the new one, never a half.

        with atomic_path("picture.png") as temporary:
            image.save(temporary)

    The temporary name has the same ending; nothing is left of it if the writing fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{time.time_ns()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: Any) -> None:
    """A JSON file, by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """No other process is in here with the same path; a lock that a kill releases. Without one where there are none."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:  # some network file systems
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()
