"""Seconds and forward passes of a question, by method."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

from vicrop.adapter import decoder_of
from vicrop.attention import counted
from vicrop.checkpoints import default_device
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import NO_CROP, TaskModel, images_of, measured
from vicrop.findings.table import Table, estimate


def times_of(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"seconds", "forwards"} of a record, each {way: value}; the ways are "no crop" and each method."""
    seconds, forwards = {}, {}
    for way in (NO_CROP, *task_model.methods):
        methods = {name: method for name, method in task_model.methods.items() if name == way}
        began = time.perf_counter()
        with counted(decoder_of(task_model.model)) as passes:
            batch = task_model.ask(record)
            originals = batch.original_answers(methods)
            for method in methods.values():
                batch.results(method, originals)
        seconds[way], forwards[way] = time.perf_counter() - began, len(passes)
    return {"seconds": seconds, "forwards": forwards}


def where_it_runs(run: RunSettings) -> str:
    """The device that times are of: the GPU's name, or the CPU's kind and threads."""
    device = torch.device(run.model.device or default_device())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{torch.get_num_threads()} threads of {platform.machine()}" if device.type == "cpu" else name


def overhead(run: RunSettings, out: Path) -> Table:
    """Seconds and forward passes of the language model for a question, without crop and by each method.

    The time runs from opening the image's file to the text of the last answer; one question at a time.
    """
    where = where_it_runs(run)
    records = measured(run, out, "overhead", times_of, warm_up=True, where=where)
    rows = {}
    for way in records[0]["seconds"]:
        seconds, passes = ([record[name][way] for record in records] for name in ("seconds", "forwards"))
        more = [record["seconds"][way] / record["seconds"][NO_CROP] for record in records]
        series = {"seconds": seconds, "times no crop": more, "forward passes": passes}
        rows[way] = {name: estimate(values, images_of(records)) for name, values in series.items()}
    title, note = "time of a question, both answers included", f"one question at a time on {where}"
    return Table(title, "method", "seconds", rows, [note, *records.notes], ("seconds",), digits=3)
