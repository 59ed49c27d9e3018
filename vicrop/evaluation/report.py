"""One web page of result files: the scores, and of every question what the model looked at and what came of it.

    vicrop report data/results/llava_tiny-demo-rel_att.json                          # the page is beside it, as .html
    vicrop report data/results/llava_tiny-demo-*.json --out methods.html             # methods side by side

The page needs nothing else, neither a network nor a server: open it from the disk, or send it to somebody. It shows the
importance maps that the run has kept (`vicrop run --save_maps`); the model makes the others again.
"""

import base64
import io
import json
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from vicrop.command_line import CommandParser
from vicrop.dataset import Id, box_of, image_of
from vicrop.evaluation.confidence import sureness
from vicrop.evaluation.metrics import GRADERS, RIGHT, outcome, score
from vicrop.evaluation.own_metrics import is_own
from vicrop.evaluation.page_scores import names_of, risk_curves, scores
from vicrop.evaluation.result_files import ResultFile, place_in_table, say, size_of
from vicrop.evaluation.results import SavedMap
from vicrop.evaluation.scores import ScoreOptions
from vicrop.files import atomic_path, patient_threads
from vicrop.images import MOST_PIXELS, allow_pixels, load_image
from vicrop.map_files import read_maps, write_maps
from vicrop.plots import HEAT, from_0_to_1
from vicrop.tables import METHODS, known

TEMPLATE = Path(__file__).with_name("report.html")
IMAGE_SIDE, CROP_SIDE = 1600, 320  # an image's longer side at most, and a crop's: the page enlarges both
IMAGE_PIXELS, CROP_PIXELS = 400e6, 200e6  # of all images, and of all crops, of a page: many of them are made smaller
QUALITY = 80  # of WebP


def readable(paths: list[Path]) -> list[ResultFile]:
    """The ResultFile of each path; paths that are no result file are named and left out.

    Raises:
        ValueError, FileNotFoundError: that of the first path, if none is a result file.
    """
    found, errors = [], []
    for path in paths:
        try:
            found.append(ResultFile.read(path))
        except (ValueError, OSError) as error:
            errors.append(error)
    if not found:
        raise errors[0]
    for error in errors:
        say(f"{error}: it is left out")
    return found


# ---------------------------------------------------------------------------------------------------------------- maps
def maps_of(result: ResultFile, place: Mapping[str, Any] | None = None) -> dict[Id, SavedMap]:
    """{record id: (map, region)} of a result: the saved maps and, if there is a `place` for the model, all others.

    Maps that are made again are saved, too, even if this is interrupted.

    Args:
        place: keywords of vicrop.load_model that say where the model is to run; None: only what is saved.
    """
    if "map" not in METHODS.get(result.method, {}):
        return {}
    saved = result.path.with_suffix(".maps.npz")
    try:
        maps: dict[Id, SavedMap] = read_maps(saved) if saved.exists() else {}
    except ValueError as error:
        say(f"{error}: the maps are treated as not saved")
        maps = {}
    open_ones = [each for each in result.records if each["id"] not in maps and not {"error", "gated"} & each.keys()]
    if open_ones and place is not None:
        from vicrop.evaluation.remade_maps import made_again  # here, because it imports torch

        before = len(maps)
        try:
            for key, saved_map in made_again(result, open_ones, place):
                maps[key] = saved_map
        finally:
            if len(maps) > before:
                with atomic_path(saved) as temporary:
                    write_maps(temporary, maps)
    return maps


# ------------------------------------------------------------------------------------------------------------ contents
class Images:
    """The images of a page: `add` writes an image into the page, if it is new, and returns its number.

    Args:
        file: the page; sides: the longer side, in pixels at most, (of an image, of a crop).
    """

    def __init__(self, file: TextIO, sides: tuple[int, int]):
        self.file = file
        self.numbers: dict[Hashable, int] = {}
        self.side, self.crop_side = sides

    def add(self, key: Hashable, image: Callable[[], Image.Image], side: int) -> int:
        """The number of the image `key`. If it is new, `image()` is written, its longer side `side` pixels at most."""
        if key not in self.numbers:
            small, buffer = image(), io.BytesIO()
            small.thumbnail((side, side))
            small.save(buffer, "WEBP", quality=QUALITY)
            self.numbers[key] = len(self.numbers)
            text = base64.b64encode(buffer.getvalue()).decode("ascii")
            self.file.write(f'<script type="text/plain" id="image-{self.numbers[key]}">{text}</script>\n')
        return self.numbers[key]


def sides_of(results: Sequence[ResultFile], side: int | None = None) -> tuple[int, int]:
    """The longer side (of an image, of a crop) in pixels: the largest with which the page stays small enough."""
    images = len({str(record.get("image_path")) for result in results for record in result.records})
    crops = sum(len(shown_boxes(record)) for result in results for record in result.records)
    side = side or int(min(IMAGE_SIDE, (IMAGE_PIXELS / max(1, images)) ** 0.5))
    return side, int(min(CROP_SIDE, (CROP_PIXELS / max(1, crops)) ** 0.5))


def judged(record: dict, grader: str | None) -> dict[str, Any]:
    """{"outcome", "scores"}: what the crop did to an answer, and the scores (0 to 100) without and with it.

    The outcome is "ungraded", without scores, if the benchmark does not count the record or it has no labels.

    Args:
        grader: None, if there is nothing to score the record by.
    """
    try:
        pair = score(record, grader) if grader else None
    except ValueError:
        pair = None
    return {"outcome": "ungraded"} if pair is None else {"outcome": outcome(pair), "scores": pair}


def shown_map(att_map: np.ndarray, region: Sequence[int]) -> dict[str, Any]:
    """A map for the page: a byte per cell, from its smallest value to its largest."""
    cells = (255 * from_0_to_1(att_map)).round().astype(np.uint8)
    h, w = cells.shape
    return {"h": h, "w": w, "region": list(region), "cells": base64.b64encode(cells.tobytes()).decode("ascii")}


def shown_answer(
    record: dict, grader: str | None, saved_map: SavedMap | None, image: Image.Image | None, images: Images
) -> dict[str, Any]:
    """What the page shows of a record of a result: answers, scores, box, map and crop."""
    fields: dict[str, Any] = {name: record.get(name) for name in ("original_answer", "crop_answer", "error")}
    fields |= judged(record, grader) | {"boxes": shown_boxes(record), "crops": []}
    fields |= {"gated": True} if record.get("gated") is True else {}
    sure = sureness(record)
    fields |= {"confidence": sure} if sure and "error" not in record else {}
    if saved_map:
        fields["map"] = shown_map(*saved_map)
    if image is None:
        return fields
    for x1, y1, x2, y2 in fields["boxes"]:
        box = max(0, int(x1)), max(0, int(y1)), min(image.width, int(x2)), min(image.height, int(y2))
        if box[0] < box[2] and box[1] < box[3]:
            crop = partial(image.crop, box)
            fields["crops"].append(images.add((record["image_path"], box), crop, images.crop_side))
    return fields


def shown_boxes(record: dict) -> list[tuple[float, float, float, float]]:
    """All boxes of a record's crops: those of `bboxes`, or else that of `bbox`; none where nothing was cropped."""
    several = record.get("bboxes")
    several = several if isinstance(several, list) and several else [record.get("bbox")]
    return valid_boxes({"id": record["id"]}, several)


def true_places(record: dict) -> list[tuple[float, float, float, float]]:
    """A record's `gt_bboxes`, or else its `gt_bbox`: none where the thing that is asked about is not there."""
    several = record.get("gt_bboxes")
    return valid_boxes(record, several if isinstance(several, list) else [record.get("gt_bbox")])


def valid_boxes(record: dict, boxes: Sequence[Any]) -> list[tuple[float, float, float, float]]:
    """Those that can be drawn: the run, or the score table, has said what is wrong with others."""
    found = []
    for box in boxes:
        with suppress(ValueError):
            found.append(box_of(record | {"gt_bbox": box}))
    return found


def shown_question(record: dict, result: ResultFile) -> dict[str, Any]:
    """What the page shows of a question itself, whatever the answers are."""
    labels, category = record.get("labels"), record.get("category")
    labels = labels if isinstance(labels, list) else [] if labels is None else [labels]
    category = ", ".join(map(str, category)) if isinstance(category, list) else category
    size = size_of(record, result.images)
    return {
        "id": str(record["id"]), "question": record.get("question"), "places": true_places(record),
        "labels": list(dict.fromkeys(map(str, labels))),
        "size": size and str(size), "category": None if category is None else str(category),
    }  # fmt: skip


def questions(
    results: Sequence[ResultFile], grader: str, maps: Sequence[Mapping[Id, SavedMap]], images: Images
) -> Iterator[dict[str, Any]]:
    """Yield the page's questions, in the order of the first result that has them, and write their images on the way."""
    found = [{record["id"]: record for record in result.records} for result in results]
    for key in tqdm(dict.fromkeys(key for records in found for key in records), desc="page", unit="question"):
        number = next(number for number, records in enumerate(found) if key in records)
        record, result = found[number][key], results[number]
        item, image = shown_question(record, result), None
        try:
            image = load_image(image_of(record, result.images))
        except (OSError, ValueError) as error:
            item["missing"] = str(error)
        if image:
            item["image"] = images.add(record["image_path"], image.copy, images.side)
            item["width"], item["height"] = image.size
        item["found"] = []
        for each, records, own in zip(results, found, maps, strict=True):
            shown = None
            if key in records:
                by = None if each.is_unlabelled(records[key], grader) else grader
                shown = shown_answer(records[key], by, own.get(key), image, images)
            item["found"].append(shown)
        yield item


def refuse_different_questions(results: Sequence[ResultFile]) -> None:
    """ValueError unless results are of one task, and an id means the same question and image in all of them."""
    if len({result.task for result in results}) > 1:
        raise ValueError(f"a page is about one task, not {', '.join(sorted({result.task for result in results}))}")
    seen = {}
    for result in results:
        for record in result.records:
            about = record.get("question"), record.get("image_path"), str(result.images)
            if seen.setdefault(record["id"], about) != about:
                raise ValueError(f"{record['id']!r} is {about} in {result.path}, and {seen[record['id']]} elsewhere")


def note_on(results: Sequence[ResultFile]) -> str:
    """A warning if results are not all about the same questions; else an empty text."""
    ids = [{record["id"] for record in result.records} for result in results]
    if all(each == ids[0] for each in ids):
        return ""
    counts = ", ".join(f"{result.path.stem} {len(each)}" for result, each in zip(results, ids, strict=True))
    common = len(set.intersection(*ids))
    return f"The results are not about the same questions ({counts}; {common} in common): their scores do not compare."


def how_made(results: Sequence[ResultFile]) -> dict[str, Any]:
    """{"names", "rows": [[setting, its value in each result]]} of what .meta.json tells; no rows without one.

    Of a run's other facts (where it ran, and when) only those are shown that answers may depend on.
    """
    tables: list[dict[str, str]] = []
    for r in results:
        settings = dict(r.meta.get("settings", {}))
        runs = list(r.meta.get("runs", {}).values())
        for name in ("layers", "device", "batch_size"):
            found = list(dict.fromkeys(readable_value(run[name]) for run in runs if name in run))
            settings |= {name: "; ".join(found)} if found else {}
        for library, number in (runs[-1].get("versions", {}) if runs else {}).items():
            settings[library] = number
        tables.append({name: readable_value(value) for name, value in settings.items()})
    names = dict.fromkeys(name for table in tables for name in table)
    return {"names": names_of(results), "rows": [[name, *(table.get(name, "") for table in tables)] for name in names]}


def readable_value(value: Any) -> str:
    """A setting as a text."""
    return value if isinstance(value, str) else json.dumps(value)


# ------------------------------------------------------------------------------------------------------------ the page
def title_of(results: Sequence[ResultFile]) -> str:
    """What a page is about: what its results have in common, and how many there are."""
    if len(results) == 1:
        return f"{results[0].model}, {results[0].task}, {results[0].method}"
    same = [names.pop() for names in ({r.model for r in results}, {r.task for r in results}) if len(names) == 1]
    return ", ".join([*same, f"{len(results)} results"])


def as_json(value: Any) -> str:
    """JSON for an HTML script element, which a "<" could end."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def write_page(
    path: str | Path, results: Sequence[ResultFile], metric: str | None = None, place: Mapping[str, Any] | None = None,
    side: int | None = None,
) -> None:  # fmt: skip
    """Write the page of some results of one task.

    Args:
        metric: name of the metric that judges answers in the gallery; the task's first one if None. One that the task
            does not have (see metrics.metrics_named) takes the place of its own.
        place: where the model makes maps that are not saved (see `maps_of`); None: such maps are left out.
        side: the longer side of an image, in pixels at most; None: chosen by the number of images.
    Raises:
        ValueError: results of different questions; no such metric; maps that can no longer be made.
    """
    refuse_different_questions(results)
    metric, grader, options = judge_of(results[0], metric)
    about = {
        "title": title_of(results), "results": names_of(results), "note": note_on(results),
        "scores": scores(results, metric, options), "risk": risk_curves(results, grader),
        "metric": metric, "right": RIGHT, "colors": heat_colors(),
        "settings": how_made(results),
    }  # fmt: skip
    if about["note"]:
        print(about["note"], file=sys.stderr)
    about["note"] = " ".join(filter(None, (about["note"], about["scores"].pop("left_out"))))
    maps = [maps_of(result, place) for result in results]
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("<!-- images and data -->")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(head)
        about["items"] = list(questions(results, grader, maps, Images(file, sides_of(results, side))))
        file.write(f'<script type="application/json" id="data">{as_json(about)}</script>\n')
        file.write(tail)


def judge_of(result: ResultFile, metric: str | None) -> tuple[str, str, ScoreOptions]:
    """(metric, its grader, the options of the score table) of `write_page`'s argument `metric`.

    Raises:
        ValueError: no such metric.
    """
    if metric not in result.metrics and metric is not None and (metric in GRADERS or is_own(metric)):
        options = ScoreOptions(metric)
        ((metric, grader),) = options.instead.items()
        return metric, grader, options
    own = ScoreOptions().metrics_of(result)
    metric = known(metric or next(iter(own)), own, f"metric of {result.task}")
    return metric, own[metric], ScoreOptions()


def heat_colors() -> str:
    """The 256 colours of a map, as base64 of RGB; the same as those of plots.overlay."""
    colors = matplotlib.colormaps[HEAT](np.arange(256))[:, :3]
    return base64.b64encode((255 * colors).round().astype(np.uint8).tobytes()).decode("ascii")


def main(argv: Sequence[str] | None = None, prog: str = "report") -> None:
    """The command; `prog` is what it is called."""
    patient_threads()
    parser = CommandParser(prog, __doc__)
    add = parser.add_argument
    add("results", nargs="+", help="result files of one task, MODEL-TASK-METHOD.json")
    add("--out", help="the page; default: the result file's name with .html, or report.html beside several")
    add("--metric", help="judges the answers shown: paper, exact, FILE.py:function, ...; default: the task's first")
    add("--maps", choices=("all", "saved"), default="all", help="all: make again what is not saved")
    add("--device", help="torch device on which maps are made again; default: the first GPU, else the CPU")
    add("--device_map", choices=("auto",), help="auto: spread a large model over all GPUs; default: one device")
    add(
        "--max_image_pixels",
        type=int,
        help=f"open images of up to so many pixels; default: 89478485, at most {MOST_PIXELS}",
    )
    add("--image_side", type=int, help=f"pixels of an image's longer side; default: {IMAGE_SIDE}, less for many images")
    args = parser.parse_args(argv)
    try:
        allow_pixels(args.max_image_pixels)
    except ValueError as error:
        parser.error(str(error))
    paths = [Path(path) for path in args.results if not path.endswith(".meta.json")]  # a shell's * finds them, too
    if not paths:
        parser.error("name a result file, MODEL-TASK-METHOD.json: only .meta.json files are named")
    paths.sort(key=lambda path: place_in_table(path.stem.rpartition("-")[2]))
    out = Path(args.out or (paths[0].with_suffix(".html") if len(paths) == 1 else paths[0].parent / "report.html"))
    if not out.parent.is_dir():
        parser.error(f"--out {out} must lie in a folder that exists: there is no {out.parent}")
    place = {"device": args.device, "device_map": args.device_map} if args.maps == "all" else None
    try:
        write_page(out, readable(paths), args.metric, place, args.image_side)
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    main()
