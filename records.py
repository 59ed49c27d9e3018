"""The JSON in both directions: load a task's records, append finished ones, find what is left, merge.

A result file `NAME.json` is a list in dataset order. While it is being made, each process appends to a part file of its
own in `NAME.parts/`, one JSON object a line; what is in any of them is done. `NAME.meta.json` tells how it was made,
`NAME.maps.npz` has the importance maps if they are kept.
"""

import errno
import json
import os
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from map_files import packed, read_maps, unpacked, write_maps

ROOT = Path(__file__).resolve().parent
FOUND = ("original_answer", "crop_answer", "bbox", "num_img_tokens", "error")  # fields of a record that a run fills in
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # what file systems without them say


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
        records = read_rows(path)
    elif path.suffix in (".json", ".jsonl"):
        raise FileNotFoundError(f"no questions at {question_path}: see data/README.md for how to get or make them")
    else:
        records = _from_hub(str(question_path))
    refuse_bad_ids(records, question_path)
    return records


def refuse_bad_ids(records, where):
    """ValueError, naming `where` they are, unless all records are objects with an id, and no id comes twice."""
    seen, twice = {}, []
    for number, record in enumerate(records):
        key = record.get("id") if isinstance(record, dict) else None
        if not isinstance(key, (str, int)) or isinstance(key, bool) or key == "":
            said = f"record {number} is no object with an id (a text or a whole number): {str(record)[:80]}"
            raise ValueError(f"{where}: {said}")
        if key in seen:
            twice.append(f"{key!r} (records {seen[key]} and {number})")
        seen[key] = number
    if twice:
        more = f" and {len(twice) - 10} more" if len(twice) > 10 else ""
        raise ValueError(f"{where}: ids must differ, but these come twice: {', '.join(twice[:10])}{more}")


def pick(records, ids_path=None, limit=None):
    """The records that a run is about: those whose ids a file lists (a JSON list, or one a line), at most `limit`.

    Raises:
        FileNotFoundError, ValueError: no such file; it names ids that the dataset does not have.
    """
    if ids_path is not None:
        text = read_text(ids_path)
        listed = read_rows(Path(ids_path)) if text.lstrip().startswith("[") else map(str.strip, text.split("\n"))
        listed = set(map(str, listed)) - {""}
        unknown = sorted(listed - {str(record["id"]) for record in records})
        if unknown:
            named = ", ".join(unknown[:10])
            raise ValueError(f"{ids_path} names {len(unknown)} ids that are not in the dataset: {named}")
        records = [record for record in records if str(record["id"]) in listed]
    if not records:
        raise ValueError(f"there are no records to ask about: {ids_path or 'the dataset'} is empty")
    return records[:limit]


def read_rows(path):
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


def _from_hub(name):
    try:
        from datasets import load_dataset  # optional: most runs read files
    except ImportError as error:
        raise FileNotFoundError(
            f"no file {name}; to read it as a Hugging Face dataset, `pip install datasets`"
        ) from error
    records = [dict(record) for record in load_dataset(name, split="test")]
    left_out = sorted({field for record in records for field, value in record.items() if not is_json(value)})
    if left_out:
        print(f"{name}: {', '.join(left_out)} cannot be written as JSON and are left out", file=sys.stderr)
    return [{field: value for field, value in record.items() if field not in left_out} for record in records]


def is_json(value):
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def check_record(record, image_folder):
    """The path of a record's image.

    Raises:
        ValueError: a missing or empty field, or an image outside of the folder.
    """
    for field in ("question", "image_path"):
        if record.get(field) is None or record[field] == "":
            raise ValueError(f"record {record['id']!r} has no {field}")
    for field in ("question", "image_path", "short_question"):
        value = record.get(field) or "-"
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"record {record['id']!r}: {field} is a text that is not empty, not {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"record {record['id']!r}: {field} {value!r} has half of a character") from error
    folder = Path(image_folder).resolve()
    path = (folder / record["image_path"]).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"record {record['id']!r}: image_path {record['image_path']!r} leaves the image folder")
    return path


# ------------------------------------------------------------------------------------------------------------ output
class Results:
    """The results of one (model, task, method), through kills, reruns and any number of processes.

    Nobody waits for anybody: a process writes to a part file of its own only, and whoever finds that all is done writes
    the result file (one at a time, which is all that is locked).

    Args:
        path: the result file, `FOLDER/MODEL-TASK-METHOD.json`.
        settings: dict of what must be equal for old and new records to stand in one file.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.parts, self.meta, self.maps = (self.path.with_suffix(end) for end in (".parts", ".meta.json", ".maps.npz"))
        self._own, self._run, self._part = {}, {}, None  # what this process has written, and where
        self._read = {}  # part file -> bytes that `news` has seen of it

    def clear(self):
        """Forget what was done before. A kill in between leaves nothing that could pass for something else."""
        shutil.rmtree(self.parts, ignore_errors=True)
        for file in (self.maps, self.path, self.meta):
            file.unlink(missing_ok=True)

    # -- reading
    def done(self, retry_errors=False):
        """{id: finished record} from the result file and all part files; an error never takes an answer's place.

        A line torn by a kill does not count, nor do records that ended in an error if those are to be tried again.
        Raises:
            ValueError: there are finished records, made with other settings (names them).
        """
        parts = []
        for lines in self._lines().values():
            records = {line["id"]: line for line in lines if "id" in line}
            if records:
                others = (line for line in lines if "id" not in line)
                self._refuse_other_settings(next((line["settings"] for line in others if "settings" in line), None))
            parts.append(records)
        older = self._result_file()  # read last: what another process merges meanwhile is in one of both
        if older:
            self._refuse_other_settings(self.provenance().get("settings"))
        finished = joined(older, *parts)
        return {key: record for key, record in finished.items() if not (retry_errors and "error" in record)}

    def of_unknown_settings(self):
        """Does the result file have records of which nothing tells how they were made?"""
        return "settings" not in self.provenance() and bool(self._result_file())

    def begun_by(self, job):
        """Has a process that calls itself so (`note(job=...)`) written any of this?"""
        lines = [line for part in self._lines().values() for line in part if "id" not in line]
        notes = [line.get("run", {}) for line in lines] + list(self.provenance().get("runs", {}).values())
        return any(note.get("job") == job for note in notes if note)

    def _result_file(self):
        """{id: record} of the result file; empty without one."""
        records = read_json(self.path) if self.path.exists() else []
        if not isinstance(records, list) or not all(isinstance(record, dict) and "id" in record for record in records):
            raise ValueError(f"{self.path} is no list of records with an id: move it, or use another folder")
        return {record["id"]: record for record in records}

    def _lines(self):
        """{part: its lines, parsed}: the settings of the process that wrote them, records, maps, notes on the run.

        A record is what has an id; its other fields are the dataset's, whatever they are called.
        """
        found = {}
        for part in sorted(self.parts.glob("*.jsonl")):  # names begin with the time: later ones count
            try:
                found[part] = list(whole_lines(part.read_bytes()))
            except FileNotFoundError:
                continue  # another process has just merged it: its records are in the result file, which is read later
        return found

    def news(self):
        """Records that any process has finished since the last call."""
        found = []
        for part in self.parts.glob("*.jsonl"):
            try:
                with part.open("rb") as file:
                    file.seek(self._read.get(part, 0))
                    text = file.read()
            except FileNotFoundError:
                continue
            whole = text.rfind(b"\n") + 1  # the rest is being written
            self._read[part] = self._read.get(part, 0) + whole
            found += [line for line in whole_lines(text[:whole]) if "id" in line]
        return found

    def saved_maps(self):
        """{record id: (map, region)} of the result file; those of part files are not among them yet."""
        try:
            return read_maps(self.maps) if self.maps.exists() else {}
        except ValueError as error:  # answers must not be lost for it: the maps can be made again
            print(f"{error}: they are forgotten", file=sys.stderr)
            return {}

    def provenance(self):
        """What `NAME.meta.json` holds; empty if there is none."""
        return read_json(self.meta) if self.meta.exists() else {}

    def _refuse_other_settings(self, made):
        new = self.settings
        if made is None:
            return  # another program's file, or one moved here alone: there is nothing to compare
        names = list(dict.fromkeys([*new, *made]))
        changed = [f"{name} was {made.get(name)!r} and is now {new.get(name)!r}" for name in names
                   if made.get(name) != new.get(name)]  # fmt: skip
        if changed:
            what = "; ".join(changed)
            raise ValueError(f"{self.path} was made with other settings ({what}): use --overwrite or another folder")

    # -- writing
    def append(self, record, saved_map=None):
        """Add a finished record to this process's own part file, handed to the system before this returns.

        `saved_map`: its (importance map, region), if that is to be kept (see map_files).
        """
        lines = [{"map_of": record["id"], **packed(*saved_map)}] if saved_map else []
        self._write(*lines, record)  # the record comes last: it says that it is finished
        self._own[record["id"]] = record

    def note(self, **run):
        """Keep how this process runs (device, versions, seconds, ...) for `NAME.meta.json`; later calls add to it."""
        self._run |= run
        if self._part is not None:
            self._write({"run": run})

    def _write(self, *lines):
        if self._part is None or not os.fstat(self._part.fileno()).st_nlink:
            # A new part; also where another run has finished everything meanwhile and taken the old one away.
            self.done()  # what may have been written since this run began may not differ in its settings
            lines = [{"settings": self.settings}, {"run": self._run}, *self._own.values(), *lines]
            self.parts.mkdir(parents=True, exist_ok=True)
            self._part = (self.parts / f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.jsonl").open("x")
        self._part.write("".join(json.dumps(each) + "\n" for each in lines))
        self._part.flush()

    def merge(self, wanted, records):
        """Write the result file in dataset order if every wanted record is done.

        Args:
            wanted: the records that this run is about; records: all of the dataset, done or not.
        Returns:
            (number of wanted records that are not done yet, {id: error} of the wanted ones that failed)
        """
        if self._part is not None:
            os.fsync(self._part.fileno())  # so that other machines see it
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(self.path.with_name(f".{self.path.stem}.lock")):
            finished = joined(self._own, self.done())
            missing = sum(record["id"] not in finished for record in wanted)
            if finished and not missing and (not self.of_unknown_settings() or self._lines()):
                self._write_result(finished, records)  # but never this run's settings beside what others have made
        errors = {record["id"]: finished[record["id"]].get("error") for record in wanted if record["id"] in finished}
        return missing, {key: error for key, error in errors.items() if error is not None}

    def _write_result(self, finished, records):
        runs = self.provenance().get("runs", {}) if self.path.exists() else {}
        maps = self.saved_maps() if self.path.exists() else {}  # without a result they are of another one
        for part, lines in self._lines().items():
            for line in (line for line in lines if "id" not in line):
                runs[part.stem] = runs.get(part.stem, {}) | line.get("run", {})
                if "map_of" in line:
                    maps[line["map_of"]] = unpacked(line)
        ids = [record["id"] for record in records if record["id"] in finished]
        totals = {name: sum(run.get(name, 0) for run in runs.values()) for name in ("seconds", "forwards")}
        counts = {"records": len(ids), "errors": sum("error" in finished[key] for key in ids), "dataset": len(records)}
        about = {"settings": self.settings, "counts": counts, **totals, "runs": runs}
        kept = {key: maps[key] for key in ids if key in maps}
        if kept:
            with renamed_to(self.maps) as temporary:
                write_maps(temporary, kept)
        else:
            self.maps.unlink(missing_ok=True)  # those of a result that is there no more
        write_atomically(self.meta, about)  # before: a result of which nothing is known would take any settings
        write_atomically(self.path, [finished[key] for key in ids])
        if len(ids) == len(records):  # nothing that another process may still add is missing then
            if self._part is not None:
                self._part.close()
                self._part = None
            shutil.rmtree(self.parts, ignore_errors=True)


def answered(record, fields):
    """A finished record: what the dataset says and what was found out, nothing that an earlier run has found out."""
    return {name: value for name, value in record.items() if name not in FOUND} | fields


def joined(*parts):
    """All of {id: record}; later ones count, except that an error never takes an answer's place."""
    found = {}
    for part in parts:
        kept = {key for key in part.keys() & found.keys() if "error" in part[key] and "error" not in found[key]}
        found |= {key: record for key, record in part.items() if key not in kept}
    return found


@contextmanager
def alone_in(path):
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


def read_text(path):
    """The text of a file in UTF-8; a ValueError that names it if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path):
    """The content of a JSON file; a ValueError that names it if it is broken."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no complete JSON file: {error}") from error


def whole_lines(text):
    """The JSON objects of a part file's bytes; a line torn by a kill is left out: its record is done again."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # no JSON, or cut within a character
            continue


@contextmanager
def renamed_to(path):
    """A temporary path to write to, which then takes the name: a reader sees the old file or the new one, never a half.

        with renamed_to("picture.png") as temporary:
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


def write_atomically(path, data):
    """A JSON file, by `renamed_to`."""
    with renamed_to(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
