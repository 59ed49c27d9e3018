"""Importance maps that a run has not kept: the model that made the result makes them again, with its settings."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vicrop.checkpoints import local_or_hub, model_module, weights_of
from vicrop.choices import MethodChoice, ModelChoice
from vicrop.dataset import Id
from vicrop.evaluation.batching import batch_size_of, in_batches, question_batch
from vicrop.evaluation.provenance import length_of_answers
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.sessions import Sessions
from vicrop.failures import recoverable_message
from vicrop.known_heads import heads_of
from vicrop.loaded import LoadedModel, load_chosen
from vicrop.map_files import SavedMap
from vicrop.methods import Method
from vicrop.tables import GENERAL_PROMPT, OPTIONS, VIEWS


def made_again(result: ResultFile, records: Sequence[dict], place: Mapping[str, Any]) -> Iterator[tuple[Id, SavedMap]]:
    """Yield (record id, (map, region)) of some records of a result, with the model and the settings that made it.

    A record whose map cannot be made (because its image is gone, say) is named and left out.

    Args:
        place: {"device", "device_map"}: where the model runs.
    Raises:
        ValueError: nothing tells how the result was made, or this model now works in another way.
    """
    method, loaded = maker_of(result, place)

    sessions = Sessions(loaded, result.images)

    def found_in(batch: Sequence[dict]) -> list[tuple[Id, SavedMap]]:
        try:
            maps = question_batch(batch, *sessions.of(batch)).find(method)
            found = zip(batch, maps, strict=True)
            return [(record["id"], (one.att_map, one.region)) for record, one in found if one.att_map is not None]
        except Exception as error:
            said = recoverable_message(error)
        if len(batch) > 1:  # one by one, so that one bad image does not cost the others their maps
            return [found for record in batch for found in found_in([record])]
        print(f"no map of {batch[0]['id']}: {said}", file=sys.stderr)
        return []

    records = sorted(records, key=lambda record: str(record.get("image_path")))  # those of an image share a session
    with tqdm(total=len(records), desc=f"maps of {result.path.stem}", unit="map") as bar:
        for batch in in_batches(records, lambda _: None, batch_size_of(loaded.model)):
            yield from found_in(batch)
            bar.update(len(batch))


def refuse_unknown_maker(result: ResultFile) -> None:
    """ValueError, naming the file, unless a .meta.json has all that is needed to make maps again."""
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
        ValueError: naming the file: nothing tells how it was made, or its maps would no longer be the same.
    """
    made = result.meta.get("settings")
    if not made:
        raise ValueError(f"{result.path} has no maps, and no .meta.json that tells how to make them: use --maps saved")
    refuse_unknown_maker(result)
    source = made["model"], made["model_id"]
    revision = None if Path(local_or_hub(*source)).is_dir() else made["weights"]
    if weights_of(*source, revision) != made["weights"]:
        raise ValueError(f"{made['model_id']} has other weights than those that made {result.path}: use --maps saved")
    options = {name: made[name] for name in (*OPTIONS, "generation") if name in made}
    if made.get("prompt_is_given"):
        options["prompt"] = made["prompt"]
    where = place["device"], place["device_map"]
    most = length_of_answers(made.get("decoding"))  # the confidence that leads a search is that of whole answers
    choice = ModelChoice(*source, revision, made["dtype"], *where, options, max_new_tokens=most)
    heads = heads_of(*source, made.get("loc_heads"))
    fixed = None if heads is None else tuple(heads)
    how = MethodChoice((result.method,), made.get("layer"), fixed, views=made.get("views", VIEWS))
    loaded = load_chosen(choice, how)
    method, module = loaded.methods[result.method], model_module(*source, revision)
    now = [options.get("prompt") or module.PROMPT, GENERAL_PROMPT, list(method.layers(loaded.model))]
    for run in result.meta.get("runs", {}).values():
        then = [made["prompt"], made["general_prompt"], run["layers"]]
        if now != then:
            raise ValueError(f"{result.path} was made by other prompts or layers ({then}, now {now}): use --maps saved")
    return method, loaded
