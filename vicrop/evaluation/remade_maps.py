"""Importance maps that a run has not kept, made again by the model that made the result, in the way it was made."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vicrop.checkpoints import local_or_hub, model_module, weights_of
from vicrop.choices import MethodChoice, ModelChoice
from vicrop.dataset import check_record
from vicrop.evaluation.batching import batch_size_of, in_batches, question_batch
from vicrop.evaluation.result_files import ResultFile
from vicrop.failures import recoverable_message
from vicrop.known_heads import heads_of
from vicrop.loaded import LoadedModel, load_chosen
from vicrop.methods import Method
from vicrop.tables import GENERAL_PROMPT, OPTIONS


def made_again(
    result: ResultFile, records: Sequence[dict], place: Mapping[str, Any]
) -> Iterator[tuple[Any, np.ndarray, tuple]]:
    """Yields (record id, map, region) of some records of a result, by the model that made it, in the way it was made.

    Args:
        place: {"device", "device_map"}: where the model is to run.

    A record of which that cannot be done (its image is gone, say) is named and left out.

    Raises:
        ValueError: nothing tells how the result was made, or that is no longer what this model does.
    """
    method, loaded = maker_of(result, place)

    @lru_cache(maxsize=1)
    def session_of(paths):
        return loaded.session(paths)

    def found_in(batch):
        try:
            paths = [check_record(record, result.images) for record in batch]
            unique = tuple(dict.fromkeys(paths))
            questions = question_batch(batch, session_of(unique), [unique.index(path) for path in paths])
            maps = questions.find(method)
            return [(record["id"], *found) for record, (_, *found) in zip(batch, maps, strict=True)]
        except Exception as error:
            said = recoverable_message(error)
        if len(batch) > 1:  # one by one, so that one bad image costs the others nothing
            return [found for record in batch for found in found_in([record])]
        print(f"no map of {batch[0]['id']}: {said}", file=sys.stderr)
        return []

    records = sorted(records, key=lambda record: str(record.get("image_path")))  # those of an image share a session
    with tqdm(total=len(records), desc=f"maps of {result.path.stem}", unit="map") as bar:
        for batch in in_batches(records, lambda _: None, batch_size_of(loaded.model)):
            yield from found_in(batch)
            bar.update(len(batch))


def refuse_unknown_maker(result: ResultFile) -> None:
    """ValueError, naming the file, unless a .meta.json has all that it takes to make maps again."""
    made, runs = result.meta["settings"], result.meta.get("runs", {})
    needed = ("model", "model_id", "weights", "dtype", "prompt", "general_prompt")
    missing = [name for name in needed if name not in made]
    missing += ["layers of a run"] if not all("layers" in run for run in runs.values()) else []
    if missing:
        meta = result.path.with_suffix(".meta.json")
        raise ValueError(f"{meta} must tell how to make maps, and has no {', '.join(missing)}: use --maps saved")


def maker_of(result: ResultFile, place: Mapping[str, Any]) -> tuple[Method, LoadedModel]:
    """(method, model) that a result was made with.

    Raises:
        ValueError: naming the file: nothing tells it, or the same would come out no more.
    """
    made = result.meta.get("settings")
    if not made:
        raise ValueError(f"{result.path} has no maps, and no .meta.json that tells how to make them: use --maps saved")
    refuse_unknown_maker(result)
    module, source = model_module(made["model"]), (made["model"], made["model_id"])
    revision = None if Path(local_or_hub(*source)).is_dir() else made["weights"]
    if weights_of(*source, revision) != made["weights"]:
        raise ValueError(f"{made['model_id']} has other weights than those that made {result.path}: use --maps saved")
    options = {name: made[name] for name in OPTIONS if name in made}
    if made.get("prompt_is_given"):
        options["prompt"] = made["prompt"]
    choice = ModelChoice(*source, revision, made["dtype"], place["device"], place["device_map"], options)
    how = MethodChoice((result.method,), made.get("layer"), heads_of(*source, made.get("loc_heads")))
    loaded = load_chosen(choice, how)
    method = loaded.methods[result.method]
    now = [options.get("prompt") or module.PROMPT, GENERAL_PROMPT, list(method.layers(loaded.model))]
    for run in result.meta.get("runs", {}).values():
        then = [made["prompt"], made["general_prompt"], run["layers"]]
        if now != then:
            raise ValueError(f"{result.path} was made by other prompts or layers ({then}, now {now}): use --maps saved")
    return method, loaded
