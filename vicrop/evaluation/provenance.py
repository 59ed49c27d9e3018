"""How results were made: settings that must be equal for all records of a file, and facts that are only noted."""

import hashlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from vicrop.checkpoints import default_device, default_dtype, local_or_hub, model_module, outside_weights, weights_of
from vicrop.choices import ModelChoice
from vicrop.crop import method_of
from vicrop.evaluation.settings import RunSettings
from vicrop.files import clone_commit, in_repository, place_name
from vicrop.heads import head_name
from vicrop.loaded import torch_dtype
from vicrop.tables import GENERAL_PROMPT, MAX_NEW_TOKENS, METHODS, MODELS, PER_SAMPLE
from vicrop.version import __version__

DECODING = "greedy, {} tokens"  # a setting of a result
LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "pillow")


def length_of_answers(decoding: str | None) -> int:
    """How many tokens an answer had at most, by the setting "decoding" of a result; the usual number without one."""
    before, _, after = DECODING.partition("{}")
    return int(decoding.removeprefix(before).removesuffix(after)) if decoding else MAX_NEW_TOKENS


def common_settings(run: RunSettings, device: torch.device | None = None) -> dict[str, Any]:
    """The settings, without the method's, that all records of a file must share; batch size and versions may differ.

    Args:
        device: of this process; used if the run names none.
    """
    choice, data = run.model, in_repository(run.question_path)
    dtype = torch_dtype(choice.dtype) or default_dtype(choice.device or device or default_device())
    return {
        "model": model_name(choice.name), "model_id": checkpoint_name(choice),
        "weights": weights_of(*choice.checkpoint),
        "task": run.task, "dtype": str(dtype).removeprefix("torch."),
        **choice.options, **prompt_settings(choice), "general_prompt": GENERAL_PROMPT,
        "decoding": DECODING.format(choice.max_new_tokens), **({"ocr_tokens": True} if run.ocr_tokens else {}),
        "image_path": place_name(in_repository(run.image_path)),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else str(run.question_path),
    }  # fmt: skip


def prompt_settings(choice: ModelChoice) -> dict[str, Any]:
    """The template of a question, and whether it was given."""
    given = choice.options.get("prompt")
    return {"prompt": given, "prompt_is_given": True} if given else {"prompt": model_module(*choice.checkpoint).PROMPT}


def model_name(name: str) -> str:
    """A name of tables.MODELS or a hub id as it is; a folder by its `place_name`, however it was typed."""
    return name if name in MODELS or not Path(local_or_hub(name)).is_dir() else place_name(local_or_hub(name))


def checkpoint_name(choice: ModelChoice) -> str:
    """The hub id of a checkpoint, or the `place_name` of its folder, which does not depend on how it was typed."""
    return source_name(choice.name, choice.model_id)


def source_name(name: str, model_id: str | None = None) -> str:
    """`checkpoint_name` of what checkpoints.local_or_hub takes."""
    source = local_or_hub(name, model_id)
    return place_name(source) if Path(source).is_dir() else str(source)


def method_settings(run: RunSettings, method: str) -> dict[str, Any]:
    """The settings of one of a run's methods: its layer, heads and models, if any; gate and regions, where given."""
    reads, regions = method_of(model_module(*run.model.checkpoint), method).reads, run.how.regions
    heads = run.how.heads and ",".join(map(head_name, run.how.heads))
    chosen = {"layer": run.how.layer} if "layers" in reads else {}
    chosen |= {"loc_heads": heads or PER_SAMPLE} if "heads" in reads else {}
    chosen |= {} if run.how.crop_below is None else {"crop_below": run.how.crop_below}
    chosen |= {"views": run.how.views} if METHODS[method].get("zoom") else {}
    if regions.most > 1:
        chosen |= {"regions": regions.most} | ({"region_share": regions.share} if "map" in METHODS[method] else {})
    for name in METHODS[method].get("models", ()):
        source = run.how.croppers[name]
        chosen |= {name: source_name(source), f"{name}_weights": outside_weights(source)}
    return {"method": method} | chosen


def run_id(run: RunSettings) -> str:
    """A name of this command that stays the same when it is restarted: its job, and a hash of its settings."""
    if "SLURM_JOB_ID" in os.environ:
        of = f"slurm {os.environ['SLURM_JOB_ID']}"
    else:  # the launcher is the parent, and keeps its number while it restarts its processes
        of = f"{socket.gethostname()} {os.getppid()}"
    return f"{of} {hashlib.sha256(repr(run).encode()).hexdigest()[:12]}"


def is_restart() -> bool:
    """Has a launcher or a scheduler restarted this process?"""
    return any(os.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def whereabouts(model: PreTrainedModel, batch_size: int, methods: Sequence[str]) -> dict[str, Any]:
    """Where and how this process runs, for NAME.meta.json."""
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S%z"), "device": str(model.device), "batch_size": batch_size,
        "processes": PartialState().num_processes, "commit": getattr(model.config, "_commit_hash", None),
        "toolkit": {"version": __version__, "commit": clone_commit()},
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES},
        "seed": "none: decoding is greedy, and random_crop draws from the id of a record", "methods": list(methods),
    }  # fmt: skip
