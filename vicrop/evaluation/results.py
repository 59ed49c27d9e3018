"""The results of a run: append finished records, find what is left, merge.

A result file `NAME.json` is a list in dataset order. While it is being made, each process appends to a part file of its
own in `NAME.parts/` (see part_files.py); what is in any of them is done. `NAME.meta.json` tells how it was made,
`NAME.maps.npz` has the importance maps if they are kept.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vicrop.dataset import refuse_bad_ids
from vicrop.evaluation.part_files import PartFiles
from vicrop.files import atomic_path, file_lock, read_json, read_meta, write_atomically
from vicrop.map_files import packed, read_maps, unpacked, write_maps

# Fields of a record that a run fills in.
OUTPUT_FIELDS = ("original_answer", "crop_answer", "bbox", "confidence", "gated", "views", "num_img_tokens", "error")


class Results:
    """The results of one (model, task, method), through kills, reruns and any number of processes.

    Nobody waits for anybody: a process writes to a part file of its own only, and whoever finds that all is done writes
    the result file (one at a time, which is all that is locked).

    Args:
        path: the result file, `FOLDER/MODEL-TASK-METHOD.json`.
        settings: what must be equal for old and new records to stand in one file.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), settings
        self.meta, self.maps = (self.path.with_suffix(end) for end in (".meta.json", ".maps.npz"))
        self.parts = PartFiles(self.path.with_suffix(".parts"))
        self._own: dict = {}  # what this process has written
        self._run: dict = {}  # and how it runs

    def clear(self) -> None:
        """Forget what was done before. A kill in between leaves nothing that could pass for something else."""
        self.parts.forget()
        for file in (self.maps, self.path, self.meta):
            file.unlink(missing_ok=True)

    # -- reading
    def done(self, retry_errors: bool = False) -> dict:
        """{id: finished record} from the result file and all part files; an error never takes an answer's place.

        A line torn by a kill does not count, nor do records that ended in an error if those are to be tried again.

        Raises:
            ValueError: there are finished records, made with other settings (names them).
        """
        parts = []
        for lines in self.parts.lines().values():
            records = {line["id"]: line for line in lines if "id" in line}
            if records:
                others = (line for line in lines if "id" not in line)
                made = next((line["settings"] for line in others if "settings" in line), None)
                refuse_other_settings(self.path, made, self.settings)
            parts.append(records)
        older = self._result_file()  # read last: what another process merges meanwhile is in one of both
        if older:
            refuse_other_settings(self.path, self.provenance().get("settings"), self.settings)
        finished = merge_records(older, *parts)
        return {key: record for key, record in finished.items() if not (retry_errors and "error" in record)}

    def poll(self) -> list[dict]:
        """Records that any process has finished since the last call."""
        return self.parts.poll()

    def of_unknown_settings(self) -> bool:
        """Does the result file have records of which nothing tells how they were made?"""
        return "settings" not in self.provenance() and bool(self._result_file())

    def started_by(self, run_id: str) -> bool:
        """Has a process that calls itself so (`note(job=...)`) written any of this?"""
        lines = [line for part in self.parts.lines().values() for line in part if "id" not in line]
        notes = [line.get("run", {}) for line in lines] + list(self.provenance().get("runs", {}).values())
        return any(note.get("job") == run_id for note in notes if note)

    def _result_file(self) -> dict:
        """{id: record} of the result file; empty without one."""
        records = read_json(self.path) if self.path.exists() else []
        if not isinstance(records, list):
            raise ValueError(f"{self.path} is no list of records with an id: move it, or use another folder")
        refuse_bad_ids(records, self.path)
        return {record["id"]: record for record in records}

    def saved_maps(self) -> dict:
        """{record id: (map, region)} of the result file; those of part files are not among them yet."""
        try:
            return read_maps(self.maps) if self.maps.exists() else {}
        except ValueError as error:  # answers must not be lost for it: the maps can be made again
            print(f"{error}: they are forgotten", file=sys.stderr)
            return {}

    def provenance(self) -> dict:
        """What `NAME.meta.json` holds; empty if there is none, a ValueError names one that is broken."""
        return read_meta(self.meta)

    # -- writing
    def append(self, record: dict, saved_map: tuple | None = None) -> None:
        """Add a finished record to this process's own part file, handed to the system before this returns.

        Args:
            saved_map: its (importance map, region), if that is to be kept (see map_files).
        """
        lines = [{"map_of": record["id"], **packed(*saved_map)}] if saved_map else []
        self._write(*lines, record)  # the record comes last: it says that it is finished
        self._own[record["id"]] = record

    def note(self, **run: Any) -> None:
        """Keep how this process runs (device, versions, seconds, ...) for `NAME.meta.json`; later calls add to it."""
        self._run |= run
        if self.parts.ever_begun:
            self._write({"run": run})

    def _write(self, *lines: dict) -> None:
        if not self.parts.begun:
            # A new part; also where another run has finished everything meanwhile and taken the old one away.
            self.done()  # what may have been written since this run began may not differ in its settings
            lines = ({"settings": self.settings}, {"run": self._run}, *self._own.values(), *lines)
            self.parts.begin()
        self.parts.append(lines)

    def merge(self, wanted: Sequence[dict], records: Sequence[dict]) -> tuple[int, dict]:
        """Write the result file in dataset order if every wanted record is done.

        Args:
            wanted: the records that this run is about; records: all of the dataset, done or not.
        Returns:
            (number of wanted records that are not done yet, {id: error} of the wanted ones that failed)
        """
        self.parts.sync()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(self.path.with_name(f".{self.path.stem}.lock")):
            finished = merge_records(self._own, self.done())
            missing = sum(record["id"] not in finished for record in wanted)
            if finished and not missing and (not self.of_unknown_settings() or self.parts.lines()):
                self._write_result(finished, records)  # but never this run's settings beside what others have made
        errors = {record["id"]: finished[record["id"]].get("error") for record in wanted if record["id"] in finished}
        return missing, {key: error for key, error in errors.items() if error is not None}

    def _write_result(self, finished: dict, records: Sequence[dict]) -> None:
        runs = self.provenance().get("runs", {}) if self.path.exists() else {}
        maps = self.saved_maps() if self.path.exists() else {}  # without a result they are of another one
        for part, lines in self.parts.lines().items():
            for line in (line for line in lines if "id" not in line):
                runs[part.stem] = runs.get(part.stem, {}) | line.get("run", {})
                if "map_of" in line:
                    maps[line["map_of"]] = unpacked(line)
        ids = [record["id"] for record in records if record["id"] in finished]
        totals = {name: sum(run.get(name, 0) for run in runs.values()) for name in ("seconds", "forwards")}
        counts = {"records": len(ids), "errors": sum("error" in finished[key] for key in ids), "dataset": len(records)}
        kept = {key: maps[key] for key in ids if key in maps}
        if kept:
            with atomic_path(self.maps) as temporary:
                write_maps(temporary, kept)
        else:
            self.maps.unlink(missing_ok=True)  # those of a result that is there no more
        # Meta first: a result of which nothing is known would take any settings.
        write_atomically(self.meta, {"settings": self.settings, "counts": counts, **totals, "runs": runs})
        write_atomically(self.path, [finished[key] for key in ids])
        if len(ids) == len(records):  # nothing that another process may still add is missing then
            self.parts.remove()


def refuse_other_settings(path: Path, made: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """ValueError, naming the file and each difference, if its records were made with other settings than those of now.

    Nothing is refused where nothing is known (`made` is None): another program's file, or one that was moved alone.
    """
    if made is None:
        return
    names = list(dict.fromkeys([*now, *made]))
    changed = [f"{name} was {made.get(name)!r} and is now {now.get(name)!r}" for name in names
               if made.get(name) != now.get(name)]  # fmt: skip
    if changed:
        what = "; ".join(changed)
        raise ValueError(f"{path} was made with other settings ({what}): use --overwrite or another folder")


def with_outputs(record: dict, fields: dict) -> dict:
    """A finished record: what the dataset says and what was found out, nothing that an earlier run has found out."""
    return {name: value for name, value in record.items() if name not in OUTPUT_FIELDS} | fields


def merge_records(*parts: dict) -> dict:
    """All of {id: record}; later ones count, except that an error never takes an answer's place."""
    found = {}
    for part in parts:
        kept = {key for key in part.keys() & found.keys() if "error" in part[key] and "error" not in found[key]}
        found |= {key: record for key, record in part.items() if key not in kept}
    return found
