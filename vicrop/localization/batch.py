"""Many samples: attention, masks and boxes for all lines of a file, and the localization heads found from them."""

import codecs
import json
import logging
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vicrop import heads
from vicrop.dataset import Query, field_of, refuse_bad_ids
from vicrop.evaluation.batching import prefetched
from vicrop.failures import RECOVERABLE, recoverable_message
from vicrop.files import in_repository, read_json, write_atomically
from vicrop.localization import grounding, storage, viz
from vicrop.localization.collector import Collector
from vicrop.localization.config import Config, Data
from vicrop.localization.sample import draw_top, finish, folder_of, made_with, number
from vicrop.localization.sinks import FILE as SINK_FILE
from vicrop.localization.sinks import SinkCounter, hash_of, without_sinks, write_sinks
from vicrop.localization.storage import Stored
from vicrop.plots import save_figure
from vicrop.session import ImageSession

log = logging.getLogger("localization")

Sample = dict[str, str]  # id, prompt, image_path
Failure = tuple[str, str]  # the name of a line or sample, what went wrong


# -------------------------------------------------------------------------------------------------------------- batch
def batch(config: Config) -> None:
    """Write attention, analysis, mask and box of every line of data.data_file.

    Samples that are done are skipped. Attention that is stored already is only analyzed: if only `logic` has changed,
    no model is needed. A line that cannot be read or grounded is named at the end, and does not stop the others.
    """
    collector, folder = Collector(config.model), folder_of(config)
    samples, failed = read_lines(config.data)
    count = len(samples) + len(failed)
    todo = [sample for sample in samples if not is_done(config, collector, stem_in(folder, sample), sample)]
    new = {sample["id"] for sample in todo if not has_attention(collector, stem_in(folder, sample), sample)}
    log.info("%d lines: %d are done, %d need attention", count, len(samples) - len(todo), len(new))
    if new:
        collector.loaded  # noqa: B018 (loads the model here, not in the thread that prepares sessions)
    groups = groupby(sorted(todo, key=image_of), image_of)  # queries about an image share a session
    groups = [(image, list(group)) for image, group in groups]

    def session_of(group: tuple[str, list[Sample]]) -> ImageSession | None:
        return collector.session_of(group[0]) if any(sample["id"] in new for sample in group[1]) else None

    with logging_redirect_tqdm(), tqdm(total=len(todo), unit="query", desc=str(folder)) as bar:
        for (_, group), session in prefetched(session_of, groups):
            failed += batch_of_image(config, collector, folder, group, session)
            bar.update(len(group))
    for what, error in failed:
        log.error("%s: %s", what, error)
    if len(failed) == count:
        sys.exit("localization: no line could be grounded")
    log.info("%d of %d lines are done: %s", count - len(failed), count, folder)


def image_of(sample: Sample) -> str:
    """The path of a sample's image."""
    return sample["image_path"]


def read_lines(data: Data) -> tuple[list[Sample], list[Failure]]:
    """(samples, failures) of the lines of data.data_file that data.start_index and data.end_index choose.

    Image paths are relative to the file's folder, or to the current one.

    Raises:
        ValueError, FileNotFoundError: there is no such file or no such line; an id comes twice.
    """
    if not data.data_file:
        raise ValueError("data.data_file is needed: a file of JSON lines with id, prompt and image_path")
    path = in_repository(data.data_file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {data.data_file}: data.data_file must be a file of JSON lines")
    wanted = slice(data.start_index, data.end_index)
    if not data.process_all and wanted == slice(None):
        raise ValueError("choose the lines: data.process_all=true, or data.start_index and data.end_index (from 0)")
    if data.process_all and wanted != slice(None):
        raise ValueError("data.process_all=true is about all lines: leave it out, or data.start_index and end_index")
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    lines = [each for each in enumerate(lines, 1) if each[1].strip()]
    if lines and not lines[wanted]:
        span = f"{data.start_index or 0} up to {data.end_index or 'the end'}"
        raise ValueError(f"{data.data_file} has {len(lines)} lines, counted from 0, and none from {span}")
    samples, numbers, failed = [], [], []
    for at, line in lines[wanted]:
        name = f"{path}, line {at}"
        try:
            samples.append(sample_of(json.loads(line.decode("utf-8")), name, path.parent))
            numbers.append(at)
        except (ValueError, OSError) as error:  # OSError: image_path cannot be the name of a file
            failed.append((name, str(error).removeprefix(f"{name}: ")))
    refuse_bad_ids(samples, path, numbers=numbers, unit="line")
    return [sample | {"id": str(sample["id"])} for sample in samples], failed


def sample_of(record: Any, name: str, folder: Path) -> dict[str, Any]:
    """A line's id, prompt and image_path, as a path that can be opened; ValueError if one is missing or invalid."""
    if not isinstance(record, dict):
        raise ValueError(f"it must be an object with id, prompt and image_path, not {str(record)[:60]}")
    sample = {field: field_of(record, field, Query, name) for field in ("id", "prompt", "image_path")}
    beside = folder / sample["image_path"]
    return sample | {"image_path": str(beside if beside.is_file() else in_repository(sample["image_path"]))}


def stem_in(folder: Path, sample: Sample) -> Path:
    """The path of a sample's files, without their endings."""
    return folder / storage.safe_id(sample["id"])


def stored(stem: Path, ending: str) -> dict[str, Any]:
    """The object in a sample's JSON file; empty if the file is missing or broken, so that it is made again."""
    try:
        found = read_json(storage.beside(stem, ending))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def has_attention(collector: Collector, stem: Path, sample: Sample) -> bool:
    """Is this sample's attention stored, and was it read with the same settings?"""
    meta = stored(stem, "_meta.json")
    image, made = str(meta.get("image_file")), (meta.get("query"), meta.get("made_with"))
    if storage.attention_file(stem) is None or made != (sample["prompt"], collector.made_with):
        return False
    return in_repository(image).resolve() == Path(sample["image_path"]).resolve()  # also if one is a relative path


def is_done(config: Config, collector: Collector, stem: Path, sample: Sample) -> bool:
    """Does this sample have all files that are asked for, made from the same image and query by the same settings?"""
    wanted = [*storage.FOUND, *(["_topK.png"] if config.data.visualize_batch else [])]
    if not has_attention(collector, stem, sample):
        return False
    if not all(storage.beside(stem, ending).is_file() for ending in wanted):
        return False
    return stored(stem, "_bbox.json").get("made_with") == made_with(config, {"made_with": collector.made_with})


def batch_of_image(
    config: Config,
    collector: Collector,
    folder: Path,
    group: Sequence[Sample],
    session: Callable[[], ImageSession | None],
) -> list[Failure]:
    """Write all files of the samples about one image; returns the failures.

    `session` returns the session of the image, or None if no sample needs one.
    """
    try:
        seen = session()
    except Exception as error:
        said = recoverable_message(error)
        return [(sample["id"], said) for sample in group]
    failed = []
    for sample in group:
        stem = stem_in(folder, sample)
        try:
            attn, meta = attention_of(config, collector, stem, sample, seen)
            found = finish(config, stem, attn, meta)
            if config.data.visualize_batch:
                draw_top(stem, attn, meta, found)
        except Exception as error:
            failed.append((sample["id"], recoverable_message(error)))
    return failed


def attention_of(
    config: Config, collector: Collector, stem: Path, sample: Sample, session: ImageSession | None
) -> Stored:
    """(attn, meta) of a sample: the stored attention, or else what the session (a new one if None) reads and stores."""
    path = storage.attention_file(stem)
    if path is not None and has_attention(collector, stem, sample):
        try:
            return storage.read_attention(path)
        except ValueError as error:
            log.warning("%s; it is made again", error)
    session = session or collector.session_of(sample["image_path"])
    attn, meta = collector.collect(session, sample["image_path"], sample["prompt"])
    meta["id"] = sample["id"]  # tells it from single pictures in the same folder, which have no id
    return storage.read_attention(storage.write_attention(stem, attn, meta, config.storage.attention))


# ------------------------------------------------------------------------------------------------------ batch_analyze
def batch_analyze(config: Config) -> None:
    """Find the model's localization heads, from the attention files of data.batch_attention_dir.

    Prints how often each head counts, and writes localization_heads.json and .png into that folder.
    """
    folder = config.data.batch_attention_dir
    if not folder:
        raise ValueError("data.batch_attention_dir is needed: the folder with the attention files of stage=batch")
    criteria, samples, images, models = grounding.criteria_of(config.logic), [], [], set()
    failed, single, counter = [], 0, SinkCounter(criteria.binarize_threshold)
    for path in tqdm(storage.attention_files(folder), unit="file"):
        try:
            attn, meta = storage.read_attention(path)
            if "id" not in meta:
                single += 1
                continue
            maps = storage.as_maps(attn, meta)
            samples.append(criteria.measure(without_sinks(maps, config.logic.drop_sinks)))
            counter.add(maps)
            images.append(meta["image_file"])
            models.add((meta["model_name"], attn.shape[:2], json.dumps(meta.get("made_with"), sort_keys=True)))
        except RECOVERABLE as error:
            failed.append((path, error))
    for path, error in failed:
        log.error("%s: %s", path, error)
    if single:
        log.info("%d single pictures, which are no samples of a batch, are left out", single)
    if len(models) != 1:
        found = "; ".join(sorted(f"{name}, {made_with}" for name, _, made_with in models)) or "nothing that can be read"
        raise ValueError(f"{folder} must hold attention of one model, read in one way, not of: {found}")
    ((model, *_),) = models
    report(Path(folder), samples, images, criteria, model, config.logic.drop_sinks)
    report_sinks(Path(folder), counter)


def report_sinks(folder: Path, counter: SinkCounter) -> None:
    """Write which cells heads light in nearly all samples, and log how many there are; no file if that is not known."""
    if counter.why_not:
        (folder / SINK_FILE).unlink(missing_ok=True)  # it was of other samples
        log.info("no attention sinks are looked for: %s", counter.why_not)
        return
    sinks = counter.sinks()
    write_sinks(folder / SINK_FILE, sinks)
    heads_with = int(sinks.any((-2, -1)).sum())
    log.info("%d of %d heads have cells that nearly all samples light: %s, for logic.drop_sinks", heads_with,
             sinks.shape[0] * sinks.shape[1], folder / SINK_FILE)  # fmt: skip


def report(
    folder: Path, samples: Sequence[heads.Measures], images: Sequence[str], criteria: heads.Criteria, model: str,
    drop_sinks: str | None,
) -> None:  # fmt: skip
    """Print and write what `batch_analyze` found; `images` has the image of each sample, without `drop_sinks`."""
    counts, entropy = heads.counts(samples, criteria), heads.mean_entropy(samples)
    sums = np.mean([each.sums for each in samples], 0)
    chosen = heads.frequent(samples, criteria)
    overlap = heads.halves_overlap(samples, criteria, images) if len(set(images)) > 1 else None
    order = heads.by_count(counts, entropy)
    rows = [
        {"head": heads.head_name(head), "frequency": int(counts[head]), "share": number(counts[head] / len(samples)),
         "mean_attention_sum": number(sums[head]), "mean_entropy": number(entropy[head])}
        for head in order
    ]  # fmt: skip
    print(f"{model}: in how many of {len(samples)} samples a head is among the {criteria.count_k} most compact")
    print("head    frequency         attention  entropy")
    for row, head in zip(rows[: 2 * criteria.count_k], order, strict=False):
        mark = "  <- chosen" if head in chosen else ""
        frequency = f"{row['frequency']:7}  {100 * row['share']:5.1f} %"
        print(f"{row['head']:7} {frequency}  {row['mean_attention_sum']:11.3f}  {entropy[head]:7.3f}{mark}")
    if overlap is not None:
        print(f"halves with different images agree on {100 * overlap:.0f} % of the heads")
    manual = ",".join(f"{{layer:{layer},head:{head}}}" for layer, head in chosen)
    names = ",".join(map(heads.head_name, chosen))
    print(f"use them:  'logic.manual_heads=[{manual}]'   or, with run.py:  --method loc_att --loc_heads {names}")
    write_atomically(folder / "localization_heads.json", {
        "heads": names, "manual_heads": [{"layer": layer, "head": head} for layer, head in chosen], "model": model,
        "samples": len(samples), "overlap_of_halves": overlap, "criteria": vars(criteria), "table": rows,
        "drop_sinks": None if drop_sinks is None else hash_of(drop_sinks),
    })  # fmt: skip
    title = f"{model}, {len(samples)} samples"
    save_figure(viz.heads_figure(sums, entropy, chosen, counts, title), folder / "localization_heads.png")
    log.info("written: %s", folder / "localization_heads.json")
