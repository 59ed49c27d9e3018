"""The results of a run: append finished records, find those that are left, merge.

A result file `NAME.json` is a list in dataset order. While it is being made, each process appends to a part file of its
own in `NAME.parts/` (see part_files.py); a record in any of them is finished. `NAME.meta.json` tells how the result was
made, `NAME.maps.npz` has the importance maps if they are kept.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vicrop.dataset import Id, refuse_bad_ids
from vicrop.evaluation.part_files import PartFiles
from vicrop.files import atomic_path, file_lock, read_json, read_meta, write_atomically
from vicrop.map_files import SavedMap, packed, read_maps, unpacked, write_maps

# Fields of a record that a run fills in.
OUTPUT_FIELDS = ("original_answer", "crop_answer", "bbox", "bboxes", "confidence", "gated", "views", "num_img_tokens",
                 "error")  # fmt: skip


class Results:
    """The results of one (model, task, method); they survive kills and reruns, and any number of processes share them.

    No process waits for another one: each writes to a part file of its own, and the one that finds all records finished
    writes the result file. Only that is locked.

    Args:
        path: the result file, `FOLDER/MODEL-TASK-METHOD.json`.
        settings: what must be equal for all records of the file.
        scoring: how it is to be scored, which no answer depends on (see own_metrics.kept); it may differ.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], scoring: Mapping[str, Any] | None = None):
        self.path, self.settings, self.scoring = Path(path), settings, scoring
        self.meta, self.maps = (self.path.with_suffix(end) for end in (".meta.json", ".maps.npz"))
        self.parts = PartFiles(self.path.with_suffix(".parts"))
        self._own: dict[Id, dict] = {}  # the records that this process has written
        self._run: dict[str, Any] = {}  # how this process runs

    def clear(self) -> None:
        """Delete all earlier results, in an order in which a kill leaves no file that seems to be valid."""
        self.parts.forget()
        for file in (self.maps, self.path, self.meta):
            file.unlink(missing_ok=True)

    # -- reading
    def done(self, retry_errors: bool = False) -> dict[Id, dict]:
        """{id: finished record} from the result file and all part files; an error never replaces an answer.

        A line that a kill has cut off does not count.

        Args:
            retry_errors: leave out records that ended in an error, so that they are asked again.
        Raises:
            ValueError: naming the differences: finished records were made with other settings.
        """
        parts = []
        for lines in self.parts.lines().values():
            records = {line["id"]: line for line in lines if "id" in line}
            if records:
                others = (line for line in lines if "id" not in line)
                made = next((line["settings"] for line in others if "settings" in line), None)
                refuse_other_settings(self.path, made, self.settings)
            parts.append(records)
        older = self._result_file()  # read last: a part that another process merges meanwhile is then in here
        if older:
            refuse_other_settings(self.path, self.provenance().get("settings"), self.settings)
        finished = merge_records(older, *parts)
        return {key: record for key, record in finished.items() if not (retry_errors and "error" in record)}

    def poll(self) -> list[dict]:
        """Records that any process has finished since the last call."""
        return self.parts.poll()

    def of_unknown_settings(self) -> bool:
        """Does the result file have records, but no .meta.json that tells how they were made?"""
        return "settings" not in self.provenance() and bool(self._result_file())

    def started_by(self, run_id: str) -> bool:
        """Has a process of this command, by its `note(job=run_id)`, written any of these results?"""
        lines = [line for part in self.parts.lines().values() for line in part if "id" not in line]
        notes = [line.get("run", {}) for line in lines] + list(self.provenance().get("runs", {}).values())
        return any(note.get("job") == run_id for note in notes if note)

    def _result_file(self) -> dict[Id, dict]:
        """{id: record} of the result file; empty without one."""
        records = read_json(self.path) if self.path.exists() else []
        if not isinstance(records, list):
            raise ValueError(f"{self.path} is no list of records with an id: move it, or use another folder")
        refuse_bad_ids(records, self.path)
        return {record["id"]: record for record in records}

    def saved_maps(self) -> dict[Id, SavedMap]:
        """{record id: (map, region)} of the result file, without the maps that are only in part files yet."""
        try:
            return read_maps(self.maps) if self.maps.exists() else {}
        except ValueError as error:  # the answers must not be lost for this: maps can be made again
            print(f"{error}: the maps are ignored", file=sys.stderr)
            return {}

    def provenance(self) -> dict[str, Any]:
        """What `NAME.meta.json` holds; empty if there is none, a ValueError naming it if it is broken."""
        return read_meta(self.meta)

    # -- writing
    def append(self, record: dict, saved_map: SavedMap | None = None) -> None:
        """Add a finished record to this process's own part file; it survives a kill once this returns.

        Args:
            saved_map: the importance map to keep with it (see map_files).
        """
        lines = [{"map_of": record["id"], **packed(*saved_map)}] if saved_map else []
        self._write(*lines, record)  # the record comes last: once it is there, the map is there, too
        self._own[record["id"]] = record

    def note(self, **run: Any) -> None:
        """Remember for `NAME.meta.json` how this process runs (device, seconds, ...); later calls add to it."""
        self._run |= run
        if self.parts.ever_begun:
            self._write({"run": run})

    def _write(self, *lines: dict) -> None:
        if not self.parts.begun:
            # A new part: the first one, or another run has finished everything meanwhile and deleted the old one.
            self.done()  # refuses records with other settings that were written since this run began
            lines = ({"settings": self.settings}, {"run": self._run}, *self._own.values(), *lines)
            self.parts.begin()
        self.parts.append(lines)

    def merge(self, wanted: Sequence[dict], records: Sequence[dict]) -> tuple[int, dict[Id, str]]:
        """Write the result file in dataset order if every wanted record is finished.

        Args:
            wanted: the records that this run is about; records: all of the dataset, finished or not.
        Returns:
            (number of wanted records that are not finished yet, {id: error} of the wanted ones that failed)
        """
        self.parts.sync()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(self.path.with_name(f".{self.path.stem}.lock")):
            finished = merge_records(self._own, self.done())
            missing = sum(record["id"] not in finished for record in wanted)
            if finished and not missing and (not self.of_unknown_settings() or self.parts.lines()):
                self._write_result(finished, records)  # a file of unknown settings must not get those of this run
        errors = {record["id"]: finished[record["id"]].get("error") for record in wanted if record["id"] in finished}
        return missing, {key: error for key, error in errors.items() if error is not None}

    def _write_result(self, finished: dict[Id, dict], records: Sequence[dict]) -> None:
        runs = self.provenance().get("runs", {}) if self.path.exists() else {}
        maps = self.saved_maps() if self.path.exists() else {}  # without a result file the maps are old
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
            self.maps.unlink(missing_ok=True)  # of a result that no longer exists
        # Meta first: to a result without it, records with any settings could be added.
        scoring = {} if self.scoring is None else {"scoring": self.scoring}
        write_atomically(self.meta, {"settings": self.settings, **scoring, "counts": counts, **totals, "runs": runs})
        write_atomically(self.path, [finished[key] for key in ids])
        if len(ids) == len(records):  # else other processes may still add records
            self.parts.remove()


def refuse_other_settings(path: Path, made: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """ValueError, naming the file and each difference, if the settings `made` of its records are not those of `now`.

    If `made` is None (the file of another program, or one without its .meta.json), nothing is refused.
    """
    if made is None:
        return
    names = list(dict.fromkeys([*now, *made]))
    changed = [f"{name} was {made.get(name)!r} and is now {now.get(name)!r}" for name in names
               if made.get(name) != now.get(name)]  # fmt: skip
    if changed:
        what = "; ".join(changed)
        raise ValueError(f"{path} was made with other settings ({what}): use --overwrite or another folder")


def with_outputs(record: dict, fields: Mapping[str, Any]) -> dict:
    """A finished record: the dataset's fields and those of this run, but no outputs of an earlier run."""
    return {name: value for name, value in record.items() if name not in OUTPUT_FIELDS} | dict(fields)


def merge_records(*parts: Mapping[Id, dict]) -> dict[Id, dict]:
    """One {id: record} of several; a later record replaces an earlier one, but an error never replaces an answer."""
    found: dict[Id, dict] = {}
    for part in parts:
        kept = {key for key in part.keys() & found.keys() if "error" in part[key] and "error" not in found[key]}
        found |= {key: record for key, record in part.items() if key not in kept}
    return found
