"""One sample, an image and a query, from stage to stage: each reads the files of the one before and writes its own."""

import logging
import re
import zlib
from pathlib import Path

import numpy as np

from vicrop import heads
from vicrop.files import in_repository, read_json, write_atomically
from vicrop.images import load_image
from vicrop.known_heads import heads_of
from vicrop.localization import grounding, storage, viz
from vicrop.localization.collector import Collector
from vicrop.plots import save_figure
from vicrop.tables import checkpoint_of

log = logging.getLogger("localization")


# ------------------------------------------------------------------------------------------------------------- stages
def pipeline(config):
    """Collect, analyze, visualize, mask and box of data.image_file and data.query."""
    stem = collect(config)
    attn, meta = storage.read_attention(storage.attention_file(stem))
    draw(stem, attn, meta, finish(config, stem, attn, meta))


def collect(config):
    """Attention of all heads for data.image_file and data.query, to a file; returns its path without the ending."""
    data = config.data
    if not data.image_file or not data.query:
        raise ValueError(f"data.image_file and data.query are needed, not {data.image_file!r} and {data.query!r}")
    image_file, collector = in_repository(data.image_file), Collector(config.model)
    image = load_image(image_file)  # first: it is read in a moment, and a model is not
    attn, meta = collector.collect(collector.session_of(image), image_file, data.query)
    stem = stem_for(folder_of(config), image_file, data.query)
    path = storage.write_attention(stem, attn, meta, config.storage.attention)
    log.info("attention %s for %r in %s", list(attn.shape), data.query, path)
    return stem


def stem_for(folder, image_file, query):
    """A path for a sample's files, after its image and query; with a hash of both where another sample has taken it."""
    slug = re.sub(r"\W+", "_", query.lower()).strip("_")[:60]
    stem, about = folder / storage.safe_id(f"{image_file.stem}-{slug}"), [str(image_file), query]
    taken = storage.beside(stem, "_meta.json")
    if taken.is_file() and [read_json(taken).get(name) for name in ("image_file", "query")] != about:
        return stem.with_name(f"{stem.name}-{zlib.crc32(repr(about).encode()):08x}")
    return stem


def analyze_file(config):
    """Rank the heads of data.attention_file by both criteria: print the best, and write what they make."""
    stem, attn, meta = stored_sample(config)
    found = finish(config, stem, attn, meta)
    passed, _ = heads.ranked(found.measures, grounding.criteria_of(config.logic))
    print("head    attention  entropy")
    for head in passed[: config.logic.count_k]:
        mark = "  <- chosen" if head in found.heads else ""
        numbers = f"{found.measures.sums[head]:9.3f}  {found.measures.entropy[head]:7.3f}"
        print(f"{heads.head_name(head):7} {numbers}{mark}")


def visualize(config):
    """Draw data.attention_file: the maps of its heads, mask and box, and all heads at a glance."""
    stem, attn, meta = stored_sample(config)
    draw(stem, attn, meta, finish(config, stem, attn, meta))


def stored_sample(config):
    """(path without the ending, attn, meta) of data.attention_file."""
    if not config.data.attention_file:
        raise ValueError("data.attention_file is needed: a file that stage collect, pipeline or batch has written")
    path = Path(config.data.attention_file)
    return storage.stem_of(path), *storage.read_attention(path)


# -------------------------------------------------------------------------------------------------------------- parts
def folder_of(config):
    """Where a model's files go."""
    return Path(config.data.output_dir) / storage.safe_model(config.model.name)


def fixed_heads(logic, made_with):
    """[(layer, head)] of logic.manual_heads, or those known of the model that attention was read of; None without."""
    if logic.manual_heads:
        if logic.selection.name != "fixed":
            raise ValueError(f"logic.manual_heads are fixed heads: logic.selection={logic.selection.name} has none")
        return [(each.layer, each.head) for each in logic.manual_heads]
    return heads_of(made_with["family"], checkpoint_of(made_with["name"]))


def ground(config, attn, meta):
    """The grounding.Grounding of stored attention [L, H, 1, V]; says what has to be said about the choice of heads."""
    maps = storage.as_maps(attn, meta)
    manual = fixed_heads(config.logic, meta["made_with"])
    found = grounding.ground(maps, meta["region"], meta["image_size"], config.logic, manual)
    if found.note:
        log.warning("%r: %s", meta["query"], found.note)
    return found


def made_with(config, meta):
    """All that a sample's box depends on, for JSON."""
    logic, fixed = config.logic, fixed_heads(config.logic, meta["made_with"])
    chosen = {"selection": logic.selection.name, "sigma": logic.smoothing.sigma, "mask": logic.mask.method.name}
    chosen |= vars(grounding.criteria_of(logic)) | {"fixed": fixed and ",".join(map(heads.head_name, fixed))}
    return {"attention": meta["made_with"], "logic": chosen}


def finish(config, stem, attn, meta):
    """Analysis, mask and box of a sample, to files; the box comes last and says that the sample is done.

    They are of the same heads: what others have made goes first, pictures among it.
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


def write_analysis(config, stem, found):
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


def number(value):
    """A number for JSON, which has no infinity: None in its place."""
    return round(float(value), 6) if np.isfinite(value) else None


def draw(stem, attn, meta, found):
    """<id>_topK.png and <id>_heads.png."""
    draw_top(stem, attn, meta, found)
    path, sums, entropy = storage.beside(stem, "_heads.png"), found.measures.sums, found.measures.entropy
    save_figure(viz.heads_figure(sums, entropy, found.heads, title=f"{meta['model_name']}: {meta['query']}"), path)
    names = ", ".join(map(heads.head_name, found.heads[: viz.SHOWN_HEADS]))
    log.info("heads %s; box %s; pictures %s_*.png", names, found.box, stem)


def draw_top(stem, attn, meta, found):
    """<id>_topK.png: the image beside the maps of its heads."""
    image = load_image(in_repository(meta["image_file"]))
    figure = viz.grounding_figure(image, meta["query"], storage.as_maps(attn, meta), meta["region"], found)
    save_figure(figure, storage.beside(stem, "_topK.png"))
