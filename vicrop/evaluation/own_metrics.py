"""A metric of one's own: a function in a Python file, named as FILE.py:function. Needs no torch.

    def close_enough(answer, labels):        # the model's answer, and the accepted ones
        return answer.lower() in labels      # 0 (wrong) to 1 (right); True and False will do

In memory its file's path is absolute. A result keeps it in its .meta.json, as seen from the result's folder, with a
hash of the file: so the score table finds it again, also where a project has been moved.
"""

import hashlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Metric = Callable[[str, list[str]], float]
NAMED = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


def is_own(name: str) -> bool:
    """Is a metric named as FILE.py:function?"""
    return NAMED.fullmatch(name) is not None


def parts_of(name: str) -> tuple[Path, str]:
    """(file, function) of FILE.py:function."""
    found = NAMED.fullmatch(name)
    assert found is not None, f"{name} is no FILE.py:function"
    return Path(found["file"]), found["function"]


def seen_from(name: str, folder: str | Path) -> str:
    """The name FILE.py:function, whose file is given as seen from a folder, with the file's absolute path."""
    file, function = parts_of(name)
    return f"{os.path.normpath(Path(folder).resolve() / file)}:{function}"


@cache
def own_metric(name: str) -> Metric:
    """The function behind FILE.py:function.

    Raises:
        ValueError: naming the file: it is gone or cannot be run, or has no such function of two arguments.
    """
    file, function = parts_of(name)
    found = getattr(module_of(file), function, None)
    if not inspect.isroutine(found):
        raise ValueError(f"{file} has no function {function!r}")
    try:
        inspect.signature(found).bind("an answer", ["a label"])
    except TypeError as error:
        raise ValueError(f"{function} of {file} is called as {function}(answer, labels): {error}") from None
    return found


@cache
def module_of(file: Path) -> ModuleType:
    """What a Python file defines; a ValueError that names it if it is gone or cannot be run."""
    if not file.is_file():
        raise ValueError(f"no file {file}, which is named as the file of a metric")
    spec = importlib.util.spec_from_file_location(f"own_metrics_{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file may raise
        raise ValueError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    return module


def own_score(name: str, answer: str, labels: list[str]) -> float:
    """0 to 100: what the metric FILE.py:function says of an answer.

    Raises:
        ValueError: naming the function: it fails, or what it returns is no number from 0 to 1.
    """
    metric, shown = own_metric(name), f"{parts_of(name)[1]}({answer!r}, {labels!r})"
    try:
        said: Any = metric(answer, list(labels))
    except Exception as error:
        raise ValueError(f"{shown} fails: {type(error).__name__}: {error}") from error
    value = float(said) if isinstance(said, Real | np.bool_) else float("nan")
    if not 0 <= value <= 1:
        raise ValueError(f"{shown} must return a number from 0 to 1, not {said!r}")
    return 100.0 * value


# ------------------------------------------------------------------------------------------------------ in .meta.json
def kept(metrics: Mapping[str, str], folder: str | Path) -> dict[str, Any]:
    """{"metrics", "sha256"} of {metric: grader}, for the .meta.json of a result in a folder."""
    folder, names, hashes = Path(folder).resolve(), {}, {}
    for metric, name in metrics.items():
        names[metric] = name
        if is_own(name):
            file, function = parts_of(name)
            place = os.path.relpath(file, folder)
            names[metric], hashes[place] = f"{place}:{function}", sha256_of(file)
    return {"metrics": names, "sha256": hashes}


def found_again(scoring: Mapping[str, Any], folder: str | Path) -> dict[str, str]:
    """{metric: grader} of what `kept` has made."""
    return {metric: seen_from(name, folder) if is_own(name) else name for metric, name in scoring["metrics"].items()}


def changed_since(scoring: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """The files of metrics that are not what they were when the result was made."""
    files = {Path(os.path.normpath(Path(folder).resolve() / place)): was
             for place, was in scoring.get("sha256", {}).items()}  # fmt: skip
    return [file for file, was in files.items() if file.is_file() and sha256_of(file) != was]


def sha256_of(file: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
