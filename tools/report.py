"""One web page of result files: the scores, and of every question what the model looked at and what came of it.

    python -m tools.report data/results/llava_tiny-demo-rel_att.json                 # the page is beside it, as .html
    python -m tools.report data/results/llava_tiny-demo-*.json --out methods.html    # methods side by side

The page needs nothing else, neither a network nor a server: open it from the disk, or send it to somebody. Importance
maps are those that the run has kept (`run.py --save_maps`); those that it has not are made again.
"""

import argparse
import base64
import io
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import get_score
from graders import RIGHT, score
from info import METHODS, OPTIONS, TASKS, known
from map_files import read_maps
from records import ROOT, check_record, in_repository, read_json, renamed_to
from utils import load_image

TEMPLATE = Path(__file__).with_name("report.html")
PIXELS = 600e6  # of all images of a page together; with more of them each is smaller
IMAGE_SIDE, CROP_SIDE = 800, 224  # an image's longer side at most, and a crop's
QUALITY = 80  # of WebP


@dataclass
class Result:
    """A result file, and what is known of it."""

    path: Path
    model: str
    task: str
    method: str
    records: list
    about: dict  # what its .meta.json says; empty without one

    @classmethod
    def read(cls, path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no result file at {path}: run.py writes them, as data/results/MODEL-TASK-METHOD.json"
            )
        meta = path.with_suffix(".meta.json")
        about = read_json(meta) if meta.exists() else {}
        return cls(path, *get_score.name_of(path), get_score.read_results(path), about)

    @property
    def images(self):
        """The folder of its images."""
        settings = self.about.get("settings", {})
        return in_repository(ROOT / settings.get("image_path", TASKS[self.task]["image_path"]))

    @property
    def has_maps(self):
        """Does its method make maps?"""
        return "map" in METHODS.get(self.method, {})


# ---------------------------------------------------------------------------------------------------------------- maps
def maps_of(result, remake=True):
    """{record id: (map, region)} of a result: the saved ones and, with `remake`, those that are not saved."""
    if not result.has_maps:
        return {}
    saved = result.path.with_suffix(".maps.npz")
    maps = read_maps(saved) if saved.exists() else {}
    open_ones = [record for record in result.records if record["id"] not in maps and "error" not in record]
    return maps | made_again(result, open_ones) if open_ones and remake else maps


def made_again(result, records):
    """{record id: (map, region)} of some records of a result, by the model that made it, in the way that it was made.

    Raises:
        ValueError: nothing tells how it was made, or the checkpoint is another one by now.
    """
    from vicrop import Case, choose, heads_of, load_model, look_class, model_module, weights_of  # torch, if it must be

    made = result.about.get("settings")
    if not made:
        raise ValueError(f"{result.path} has no maps, and no .meta.json that tells how to make them: use --maps saved")
    if weights_of(made["model"], made["model_id"]) != made["weights"]:
        raise ValueError(f"{made['model_id']} has other weights than those that made {result.path}: use --maps saved")
    module = model_module(made["model"])
    model, processor = load_model(made["model"], made["model_id"], dtype=made["dtype"])
    options = {name: made[name] for name in OPTIONS if name in made}
    heads = heads_of(made["model"], made["model_id"], made.get("loc_heads"))
    (function,) = choose(module, [result.method], model, made["layer"], heads, **options).values()

    @lru_cache(maxsize=1)
    def look_at(path):
        return look_class(module)([path], model, processor, **options)

    maps, records = {}, sorted(records, key=lambda record: record["image_path"])
    for record in tqdm(records, desc=f"maps of {result.path.stem}", unit="map"):
        look = look_at(check_record(record, result.images))
        case = Case(look, [record["question"]], short_questions=[record.get("short_question")], records=[record])
        ((_, *maps[record["id"]]),) = case.find(result.method, function)
    return maps


# ------------------------------------------------------------------------------------------------------------ contents
class Images:
    """Images on their way into the page, each once: `add` gives its number, and writes it."""

    def __init__(self, file):
        self.file, self.numbers = file, {}

    def add(self, key, image, side):
        """The number of an image (called for only if `key` is new), at most `side` pixels long."""
        if key not in self.numbers:
            small, buffer = image(), io.BytesIO()
            small.thumbnail((side, side))
            small.save(buffer, "WEBP", quality=QUALITY)
            self.numbers[key] = len(self.numbers)
            text = base64.b64encode(buffer.getvalue()).decode("ascii")
            self.file.write(f'<script type="text/plain" id="image-{self.numbers[key]}">{text}</script>\n')
        return self.numbers[key]


def judged(record, grader):
    """{"outcome", "right"}: what the crop did to an answer, and which of both answers are right.

    The outcome is fixed, broken, right (both), wrong (both), or ungraded where the benchmark does not count a record.
    """
    pair = score(record, grader)
    if pair is None:
        return {"outcome": "ungraded"}
    before, after = pair
    right = [before >= RIGHT, after >= RIGHT]
    if before == after:
        return {"outcome": "right" if right[0] else "wrong", "right": right}
    return {"outcome": "fixed" if after > before else "broken", "right": right}


def shown_map(att_map, region):
    """A map for the page: a byte per cell, from its smallest value to its largest."""
    low, high = float(att_map.min()), float(att_map.max())
    cells = (255 * (att_map - low) / (high - low if high > low else 1)).round().astype(np.uint8)
    h, w = cells.shape
    return {"h": h, "w": w, "region": list(region), "cells": base64.b64encode(cells.tobytes()).decode("ascii")}


def shown_answer(record, grader, saved_map, image, images):
    """What a result says about a question."""
    fields = {name: record.get(name) for name in ("original_answer", "crop_answer", "bbox", "error")}
    fields |= judged(record, grader)
    if saved_map:
        fields["map"] = shown_map(*saved_map)
    if image and record.get("bbox"):
        box = tuple(record["bbox"])
        fields["crop"] = images.add((record["image_path"], box), lambda: image.crop(box), CROP_SIDE)
    return fields


def shown_question(record, result):
    """A question, without what results say about it."""
    labels = record.get("labels", [])
    return {
        "id": str(record["id"]), "question": record.get("question"), "gt": record.get("gt_bbox"),
        "labels": list(dict.fromkeys([labels] if isinstance(labels, str) else labels)),
        "size": get_score.size_of(record, result.images), "category": record.get("category"),
    }  # fmt: skip


def questions(results, graders, maps, images, side):
    """Yields the page's questions, in the order of the first result that has them; writes images on the way."""
    found = [{record["id"]: record for record in result.records} for result in results]
    for key in tqdm(dict.fromkeys(key for records in found for key in records), desc="page", unit="question"):
        number = next(number for number, records in enumerate(found) if key in records)
        record, result = found[number][key], results[number]
        item, image = shown_question(record, result), None
        try:
            image = load_image(check_record(record, result.images))
        except (OSError, ValueError) as error:
            item["missing"] = str(error)
        if image:
            item["image"] = images.add(record["image_path"], image.copy, side)
            item["width"], item["height"] = image.size
        item["found"] = [
            shown_answer(records[key], grader, own.get(key), image, images) if key in records else None
            for records, grader, own in zip(found, graders, maps, strict=True)
        ]
        yield item


def grader_of(result, metric):
    """The grader that judges a result: of the task's first metric, or of the one named."""
    metrics = TASKS[result.task]["metrics"]
    return metrics[known(metric or next(iter(metrics)), metrics, f"metric of {result.task}")]


def scores(results):
    """{"columns", "rows"} of the score table."""
    options = get_score.parse([])
    rows = [row for r in results for row in get_score.rows_of(r.model, r.task, r.method, r.path, r.records, options)]
    return {"columns": get_score.COLUMNS, "rows": list(map(get_score.cells, rows))}


# ------------------------------------------------------------------------------------------------------------ the page
def title_of(results):
    """What a page is about: what its results have in common, and how many there are."""
    if len(results) == 1:
        return f"{results[0].model}, {results[0].task}, {results[0].method}"
    same = [names.pop() for names in ({r.model for r in results}, {r.task for r in results}) if len(names) == 1]
    return ", ".join([*same, f"{len(results)} results"])


def as_json(value):
    """JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def write_page(path, results, metric=None, remake=True, side=None):
    """Write the page of some results: [Result] of one task.

    Args:
        metric: name of the metric that judges answers in the gallery; the task's first one if None.
        remake: make those maps again that are not saved.
        side: of an image, in pixels at most; chosen by their number if None.
    Raises:
        ValueError: results of several tasks; no such metric; maps that can be made no more.
    """
    if len({result.task for result in results}) > 1:
        raise ValueError(f"a page is about one task, not {', '.join(sorted({result.task for result in results}))}")
    about = {"results": [{"model": r.model, "method": r.method} for r in results], "scores": scores(results)}
    about |= {"title": title_of(results), "colors": heat_colors()}
    graders = [grader_of(result, metric) for result in results]
    maps = [maps_of(result, remake) for result in results]
    count = len({record.get("image_path") for result in results for record in result.records})
    side = side or int(min(IMAGE_SIDE, (PIXELS / max(1, count)) ** 0.5))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- images and data -->")
    with renamed_to(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(head)
        about["items"] = list(questions(results, graders, maps, Images(file), side))
        file.write(f'<script type="application/json" id="data">{as_json(about)}</script>\n')
        file.write(tail)


def heat_colors():
    """The 256 colours of a map, as base64 of RGB; those of pictures.overlay."""
    colors = matplotlib.colormaps["inferno"](np.arange(256))[:, :3]
    return base64.b64encode((255 * colors).round().astype(np.uint8).tobytes()).decode("ascii")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", help="result files of one task, MODEL-TASK-METHOD.json")
    add("--out", help="the page; default: the result file's name with .html, or report.html beside several")
    add("--metric", help="that judges the answers shown: paper, official, ...; default: the task's first")
    add(
        "--maps",
        choices=("all", "saved"),
        default="all",
        help="make maps again that are not saved (all), or leave them",
    )
    add("--image_side", type=int, help=f"pixels of an image's longer side; default: {IMAGE_SIDE}, less for many images")
    args = parser.parse_args(argv)
    paths = [Path(path) for path in args.results if not path.endswith(".meta.json")]  # the shell's * takes them, too
    if not paths:
        parser.error("no result file is named, only what belongs to one")
    out = Path(args.out or (paths[0].with_suffix(".html") if len(paths) == 1 else paths[0].parent / "report.html"))
    try:
        write_page(out, list(map(Result.read, paths)), args.metric, args.maps == "all", args.image_side)
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    main()
