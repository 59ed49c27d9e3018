"""Checkpoints: where they are, and models out of them. What is not whole, or not what it is called, is refused.

transformers fills in what a checkpoint lacks: random weights, the configuration of another model, no chat template.
Answers would then come from something that nobody has trained, and nothing would say so. So everything that loads a
model comes through `load_model`, and every refusal is one sentence that names the file.
"""

import hashlib
import importlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from vicrop.adapter import DEFAULT_MODULE, REGISTRY, module_for
from vicrop.downloads import say_download, show_hub_bars
from vicrop.files import PACKAGE, ROOT
from vicrop.refusals import REFUSED
from vicrop.tables import MODELS, checkpoint_of, unknown

ENDS = 1 << 20  # bytes of a checkpoint file's begin and end that tell it from another
# Files of a checkpoint's folder on which answers depend: weights, and the settings of model, processor and tokenizer.
CHECKPOINT = ("*.safetensors", "*.bin", "*config.json", "*tokens*.json", "tokenizer*", "vocab*", "merges*", "chat_*")
# transformers takes the first of these that is there; an index names the files that hold the weights.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("generation_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
            "chat_templates/*.jinja", "tokenizer_config.json", "qformer_tokenizer/tokenizer_config.json")  # fmt: skip
# Read only where newer files do not say the same: they are looked at once something has failed.
OLDER_SETTINGS = ("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json")
# Options of cached_file: a file that the hub has not, or that cannot be asked for, is None.
QUIET = [f"_raise_exceptions_for_{what}" for what in ("missing_entries", "gated_repo", "connection_errors")]
FLAT = ("qwen2_5_vl", "qwen2_vl")  # their official configs have the fields of text_config at the top
BOM = "\N{BYTE ORDER MARK}"  # transformers does not read JSON that begins with it
LFS_POINTER = b"version https://git-lfs"
ADAPTER = "{} is an adapter (adapter_config.json), not a whole checkpoint: merge it into its base model first"
AGAIN = "copy or download it again"
NAMED = 3  # weights that a sentence names


# ------------------------------------------------------------------------------------------------------ where and what
def local_or_hub(name: str, model_id: str | Path | None = None) -> str | Path:
    """Where a checkpoint is: a folder (also one given relative to the repository), or a hub id."""
    source = model_id or checkpoint_of(name)
    return next(filter(Path.is_dir, (ROOT / source, PACKAGE.parent / source)), source)


def quiet_libraries() -> None:
    """Have transformers say nothing but what is wrong: a command has its own words and bars. Downloads keep theirs."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # and with it those of the hub
    show_hub_bars()


def default_device() -> torch.device:
    """The first GPU (CUDA, or MPS on a Mac) if there is one, else the CPU."""
    return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def model_module(
    name: str, model_id: str | Path | None = None, revision: str | None = None, cache_dir: str | Path | None = None
) -> ModuleType:
    """The module that knows a model: of a name of info.MODELS, or of a hub id or folder by its config.json.

    Args:
        model_id: another checkpoint of the same family; then the revision is that one's, and not the model's.
        revision, cache_dir: as in `load_model`.
    Raises:
        ValueError, OSError: there is no such model; it is no image-text model of transformers.
    """
    if name in MODELS:
        return importlib.import_module(MODELS[name]["module"])
    source = local_or_hub(name)
    if not Path(source).exists() and not re.search(r"[/\\]", name):
        raise ValueError(f"{unknown(name, MODELS, 'model')}, or give a hub id or a folder")
    own = revision if local_or_hub(name, model_id) == source else None
    config_file = config_file_of(source, name, own, cache_dir)
    return importlib.import_module(module_of(read_object(config_file, f"{name}/config.json"), name))


def kind_of(config: dict[str, Any], shown: str) -> str:
    """The model_type of a config (an object)."""
    kind = config.get("model_type")
    if not kind or not isinstance(kind, str):
        raise ValueError(f"{shown}/config.json names no model_type: it is no checkpoint as transformers saves it")
    return kind


def known_module(config: dict[str, Any], shown: str) -> str | None:
    """The module that knows models of a config (an object); None where none does."""
    vision = config.get("vision_config")
    return module_for(kind_of(config, shown), vision.get("model_type") if isinstance(vision, dict) else None)


def module_of(config: dict[str, Any], shown: str) -> str:
    """The name of the module for models of a config; the default one where no test covers them."""
    module, kind = known_module(config, shown), kind_of(config, shown)
    refuse_by_reason(kind, shown, module)
    if module or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return module or DEFAULT_MODULE
    raise ValueError(f"{shown} is a {kind} checkpoint, and that is no image-text model of transformers; known are "
                     f"{', '.join(REGISTRY)}, and others of AutoModelForImageTextToText")  # fmt: skip


def refuse_by_reason(kind: str, shown: str, module: str | None) -> None:
    """ValueError for an architecture that cannot be carried, with the reason; not where a module knows it."""
    if module is None and kind in REFUSED:
        raise ValueError(f"{shown} is a {kind} checkpoint, and that architecture is not carried: {REFUSED[kind]}")


def weights_of(
    name: str, model_id: str | Path | None = None, revision: str | None = None, cache_dir: str | Path | None = None
) -> str | None:
    """What tells a checkpoint from others (see `identity_of`).

    Raises:
        ValueError, OSError: the checkpoint is not whole, or of another family (see `load_model`).
    """
    return identity_of(*checked_source(name, model_id, revision, cache_dir))


def outside_weights(name: str) -> str | None:
    """`identity_of` a checkpoint of any kind, hub id or folder; None where there is none: loading it says why."""
    source = local_or_hub(name, name)
    try:
        return identity_of(source, config_file_of(source, name, None, None))
    except (ValueError, OSError):
        return None


def identity_of(source: str | Path, config_file: Path) -> str | None:
    """The commit of a checkpoint of the hub, by its config.json; of a folder a hash of its files' names and ends."""
    if not Path(source).is_dir():
        return extract_commit_hash(str(config_file), None)
    digest = hashlib.sha256()
    for path in sorted({path for name in CHECKPOINT for path in Path(source).glob(name) if path.is_file()}):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(ENDS))
            file.seek(-min(ENDS, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def load_model(name: str, model_id: str | Path | None = None, device: torch.device | str | None = None,
               dtype: torch.dtype | None = None, device_map: Any = None, revision: str | None = None,
               cache_dir: str | Path | None = None) -> tuple[PreTrainedModel, Any]:  # fmt: skip
    """(model, processor) of a name of info.MODELS, a hub id or a folder; one that comes quantised loads as it is.

    Args:
        model_id: another checkpoint of the same family, hub id or folder.
        device: torch device; see `default_device`.
        dtype: torch dtype; see `default_dtype`.
        device_map: as transformers takes it, "auto" to spread the layers over all GPUs; in place of `device`.
        revision: branch, tag or commit of a checkpoint on the hub.
        cache_dir: where downloads are kept; default: the hub's own folder.
    Raises:
        ValueError, OSError: one sentence. There is no such checkpoint, or it is of another family; a file is missing,
            cut short or a Git LFS pointer; weights are missing or of another size; it needs code of its own, or a
            package that is not installed.
    """
    module = model_module(name, model_id, revision, cache_dir)
    device = torch.device(device or default_device())
    source, _ = checked_source(name, model_id, revision, cache_dir)
    where = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": False}
    shown = shown_name(name, model_id)
    if not Path(source).is_dir():
        say_download(str(source), WEIGHTS, revision, cache_dir)
    with in_a_sentence(shown, source):
        processor = module.load_processor(source, **where)
        # Sizes that differ are passed over only to be refused by name: the error of transformers does not name them.
        model, report = module.MODEL_CLASS.from_pretrained(
            source, dtype=dtype or default_dtype(device), device_map=device_map or {"": device},
            output_loading_info=True, ignore_mismatched_sizes=True, **where,
        )  # fmt: skip
    refuse_other_weights(shown, model, report)
    packed = getattr(model.config, "quantization_config", None)
    if packed and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"{shown} is quantised in a way that transformers does not know: {packed}")
    with in_a_sentence(shown, source):
        module.prepare(model.eval(), processor)
    return model, processor


@contextmanager
def in_a_sentence(shown: str, source: str | Path) -> Iterator[None]:
    """A broken file may raise anything: here it becomes a ValueError of one sentence. A full memory stays as it is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(broken_setting(Path(source), shown) or f"{shown} cannot be used: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of an error, and the next one if it ends in a colon; with its kind where that says more."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, and code from a checkpoint is never run"
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = f"{first} {others[0]}" if first.endswith(":") and others else first
    line = line.partition(". If you were trying to load it")[0]  # advice that is not about a folder
    return line if line and isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {line}"


def broken_setting(folder: Path, shown: str) -> str | None:
    """The sentence about a broken one of OLDER_SETTINGS in a folder, or None."""
    try:
        for path in files_of(folder, *OLDER_SETTINGS):
            refuse_unless_whole(path, f"{shown}/{path.relative_to(folder)}")
    except ValueError as error:
        return str(error)
    return None


# -------------------------------------------------------------------------------------- before anything is loaded
def shown_name(name: str, model_id: str | Path | None) -> str:
    """A checkpoint as it was called by whoever asked for it."""
    return str(model_id or checkpoint_of(name))


def checked_source(
    name: str, model_id: str | Path | None = None, revision: str | None = None, cache_dir: str | Path | None = None
) -> tuple[str | Path, Path]:
    """(folder or hub id, path of its config.json) of a checkpoint that is of the family and has all its files.

    Raises:
        ValueError, OSError: it is not (see `load_model`).
    """
    source, shown = local_or_hub(name, model_id), shown_name(name, model_id)
    config_file = config_file_of(source, shown, revision, cache_dir)
    config = read_object(config_file, f"{shown}/config.json")
    module = model_module(name, model_id, revision, cache_dir)
    refuse_another_family(config, shown, module)
    refuse_missing_parts(config, shown, module)
    folder = Path(source)
    if folder.is_dir():
        settings = files_of(folder, *SETTINGS)
        for path in (*settings, *tokenizer_files(folder, shown), *weight_files(folder, shown, config)):
            refuse_unless_whole(path, f"{shown}/{path.relative_to(folder)}")
        for path in settings:
            refuse_own_code(path, f"{shown}/{path.relative_to(folder)}")
    return source, config_file


def config_file_of(source: str | Path, shown: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """The path of a checkpoint's config.json, which is downloaded if need be.

    Without one transformers would build the family's default, seven billion random weights.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(ADAPTER.format(shown))
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{shown} has no config.json: it is no folder of a checkpoint")
        return folder / "config.json"
    if folder.is_file() or (ROOT / folder).is_file():
        raise ValueError(f"{shown} is a file: a checkpoint is a folder with config.json, or a hub id")
    if folder.is_absolute() or shown.startswith((".", "~")):
        raise FileNotFoundError(f"there is no folder {shown}")
    return hub_config_file(shown, revision=revision, cache_dir=cache_dir)


def hub_config_file(hub_id: str, **where: Any) -> Path:
    """The path of the config.json of a hub id, in the cache."""
    try:
        validate_repo_id(hub_id)
        config_file, failed = cached_file(hub_id, "config.json", **where), None
    except (OSError, ValueError) as error:
        config_file, failed = None, error
    reached = failed is None or (failed.__cause__ is None and isinstance(failed, OSError))  # only the file is missing
    if reached and cached_file(hub_id, "adapter_config.json", **where, **dict.fromkeys(QUIET, False)):
        raise ValueError(ADAPTER.format(hub_id))
    if config_file is None:
        why = reason(failed) if failed else "it has no config.json"
        raise OSError(f"{hub_id} is no folder here, and not to be had from the hub: {why}") from failed
    return Path(config_file)


def refuse_another_family(config: dict[str, Any], shown: str, module: ModuleType) -> None:
    """ValueError if a config (an object) is not one of the module's family."""
    kind = kind_of(config, shown)
    if module.__name__ in (DEFAULT_MODULE, known_module(config, shown)):
        return
    named = {row["module"]: name for name, row in reversed(MODELS.items())}  # the first name of each family
    families = {own: named[place] for own, place in REGISTRY.items() if place in named}  # model_type -> name
    if kind in families:
        name = families[kind]
        raise ValueError(f"{shown} is a {kind} checkpoint: use --model {name} (in localization, model.family={name})")
    code = ", with code of its own, which is never run" if "auto_map" in config else ""
    these = ", ".join(f"{own} ({name})" for own, name in families.items())
    reason_why = f"; {kind} is not carried: {REFUSED[kind]}" if kind in REFUSED else ""
    raise ValueError(f"{shown} is a {kind} checkpoint{code}: the toolkit knows {these}{reason_why}")


def refuse_missing_parts(config: dict[str, Any], shown: str, module: ModuleType) -> None:
    """ValueError if a config lacks that of a part of the model: transformers would build the default, of 7B weights."""
    kind: Any = CONFIG_MAPPING[config["model_type"]]
    parts = list(kind.sub_configs)
    needed = {"text_config", "vision_config"}
    if module.__name__ != DEFAULT_MODULE:  # of an unknown one, others may well be left out
        specs = getattr(kind, "sub_configs_defaults", {})
        needed |= {name for name in parts if not getattr(specs.get(name), "optional", False)}
    parts = [name for name in parts if name in needed]
    for name in parts:
        part = config.get(name)
        at_the_top = name == "text_config" and part is None and config["model_type"] in FLAT and "hidden_size" in config
        if not at_the_top and not (part and isinstance(part, dict)):
            given = json.dumps(part) if name in config else "missing"
            raise ValueError(f"{shown}/config.json has no {name}: it must be an object with fields, and is {given}")


def files_of(folder: Path, *names: str) -> list[Path]:
    """The files of a folder that are called so."""
    return [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def refuse_own_code(path: Path, shown: str) -> None:
    """ValueError if settings name a class that only code of the checkpoint has: another one would take its place."""
    settings = read_object(path, shown) if path.suffix == ".json" else {}
    if not settings.get("auto_map"):
        return
    known_ones = dir(transformers)
    for name in (settings.get("tokenizer_class"), settings.get("processor_class")):
        if name and name not in known_ones:
            raise ValueError(f"{shown} needs code of its own ({name}), and code from a checkpoint is never run")


def tokenizer_files(folder: Path, shown: str) -> list[Path]:
    """What the tokenizers of a folder are read from; tokenizer.json stands for all the others."""
    found = []
    for place in filter(Path.is_dir, (folder, folder / "qformer_tokenizer")):
        own = files_of(place, "tokenizer.json") or files_of(place, "vocab.*", "merges.txt", "*.model", "tekken.json")
        if not own:
            where = shown if place == folder else f"{shown}/{place.name}"
            raise FileNotFoundError(f"{where} has no tokenizer: no tokenizer.json, nor an older kind of vocabulary")
        found += own
    return found


def weight_files(folder: Path, shown: str, config: dict[str, Any]) -> list[Path]:
    """The files that transformers takes a folder's weights from, an index among them."""
    first = next((path for path in files_of(folder, str(config.get("transformers_weights")), *WEIGHTS)), None)
    if first is None:
        raise FileNotFoundError(f"{shown} has no weights: no model.safetensors or pytorch_model.bin, nor their index")
    if first.suffix != ".json":
        return [first]
    places = read_object(first, f"{shown}/{first.name}").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{shown}/{first.name} has no weight_map that names the files of its weights: {AGAIN}")
    names = sorted(set(places.values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{shown} lacks {name}, one of {len(names)} files of weights by {first.name}")
    return [folder / name for name in names]


# ---------------------------------------------------------------------------------------------------- is a file whole?
def read_object(path: Path, shown: str) -> dict[str, Any]:
    """The object in a JSON file; a ValueError that names the file if there is none."""
    refuse_placeholder(path, shown)
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{shown} must be UTF-8 text, and is not ({error}): {AGAIN}") from error
    if text.startswith(BOM):
        raise ValueError(f"{shown} must be UTF-8 text without a byte order mark, and begins with one: save it without")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{shown} is no complete JSON file ({error}): {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown} holds {type(found).__name__}, not an object: {AGAIN}")
    return found


def refuse_placeholder(path: Path, shown: str) -> None:
    """ValueError if a file is empty, or a Git LFS pointer in place of the file."""
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{shown} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    if not head.strip():
        raise ValueError(f"{shown} is empty: {AGAIN}")


def refuse_text(path: Path, shown: str) -> None:
    """ValueError if a file is no text."""
    refuse_placeholder(path, shown)
    try:
        path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{shown} is no UTF-8 text ({error}): {AGAIN}") from error


def refuse_safetensors(path: Path, shown: str) -> None:
    """ValueError if a file of weights has not the size that its header says."""
    refuse_placeholder(path, shown)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{shown} is cut short or broken ({error}): {AGAIN}") from error


def refuse_pickle(path: Path, shown: str) -> None:
    """ValueError if a file is neither a whole archive nor an old pickle of torch.save."""
    refuse_placeholder(path, shown)
    with path.open("rb") as file:
        old = file.read(1) == b"\x80"
    if not old and not zipfile.is_zipfile(path):
        raise ValueError(f"{shown} is cut short or broken (no file of torch.save): {AGAIN}")


CHECKS = {".json": read_object, ".jinja": refuse_text, ".txt": refuse_text, ".safetensors": refuse_safetensors,
          ".bin": refuse_pickle}  # fmt: skip


def refuse_unless_whole(path: Path, shown: str) -> None:
    """ValueError that names a file if it is not what its name says."""
    CHECKS.get(path.suffix, refuse_placeholder)(path, shown)


# ------------------------------------------------------------------------------------------------- after it was loaded
def refuse_other_weights(shown: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """ValueError unless a model's weights are all the checkpoint's; a warning where the checkpoint has others, too.

    Args:
        report: what transformers says of loading; weights that are tied to others do not count as missing there.
    """
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    sizes = [f"{name} is {size(own)} in its files and {size(wanted)} by config.json"
             for name, own, wanted in sorted(report["mismatched_keys"])]  # fmt: skip
    if missing:
        prefix = common_prefix(unknown)
        if prefix and prefix.partition(".")[0] not in {name.partition(".")[0] for name in model.state_dict()}:
            raise ValueError(
                f"{shown} lacks {len(missing)} of its model's weights, and the names of {len(unknown)} in its files "
                f"begin with {prefix!r}: save it without that prefix"
            )
        others = f"; it has {len(unknown)} that the model does not have: {some(unknown)}" if unknown else ""
        raise ValueError(f"{shown} lacks {len(missing)} of its model's weights: {some(missing)}{others}")
    if sizes:
        raise ValueError(f"{shown} has weights of another size than its model: {some(sizes, '; ')}")
    if unknown:
        warnings.warn(f"{len(unknown)} of the weights in {shown} are left out, for its model does not have them: "
                      f"{some(unknown)}", stacklevel=3)  # fmt: skip


def common_prefix(names: Sequence[str]) -> str:
    """What all names of weights begin with, up to a dot; empty for a single name."""
    return "".join(os.path.commonprefix(names).rpartition(".")[:2]) if len(names) > 1 else ""


def size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return between.join([*names[:NAMED], *more])
