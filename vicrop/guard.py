"""The guard at a checkpoint's first use: it is compared with the stock model, and what came out is kept by its hash.

Exact, on a small twin of its own config and processor, before its weights are loaded; then coarse, on the loaded model.
Right, or refused: a checkpoint that differs in anything is refused by one sentence, now and the next time.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vicrop import processors
from vicrop.files import read_json, write_atomically
from vicrop.session import UNSEEN_CROP, ImageSession
from vicrop.twin import small_twin
from vicrop.verify import (
    BOUNDS,
    CROP,
    QUESTION,
    UNSEEN_SECOND,
    Report,
    picture,
    stock_inputs,
    stock_pass,
    verify,
    verify_loaded,
)
from vicrop.version import __version__

ADMITTED = "_vicrop_admitted"  # set on a model that may be used though no test covers its family
MADE_BY = f"vicrop {__version__}, transformers {transformers.__version__}"


def cache_folder() -> Path:
    """Where verdicts are kept: VICROP_CACHE, or vicrop/ in the user's folder for caches."""
    own = os.environ.get("VICROP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vicrop"


def verdict_file(weights: str, what: str) -> Path:
    """The file of a verdict on a checkpoint, by what tells its weights from others, libraries, and what is compared."""
    name = hashlib.sha256(f"{weights} {what} {MADE_BY} {', '.join(BOUNDS)}".encode()).hexdigest()
    return cache_folder() / "checked" / f"{name[:32]}.json"


def remembered(weights: str | None, what: str, check: Callable[[], list[str]]) -> list[str]:
    """What differs, by an earlier check of the same weights, or by `check()`, which is then kept."""
    path = verdict_file(weights, what) if weights else None
    if path is not None and path.is_file():
        try:
            return list(read_json(path)["differs"])
        except (ValueError, KeyError, TypeError, OSError):
            pass  # of another version, or broken: checked once more
    differs = check()
    if path is not None:
        try:
            said = {"weights": weights, "what": what, "made_by": MADE_BY, "on": time.strftime("%Y-%m-%d")}
            write_atomically(path, said | {"differs": differs})
        except OSError:
            pass  # a folder that cannot be written to: it is checked each time
    return differs


def refuse(shown: str, differs: list[str]) -> None:
    """ValueError, naming the first thing that differs, if there is one; that a crop goes unseen comes before all."""
    for unseen in (UNSEEN_CROP, UNSEEN_SECOND):
        if any(unseen in sentence for sentence in differs):
            raise ValueError(f"{shown} models cannot be asked about an image and a crop of it: {unseen}")
    if differs:
        more = f", and {len(differs) - 1} more" if len(differs) > 1 else ""
        raise ValueError(f"{shown} models are not known here, and this one gives something else than its stock model "
                         f"({differs[0]}{more}): `vicrop check` tells all")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- exact twin
def verify_twin(config: Any, processor: Any, module: Any, **options: Any) -> Report:
    """The exact Report of a checkpoint's small twin; a wider one is made where the narrow one does not run.

    Args:
        config: the checkpoint's, left as it is.
        module: that knows the family, of which MODEL_CLASS and `prepare` are taken.
        options: those of the adapter.
    """
    try:
        twin = running_twin(config, processor, module, narrow=True, **options)
    except Exception:  # widths that must fit each other may be anywhere in a config
        twin = running_twin(config, processor, module, narrow=False, **options)
    return verify(twin, processor, **options)


def running_twin(config: Any, processor: Any, module: Any, narrow: bool, **options: Any) -> PreTrainedModel:
    """A twin whose own forward has run once, on a picture and a question."""
    twin = small_twin(config, module.MODEL_CLASS, narrow=narrow)
    setattr(twin, ADMITTED, True)
    module.prepare(twin, processor)
    session = ImageSession([picture(CROP)], twin, processor, **options)
    prompt = session.adapter.prompt(QUESTION)
    stock_pass(session, stock_inputs(session, prompt, session.images)[0], graph=False)
    return twin


class Unprepared:
    """What `verify_twin` takes of a module, for a family that has none."""

    MODEL_CLASS, prepare = AutoModelForImageTextToText, staticmethod(processors.prepare_chat)


def admit_source(source: str | Path, processor: Any, weights: str | None, **where: Any) -> None:
    """ValueError unless a checkpoint's twin gives what the stock model gives; nothing is loaded but its config.

    Args:
        source: folder or hub id; where: revision, cache_dir, ... as transformers takes them.
        weights: what tells the checkpoint from others (see checkpoints.weights_of).
    """
    config = AutoConfig.from_pretrained(source, **where)

    def check() -> list[str]:
        try:
            return verify_twin(config, processor, Unprepared).differs
        except Exception as error:  # a model that no one has tried may fail in any way
            return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]

    refuse(config.model_type, remembered(weights, "twin", check))


def admit_model(model: PreTrainedModel, processor: Any, weights: str | None = None) -> None:
    """ValueError unless a loaded model gives, roughly, what the stock model gives in the same dtype.

    Args:
        weights: as in `admit_source`.
    """
    setattr(model, ADMITTED, True)
    what = f"loaded as {model.dtype} on {model.device.type}"
    differs = remembered(weights, what, lambda: verify_loaded(model, processor).differs)
    if differs:
        delattr(model, ADMITTED)
    refuse(model.config.model_type, differs)


def as_json(report: Report) -> dict[str, Any]:
    """A Report for JSON."""
    return asdict(report) | {"differs": report.differs}
