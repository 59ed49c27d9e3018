"""The results of a run: append finished records, find what is left, merge.

A result file `NAME.json` is a list in dataset order. While it is being made, each process appends to a part file of its
own in `NAME.parts/`, one JSON object a line; what is in any of them is done. `NAME.meta.json` tells how it was made,
`NAME.maps.npz` has the importance maps if they are kept.
"""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from dataset import Record, field_of
from dataset import check_record as check_record  # under their old names, which notebooks know
from dataset import load_task as load_task
from dataset import pick as pick
from dataset import refuse_bad_ids as refuse_bad_ids
from files import ROOT as ROOT
from files import alone_in, read_json, read_meta, renamed_to, whole_lines, write_atomically
from files import in_repository as in_repository
from files import read_rows as read_rows
from map_files import packed, read_maps, unpacked, write_maps

FOUND = ("original_answer", "crop_answer", "bbox", "num_img_tokens", "error")  # fields of a record that a run fills in


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
        if not isinstance(records, list):
            raise ValueError(f"{self.path} is no list of records with an id: move it, or use another folder")
        refuse_bad_ids(records, self.path)
        return {record["id"]: record for record in records}

    def _lines(self):
        """{part: its lines, parsed}: the settings of the process that wrote them, records, maps, notes on the run.

        A record is what has an id; its other fields are the dataset's, whatever they are called.
        """
        found = {}
        for part in sorted(self.parts.glob("*.jsonl")):  # names begin with the time: later ones count
            try:
                text = part.read_bytes()
            except FileNotFoundError:
                continue  # another process has just merged it: its records are in the result file, which is read later
            found[part] = list(whole_lines(text))
            refuse_bad_lines(found[part], part)
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
            lines = list(whole_lines(text[:whole]))
            refuse_bad_lines(lines, part)
            found += [line for line in lines if "id" in line]
        return found

    def saved_maps(self):
        """{record id: (map, region)} of the result file; those of part files are not among them yet."""
        try:
            return read_maps(self.maps) if self.maps.exists() else {}
        except ValueError as error:  # answers must not be lost for it: the maps can be made again
            print(f"{error}: they are forgotten", file=sys.stderr)
            return {}

    def provenance(self):
        """What `NAME.meta.json` holds; empty if there is none, a ValueError names one that is broken."""
        return read_meta(self.meta)

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


def refuse_bad_lines(lines, part):
    """ValueError, naming the part file, if a line has an id that is none, or its settings or run are no objects."""
    for line in lines:
        if "id" in line:
            field_of(line, "id", Record, f"{part}: record {line['id']!r}")
        for name in ("settings", "run") if "id" not in line else ():
            if not isinstance(line.get(name, {}), dict):
                raise ValueError(f"{part} is none that run.py has written: its {name} must be an object, "
                                 f"not a {type(line[name]).__name__}")  # fmt: skip


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
