"""The stages of one sample, an image and a query: each reads the files of the stage before and writes its own."""

import logging
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from vicrop import heads
from vicrop.files import in_repository, read_json, write_atomically
from vicrop.images import load_image
from vicrop.known_heads import heads_of
from vicrop.localization import grounding, storage, viz
from vicrop.localization.collector import Collector
from vicrop.localization.config import Config, Logic
from vicrop.localization.grounding import Grounding, Head
from vicrop.localization.sinks import hash_of, without_sinks
from vicrop.localization.storage import Meta
from vicrop.plots import save_figure
from vicrop.tables import checkpoint_of

log = logging.getLogger("localization")


# ------------------------------------------------------------------------------------------------------------- stages
def pipeline(config: Config) -> None:
    """Collect, analyze, visualize, mask and box of data.image_file and data.query."""
    stem = collect(config)
    attn, meta = storage.read_attention(storage.written_file(stem, config.storage.attention))
    draw(stem, attn, meta, finish(config, stem, attn, meta))


def collect(config: Config) -> Path:
    """Write the attention of all heads for data.image_file and data.query; returns the path without its ending."""
    data = config.data
    if not data.image_file or not data.query:
        raise ValueError(f"data.image_file and data.query are needed, not {data.image_file!r} and {data.query!r}")
    image_file, collector = in_repository(data.image_file), Collector(config.model)
    image = load_image(image_file)  # before the model, which takes much longer to load
    attn, meta = collector.collect(collector.session_of(image), image_file, data.query)
    stem = stem_for(folder_of(config), image_file, data.query)
    path = storage.write_attention(stem, attn, meta, config.storage.attention)
    log.info("attention %s for %r in %s", list(attn.shape), data.query, path)
    return stem


def stem_for(folder: Path, image_file: Path, query: str) -> Path:
    """The path of a sample's files, by image and query, with a hash of both if another sample has that name."""
    slug = re.sub(r"\W+", "_", query.lower()).strip("_")[:60]
    stem, about = folder / storage.safe_id(f"{image_file.stem}-{slug}"), [str(image_file), query]
    taken = storage.beside(stem, "_meta.json")
    if taken.is_file() and [read_json(taken).get(name) for name in ("image_file", "query")] != about:
        return stem.with_name(f"{stem.name}-{zlib.crc32(repr(about).encode()):08x}")
    return stem


def analyze_file(config: Config) -> None:
    """Rank the heads of data.attention_file by both criteria: print the best, and write analysis, mask and box."""
    stem, attn, meta = stored_sample(config)
    found = finish(config, stem, attn, meta)
    passed, _ = heads.ranked(found.measures, grounding.criteria_of(config.logic))
    print("head    attention  entropy")
    for head in passed[: config.logic.count_k]:
        mark = "  <- chosen" if head in found.heads else ""
        numbers = f"{found.measures.sums[head]:9.3f}  {found.measures.entropy[head]:7.3f}"
        print(f"{heads.head_name(head):7} {numbers}{mark}")


def visualize(config: Config) -> None:
    """Draw data.attention_file: the maps of its heads, mask and box, and all heads at a glance."""
    stem, attn, meta = stored_sample(config)
    draw(stem, attn, meta, finish(config, stem, attn, meta))


def stored_sample(config: Config) -> tuple[Path, np.ndarray, Meta]:
    """(path without the ending, attn, meta) of data.attention_file."""
    if not config.data.attention_file:
        raise ValueError("data.attention_file is needed: a file that stage collect, pipeline or batch has written")
    path = Path(config.data.attention_file)
    return storage.stem_of(path), *storage.read_attention(path)


# -------------------------------------------------------------------------------------------------------------- parts
def folder_of(config: Config) -> Path:
    """The folder of a model's files."""
    return Path(config.data.output_dir) / storage.safe_model(config.model.name)


def fixed_heads(logic: Logic, made_with: Mapping[str, Any]) -> Sequence[Head] | None:
    """The heads of logic.manual_heads, else those known of the model whose attention was read; None without any."""
    if logic.manual_heads:
        if logic.selection.name != "fixed":
            raise ValueError(
                f"logic.manual_heads are fixed heads: logic.selection must be fixed, not {logic.selection.name}"
            )
        return [(each.layer, each.head) for each in logic.manual_heads]
    return heads_of(made_with["family"], checkpoint_of(made_with["name"]))


def ground(config: Config, attn: np.ndarray, meta: Meta) -> Grounding:
    """The Grounding of stored attention [L, H, 1, V]; logs its remark on the choice of heads, if there is one."""
    maps = without_sinks(storage.as_maps(attn, meta), config.logic.drop_sinks)
    manual = fixed_heads(config.logic, meta["made_with"])
    found = grounding.ground(maps, meta["region"], meta["image_size"], config.logic, manual)
    if found.note:
        log.warning("%r: %s", meta["query"], found.note)
    return found


def made_with(config: Config, meta: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that a sample's box depends on, for JSON."""
    logic, fixed = config.logic, fixed_heads(config.logic, meta["made_with"])
    chosen = {"selection": logic.selection.name, "sigma": logic.smoothing.sigma, "mask": logic.mask.method.name}
    chosen |= vars(grounding.criteria_of(logic)) | {"fixed": fixed and ",".join(map(heads.head_name, fixed))}
    chosen |= {} if logic.drop_sinks is None else {"drop_sinks": hash_of(logic.drop_sinks)}
    return {"attention": meta["made_with"], "logic": chosen}


def finish(config: Config, stem: Path, attn: np.ndarray, meta: Meta) -> Grounding:
    """Write analysis, mask and box of a sample; the box comes last, so its file shows that the sample is done.

    Old files, pictures too, are deleted first, so that all files of a sample are of the same heads.
    """
    found = ground(config, attn, meta)
    storage.forget(stem, storage.FOUND + storage.PICTURES)
    write_analysis(config, stem, found)
    viz.draw_mask(found.shown, storage.beside(stem, "_mask.png"))
    content = {
        "bbox": found.box, "image_size": meta["image_size"], "heads": list(map(heads.head_name, found.heads)),
        "peak": found.peak, "query": meta["query"], "image_file": meta["image_file"], "note": found.note,
        "made_with": made_with(config, meta),
    }  # fmt: skip
    write_atomically(storage.beside(stem, "_bbox.json"), content)
    return found


def write_analysis(config: Config, stem: Path, found: Grounding) -> None:
    """<id>_analysis.json: the chosen heads, and all heads ranked, those that pass both criteria first."""
    measures = found.measures
    passed, others = heads.ranked(measures, grounding.criteria_of(config.logic))
    rows = [
        {"layer": head[0], "head": head[1], "attention_sum": number(measures.sums[head]),
         "entropy": number(measures.entropy[head]), "bottom_row_lit": bool(measures.bottom[head]),
         "passes": rank < len(passed)}
        for rank, head in enumerate([*passed, *others])
    ]  # fmt: skip
    chosen = list(map(heads.head_name, found.heads))
    write_atomically(storage.beside(stem, "_analysis.json"), {"heads": chosen, "note": found.note, "ranked": rows})


def number(value: SupportsFloat) -> float | None:
    """A rounded number for JSON, or None if it is infinite or NaN, which JSON does not have."""
    return round(float(value), 6) if math.isfinite(value) else None


def draw(stem: Path, attn: np.ndarray, meta: Meta, found: Grounding) -> None:
    """Write <id>_topK.png and <id>_heads.png."""
    draw_top(stem, attn, meta, found)
    path, sums, entropy = storage.beside(stem, "_heads.png"), found.measures.sums, found.measures.entropy
    save_figure(viz.heads_figure(sums, entropy, found.heads, title=f"{meta['model_name']}: {meta['query']}"), path)
    names = ", ".join(map(heads.head_name, found.heads[: viz.SHOWN_HEADS]))
    log.info("heads %s; box %s; pictures %s_*.png", names, found.box, stem)


def draw_top(stem: Path, attn: np.ndarray, meta: Meta, found: Grounding) -> None:
    """Write <id>_topK.png: the image beside the maps of its heads."""
    image = load_image(in_repository(meta["image_file"]))
    figure = viz.grounding_figure(image, meta["query"], storage.as_maps(attn, meta), meta["region"], found)
    save_figure(figure, storage.beside(stem, "_topK.png"))
