"""Many samples: attention, masks and boxes of all lines of a file; and from their attention the heads of the model."""

import json
import logging
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from batches import FAILURES, prefetched, what_failed
from localization import analyze, bbox, storage, viz
from localization.collector import Collector
from localization.sample import draw_top, finish, folder_of, made_with, number
from pictures import save_figure
from records import in_repository, read_json, write_atomically

log = logging.getLogger("localization")


# -------------------------------------------------------------------------------------------------------------- batch
def batch(config):
    """Attention, analysis, mask and box of every line of data.data_file.

    What is done is not done again. Attention that is stored already is only analyzed: with other `logic`, no model is
    needed. A line that cannot be read or grounded is named at the end, and the others go on.
    """
    collector, folder = Collector(config.model), folder_of(config)
    samples, failed = read_lines(config.data)
    count = len(samples) + len(failed)
    todo = [sample for sample in samples if not is_done(config, collector, folder, sample)]
    new = {sample["id"] for sample in todo if not has_attention(collector, folder, sample)}
    log.info("%d lines: %d are done, %d need attention", count, len(samples) - len(todo), len(new))
    if new:
        collector.loaded  # noqa: B018 (here, not in the thread that makes looks ready)
    groups = groupby(sorted(todo, key=image_of), image_of)  # queries about an image share a look
    groups = [(image, list(group)) for image, group in groups]

    def look_of(group):
        return collector.look_at(group[0]) if any(sample["id"] in new for sample in group[1]) else None

    with logging_redirect_tqdm(), tqdm(total=len(todo), unit="query", desc=str(folder)) as bar:
        for (_, group), look in prefetched(look_of, groups):
            failed += batch_of_image(config, collector, folder, group, look)
            bar.update(len(group))
    for what, error in failed:
        log.error("%s: %s", what, error)
    if len(failed) == count:
        sys.exit("localization: no line could be grounded")
    log.info("%d of %d lines are done: %s", count - len(failed), count, folder)


def image_of(sample):
    return sample["image_path"]


def read_lines(data):
    """([{"id", "prompt", "image_path"}], [(line, error)]) of data.data_file, those that the configuration is about.

    Image paths are taken relative to the file's folder, or to the current one.
    """
    if not data.data_file:
        raise ValueError("data.data_file is needed: JSON lines with id, prompt and image_path")
    path = in_repository(data.data_file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {data.data_file}: data.data_file names JSON lines")
    wanted = slice(data.start_index, data.end_index)
    if not data.process_all and wanted == slice(None):
        raise ValueError("say data.process_all=true, or which lines: data.start_index, data.end_index (from 0)")
    lines = [each for each in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if each[1].strip()]
    if not data.process_all and not lines[wanted]:
        span = f"{data.start_index or 0} up to {data.end_index or 'the end'}"
        raise ValueError(f"{data.data_file} has {len(lines)} lines, counted from 0, and none from {span}")
    samples, failed, seen = [], [], set()
    for at, line in lines if data.process_all else lines[wanted]:
        try:
            sample = checked(json.loads(line), path.parent)
            if sample["id"] in seen:
                raise ValueError(f"id {sample['id']!r} comes twice")
        except ValueError as error:
            failed.append((f"{path}, line {at}", error))
        else:
            seen.add(sample["id"])
            samples.append(sample)
    return samples, failed


def checked(sample, folder):
    """A line's id, prompt and image_path, which is then a path that can be opened; ValueError if it lacks one."""
    if not isinstance(sample, dict):
        raise ValueError(f"it is no object but {str(sample)[:60]}")
    for field in ("prompt", "image_path"):
        if not isinstance(sample.get(field), str) or not sample[field].strip():
            raise ValueError(f"{field} is a text that is not empty, not {sample.get(field)!r}")
    if not isinstance(sample.get("id"), str | int) or isinstance(sample["id"], bool) or sample["id"] == "":
        raise ValueError(f"id is a text or a whole number, not {sample.get('id')!r}")
    beside = folder / sample["image_path"]
    image = beside if beside.is_file() else in_repository(sample["image_path"])
    return {"id": str(sample["id"]), "prompt": sample["prompt"], "image_path": str(image)}


def stem_in(folder, sample):
    return folder / storage.safe_id(sample["id"])


def same_sample(meta, collector, sample):
    """Is this what a stored file is about, read in the same way?"""
    about = (sample["image_path"], sample["prompt"])
    return (meta.get("image_file"), meta.get("query")) == about and meta.get("made_with") == collector.made_with


def has_attention(collector, folder, sample):
    """Is this sample's attention stored?"""
    path = storage.beside(stem_in(folder, sample), "_meta.json")
    stored = storage.attention_file(stem_in(folder, sample)) is not None and path.is_file()
    return stored and same_sample(read_json(path), collector, sample)


def is_done(config, collector, folder, sample):
    """Has this sample its box, made from the same by the same settings?"""
    path = storage.beside(stem_in(folder, sample), "_bbox.json")
    if not path.is_file() or not has_attention(collector, folder, sample):
        return False
    return read_json(path).get("made_with") == made_with(config, {"made_with": collector.made_with})


def batch_of_image(config, collector, folder, group, look):
    """All files of the samples about one image; [(id, error)] of those that failed.

    `look` is called for the look at the image; it gives None if none of them needs one.
    """
    try:
        seen = look()
    except Exception as error:
        said = what_failed(error)
        return [(sample["id"], said) for sample in group]
    failed = []
    for sample in group:
        stem = stem_in(folder, sample)
        try:
            if not has_attention(collector, folder, sample):
                attn, meta = collector.collect(seen, sample["image_path"], sample["prompt"])
                meta["id"] = sample["id"]  # what single pictures have not, which may lie in the same folder
                storage.write_attention(stem, attn, meta, config.storage.attention)
            attn, meta = storage.read_attention(storage.attention_file(stem))
            found = finish(config, stem, attn, meta)
            if config.data.visualize_batch:
                draw_top(stem, attn, meta, found)
        except Exception as error:
            failed.append((sample["id"], what_failed(error)))
    return failed


# ------------------------------------------------------------------------------------------------------ batch_analyze
def batch_analyze(config):
    """The model's localization heads, from the attention files of data.batch_attention_dir.

    Prints how often each head counts, and writes localization_heads.json and .png into that folder.
    """
    folder = config.data.batch_attention_dir
    if not folder:
        raise ValueError("data.batch_attention_dir is needed: the folder with the attention files of stage=batch")
    criteria, samples, models, failed, single = bbox.criteria_of(config.logic), [], set(), [], 0
    for path in tqdm(storage.attention_files(folder), unit="file"):
        try:
            attn, meta = storage.read_attention(path)
            if "id" not in meta:
                single += 1
                continue
            samples.append(criteria.measure(storage.as_maps(attn, meta)))
            models.add((meta["model_name"], attn.shape[:2], json.dumps(meta.get("made_with"), sort_keys=True)))
        except FAILURES as error:
            failed.append((path, error))
    for path, error in failed:
        log.error("%s: %s", path, error)
    if single:
        log.info("%d single pictures, which are no samples of a batch, are left out", single)
    if len(models) != 1:
        found = "; ".join(sorted(f"{name}, {made_with}" for name, _, made_with in models)) or "nothing that can be read"
        raise ValueError(f"{folder} must hold attention of one model, read in one way, not of: {found}")
    ((model, *_),) = models
    report(Path(folder), samples, criteria, model)


def report(folder, samples, criteria, model):
    """Print and write what `batch_analyze` found in samples, [analyze.Measures]."""
    counts, entropy = analyze.counts(samples, criteria), analyze.mean_entropy(samples)
    sums = np.mean([each.sums for each in samples], 0)
    heads = analyze.frequent(samples, criteria)
    overlap = analyze.halves_overlap(samples, criteria) if len(samples) > 1 else None
    order = analyze.by_count(counts, entropy)
    rows = [
        {"head": analyze.head_name(head), "frequency": int(counts[head]), "share": number(counts[head] / len(samples)),
         "mean_attention_sum": number(sums[head]), "mean_entropy": number(entropy[head])}
        for head in order
    ]  # fmt: skip
    print(f"{model}: in how many of {len(samples)} samples a head is among the {criteria.count_k} most compact")
    print("head    frequency         attention  entropy")
    for row, head in zip(rows[: 2 * criteria.count_k], order, strict=False):
        mark = "  <- chosen" if head in heads else ""
        frequency = f"{row['frequency']:7}  {100 * row['share']:5.1f} %"
        print(f"{row['head']:7} {frequency}  {row['mean_attention_sum']:11.3f}  {entropy[head]:7.3f}{mark}")
    if overlap is not None:
        print(f"two halves of the samples agree on {100 * overlap:.0f} % of the {criteria.top_k} heads")
    manual = ",".join(f"{{layer:{layer},head:{head}}}" for layer, head in heads)
    names = ",".join(map(analyze.head_name, heads))
    print(f"use them:  'logic.manual_heads=[{manual}]'   or, with run.py:  --method loc_att --loc_heads {names}")
    write_atomically(folder / "localization_heads.json", {
        "heads": names, "manual_heads": [{"layer": layer, "head": head} for layer, head in heads], "model": model,
        "samples": len(samples), "overlap_of_halves": overlap, "criteria": vars(criteria), "table": rows,
    })  # fmt: skip
    title = f"{model}, {len(samples)} samples"
    save_figure(viz.heads_figure(sums, entropy, heads, counts, title), folder / "localization_heads.png")
    log.info("written: %s", folder / "localization_heads.json")
