"""What `vicrop check` finds of a model, and how it is said."""

import time
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from vicrop.adapter import DEFAULT_MODULE
from vicrop.checkpoints import checked_source, default_device, in_a_sentence, load_model, model_module, shown_name
from vicrop.choices import ModelChoice
from vicrop.guard import Unprepared, as_json, verify_twin
from vicrop.loaded import torch_dtype
from vicrop.processors import load_any
from vicrop.verify import verify_loaded


def check_model(choice: ModelChoice, twin_only: bool = False) -> dict[str, Any]:
    """What was found of a checkpoint, for JSON: {"model", "twin", "loaded", "differs", "seconds"}.

    Args:
        twin_only: the weights are not loaded, and "loaded" is None.
    Raises:
        ValueError, OSError: there is no such checkpoint, or it is not whole.
    """
    began, shown = time.perf_counter(), shown_name(choice.name, choice.model_id)
    module = model_module(*choice.checkpoint)  # first, as it knows a name that is only misspelt
    (source, _), where = checked_source(*choice.checkpoint), {"revision": choice.revision, "trust_remote_code": False}
    with in_a_sentence(shown, source):
        config = AutoConfig.from_pretrained(source, **where)
        unknown = module.__name__ == DEFAULT_MODULE  # its own functions would already be the guard
        load, known = (load_any, Unprepared) if unknown else (module.load_processor, module)
        twin = as_json(verify_twin(config, load(source, **where), known))
    found = {"model": choice.name, "twin": twin, "loaded": None, "differs": list(twin["differs"])}
    if not twin_only and not twin["differs"]:
        device = choice.device or default_device()
        place = device, torch_dtype(choice.dtype), choice.device_map, choice.revision
        model, processor = load_model(choice.name, choice.model_id, *place)
        found["loaded"] = as_json(verify_loaded(model, processor))
        found["differs"] += found["loaded"]["differs"]
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def lines_of(found: dict[str, Any]) -> Iterator[str]:
    """What was found, line by line."""
    twin = found["twin"]
    yield f"{found['model']}: {twin['family']}"
    for what, report in (("twin", twin), ("loaded", found["loaded"])):
        if report is None:
            continue
        attending = report["attention_layers"]
        some = "all" if len(attending) == report["layers"] else ", ".join(map(str, attending))
        yield (f"{what} ({report['dtype']}): {report['layers']} layers of {report['heads']} heads; "
               f"with attention: {some}")  # fmt: skip
        for each in report["pictures"]:
            width, height = each["size"]
            prefix = "shared" if each["shared"] else "not shared"
            yield (f"  {width} x {height}: {each['tokens']} image tokens, map {each['grid'][0]} x {each['grid'][1]}, "
                   f"region {list(each['region'])}, layout {each['layout']}, prefix {prefix}")  # fmt: skip
            yield "    " + ", ".join(f"{name} {error:.1e}" for name, error in each["errors"].items())
    yield from (f"DIFFERS: {sentence}" for sentence in found["differs"])
    yield f"{'differs' if found['differs'] else 'all holds'}, {found['seconds']} s"
