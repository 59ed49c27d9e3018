"""The JSON in both directions: load a task's records, append finished ones, find what is left, merge.

A result file `NAME.json` is a list in dataset order. While it is being made, each process appends to a part file of its
own in `NAME.parts/`, one JSON object a line; what is in any of them is done. `NAME.meta.json` holds the settings.
"""

import json
import os
import shutil
import socket
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def in_repository(path):
    """A path as given, if it is absolute or exists here; else relative to the repository."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else ROOT / path


# ------------------------------------------------------------------------------------------------------------- input
def load_task(question_path):
    """The records of a dataset: a JSON list, JSON lines, or the name of a Hugging Face dataset (its `test` split).

    Raises:
        FileNotFoundError: no such file, and nothing that could be a dataset's name.
        ValueError: not a list of objects, or an id that is missing or given twice.
    """
    path = in_repository(question_path)
    if path.is_file():
        records = _parse(path)
    elif path.suffix in (".json", ".jsonl"):
        raise FileNotFoundError(f"no questions at {question_path}: see data/README.md for how to get or make them")
    else:
        records = _from_hub(str(question_path))
    seen = {}
    for number, record in enumerate(records):
        if not isinstance(record, dict) or record.get("id") in (None, ""):
            raise ValueError(f"{question_path}: record {number} is no object with an id: {str(record)[:80]}")
        if record["id"] in seen:
            raise ValueError(
                f"{question_path}: records {seen[record['id']]} and {number} have the same id {record['id']!r}"
            )
        seen[record["id"]] = number
    return records


def _parse(path):
    text = path.read_text(encoding="utf-8-sig")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}, not a list of records")
    return records


def _from_hub(name):
    try:
        from datasets import load_dataset  # optional: most runs read files
    except ImportError as error:
        raise FileNotFoundError(
            f"no file {name}; to read it as a Hugging Face dataset, `pip install datasets`"
        ) from error
    return [dict(record) for record in load_dataset(name, split="test")]


def check_record(record, image_folder):
    """The path of a record's image.

    Raises:
        ValueError: a missing or empty field, or an image outside of the folder.
    """
    for field in ("question", "image_path"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f"record {record['id']!r} has no {field}")
    folder = Path(image_folder).resolve()
    path = (folder / record["image_path"]).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"record {record['id']!r}: image_path {record['image_path']!r} leaves the image folder")
    return path


# ------------------------------------------------------------------------------------------------------------ output
class Results:
    """The results of one (model, task, method), through kills and reruns.

    Args:
        path: the result file, `FOLDER/MODEL-TASK-METHOD.json`.
        settings: dict of what must be equal for old and new records to stand in one file.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.parts, self.meta = self.path.with_suffix(".parts"), self.path.with_suffix(".meta.json")
        self._mine = None

    def clear(self):
        """Forget what was done before."""
        self.path.unlink(missing_ok=True)
        self.meta.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def done(self, retry_errors=False):
        """{id: finished record} from the result file and all part files.

        A line torn by a kill does not count, nor do records that ended in an error if those are to be tried again.
        Raises:
            ValueError: there are finished records, made with other settings (names them).
        """
        newer = {}
        for part in sorted(self.parts.glob("*.jsonl")):  # names begin with the time
            try:
                lines = part.read_text().splitlines()
            except FileNotFoundError:
                continue  # another process has just merged it: its records are in the result file, read below
            for line in lines:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # torn by a kill: the record is done again
                newer[record["id"]] = record
        older = json.loads(self.path.read_text()) if self.path.exists() else []
        finished = {record["id"]: record for record in older} | newer
        if finished and self.meta.exists():
            self._refuse_other_settings(json.loads(self.meta.read_text()))
        return {key: record for key, record in finished.items() if not (retry_errors and "error" in record)}

    def _refuse_other_settings(self, made):
        new = self.settings
        changed = [f"{key} was {made.get(key)!r} and is now {new[key]!r}" for key in new if made.get(key) != new[key]]
        if changed:
            what = "; ".join(changed)
            raise ValueError(f"{self.path} was made with other settings ({what}): use --overwrite or --save_path")

    def append(self, record):
        """Add a finished record to this process's own part file, handed to the system before this returns."""
        if self._mine is None:
            self.parts.mkdir(parents=True, exist_ok=True)
            write_atomically(self.meta, self.settings)
            name = f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._mine = (self.parts / name).open("x")
        self._mine.write(json.dumps(record) + "\n")
        self._mine.flush()

    def merge(self, wanted, records):
        """Write the result file in dataset order if every wanted record is done.

        Args:
            wanted: the records that this run is about; records: all of the dataset, done or not.
        Returns:
            (number of wanted records that are not done yet, {id: error} of the wanted ones that failed)
        """
        finished = self.done()
        missing = sum(record["id"] not in finished for record in wanted)
        if not missing and finished:
            write_atomically(self.path, [finished[record["id"]] for record in records if record["id"] in finished])
            if self._mine is not None:
                self._mine.close()
            shutil.rmtree(self.parts, ignore_errors=True)
        ids = (record["id"] for record in wanted)
        errors = {key: finished[key]["error"] for key in ids if "error" in finished.get(key, ())}
        return missing, errors


def write_atomically(path, data):
    """JSON under a temporary name of its own, then renamed: a reader sees the old file or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.time_ns()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)
