"""Options that several commands have: which model looks, and how the crop is chosen.

torch is imported only where a command line has been read: --help does not wait for it.
"""

import argparse
from collections.abc import Sequence

from vicrop.choices import MethodChoice, ModelChoice, Regions
from vicrop.images import MOST_PIXELS, refuse_bad_limit
from vicrop.tables import (
    CROPPERS,
    DTYPES,
    GENERATION,
    MAX_NEW_TOKENS,
    METHODS,
    MODELS,
    OPTIONS,
    PER_SAMPLE,
    REGION_SHARE,
    VIEWS,
    known,
)


# ------------------------------------------------------------------------------------------------- values of options
def method_list(text: str) -> tuple[str, ...]:
    """The methods of a comma-separated list, each once; a ValueError names one that there is not."""
    return tuple(dict.fromkeys(known(name.strip(), METHODS, "method") for name in text.split(",")))


def layer_option(text: str) -> int | str:
    """A layer's number from 0, or "mean"."""
    if text != "mean" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is neither a layer number (from 0) nor "mean"')
    return text if text == "mean" else int(text)


def bound_option(text: str) -> float:
    """A probability below which something is done: any number from 0, 1 or more meaning always."""
    try:
        bound = float(text)
    except ValueError:
        bound = -1.0
    if not 0 <= bound < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 (never) to 1 (always)")
    return bound


def device_option(text: str) -> str:
    """The name of a torch device that can be used here."""
    import torch

    if text == "meta":
        raise argparse.ArgumentTypeError("'meta' is no device that computes anything")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


# -------------------------------------------------------------------------------------------------------- the parser
def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model looks, where and how; `model_choice` reads them."""
    add = parser.add_argument
    add("--model", default="llava_tiny", help="a hub id, a folder, or one of " + ", ".join(MODELS))
    add("--model_id", help="another checkpoint of the same family, hub id or folder; default: that of --model")
    add("--prompt", help='the instruction, or the whole template, as in "{question} Answer with one word."; '
        "default: that of the model's family")  # fmt: skip
    add("--max_new_tokens", type=int, help=f"an answer has at most so many tokens; default: {MAX_NEW_TOKENS}")
    add("--generation", choices=GENERATION, default="greedy", help="greedy: the likeliest token, always; checkpoint: "
        "greedy by the rules of the checkpoint's generation config (repetition penalty, ...)")  # fmt: skip
    add("--revision", help="branch, tag or commit of a checkpoint on the hub; default: its main branch")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on CUDA, float32 elsewhere")
    add("--device", type=device_option, help="torch device; default: the GPU of this process, else the CPU")
    add("--device_map", choices=("auto",), help="auto: spread a large model over all GPUs; default: one device")
    for name, argument in OPTIONS.items():
        add(f"--{name}", **argument)


def add_method_options(parser: argparse.ArgumentParser, method: str = "rel_att") -> None:
    """The options that say how the crop is chosen; `method` is what --method is by default."""
    add = parser.add_argument
    add("--method", default=method, help=f"one or several, comma-separated: {', '.join(METHODS)}")
    add("--layer", type=layer_option, help='layer to read, zero-based, or "mean"; default: that of the model')
    add("--loc_heads", help='loc_att: heads to read, as in "L14H24,L14H13", a file of localization.pipeline '
        f"stage=batch_analyze, or {PER_SAMPLE}; default: those known of the model, if any")  # fmt: skip
    add("--crop_below", type=bound_option, metavar="P", help="crop only where the model gives its first answer a "
        "probability below P: 0 is never, 1 always; default: always")  # fmt: skip
    add("--views", type=int, default=VIEWS, help="views of an image that a _zoom method may take")
    add("--regions", type=int, metavar="K", help="up to so many crops of an image, all in one prompt: one for each "
        "place that stands out; default: 1")  # fmt: skip
    add("--region_share", type=float, metavar="S", help="--regions: a further region counts where its window holds at "
        f"least this share of what the first one's holds; default: {REGION_SHARE}")  # fmt: skip
    for name, what in (("clip", "CLIP"), ("detector", "object detector"), ("sam", "Segment Anything")):
        add(f"--{name}", help=f"{what} of {', '.join(methods_with(name))}: hub id or folder; default: "
            f"{CROPPERS[name]}")  # fmt: skip
    add("--max_image_pixels", type=int, help="open images of up to so many pixels; default: 89478485, at most "
        f"{MOST_PIXELS}")  # fmt: skip


def methods_with(cropper: str) -> list[str]:
    """The methods that ask one of tables.CROPPERS."""
    return [name for name, method in METHODS.items() if cropper in method.get("models", ())]


# ------------------------------------------------------------------------------------- from what was typed to choices
def model_choice(given: argparse.Namespace) -> ModelChoice:
    """The ModelChoice of what was typed; options of the adapter that were not are its defaults.

    Raises:
        ValueError: naming an option that the model's adapter does not have.
    """
    from vicrop.adapter import refuse_bad_prompt
    from vicrop.crop import adapter_of

    own = adapter_of(given.model, given.model_id, given.revision).options
    for name in OPTIONS:
        if getattr(given, name) is not None and name not in own:
            named = ", ".join(f"--{option}" for option in OPTIONS if option in own)
            raise ValueError(f"--{name} has no meaning for {given.model}, which has {named}")
    typed = {name: getattr(given, name) for name in OPTIONS if name in own}
    options = {name: own[name] if value is None else value for name, value in typed.items()}
    if given.prompt is not None:
        refuse_bad_prompt(given.prompt)
        options["prompt"] = given.prompt
    if given.generation != "greedy":
        options["generation"] = given.generation
    most = MAX_NEW_TOKENS if given.max_new_tokens is None else given.max_new_tokens
    if most < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {most}")
    return ModelChoice(
        given.model, given.model_id, given.revision, given.dtype, given.device, given.device_map, options, most
    )


def method_choice(given: argparse.Namespace) -> MethodChoice:
    """The MethodChoice of what was typed.

    Raises:
        ValueError, OSError: an unknown method; heads for methods that read none; no such file of heads, or it has none;
            a number of regions that cannot be; what only several regions, or other methods, need.
    """
    from vicrop.crop import method_of, model_module
    from vicrop.known_heads import heads_of

    names, module = method_list(given.method), model_module(given.model, given.model_id, given.revision)
    refuse_bad_limit(given.max_image_pixels)
    if given.loc_heads and not any("heads" in method_of(module, name).reads for name in names):
        raise ValueError(f"--loc_heads {given.loc_heads}: {', '.join(names)} reads no heads, loc_att does")
    if given.views < 1:
        raise ValueError(f"--views {given.views} is not at least 1")
    heads = heads_of(given.model, given.model_id, given.loc_heads)
    heads = None if heads is None else tuple(heads)
    regions, croppers = regions_of(given), CROPPERS | croppers_of(given, names)
    reading = given.layer, heads, given.max_image_pixels, given.crop_below, given.views, regions, croppers
    return MethodChoice(names, *reading)


def regions_of(given: argparse.Namespace) -> Regions:
    """The Regions of what was typed; a ValueError if a share was, and no number of regions."""
    if given.region_share is not None and given.regions is None:
        raise ValueError(f"--region_share {given.region_share:g} is about further regions, and needs --regions")
    share = REGION_SHARE if given.region_share is None else given.region_share
    return Regions(1 if given.regions is None else given.regions, share)


def croppers_of(given: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """The external croppers that were typed; a ValueError names one that none of the methods asks."""
    typed = {name: getattr(given, name) for name in CROPPERS if getattr(given, name) is not None}
    for cropper, source in typed.items():
        if not set(methods_with(cropper)) & set(names):
            raise ValueError(f"--{cropper} {source}: {', '.join(names)} asks no such model; those "
                             f"that do are {', '.join(methods_with(cropper))}")  # fmt: skip
    return typed
