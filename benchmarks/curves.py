"""How cost grows: with the size of an image, with the questions about it, with the records of a result.

    python -m benchmarks.curves [--model llava_tiny] [--rounds 3] [images questions records]

Each curve ends with an exponent, the slope of a straight line through its points on logarithmic scales: 1 is as fast as
what grows, 0 not at all. Rounds are interleaved: each takes all points of a curve, one after the other.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging as transformers_logging

from vicrop.choices import MethodChoice, ModelChoice
from vicrop.crop import QuestionBatch
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.results import Results
from vicrop.evaluation.scores import ScoreOptions, rows_of
from vicrop.loaded import load_chosen
from vicrop.tables import VIEWS

QUESTION = "what number is on the {} sign?"
COLORS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange", "brown", "grey")
MEGAPIXELS, QUESTIONS, RECORDS = (0.3, 1, 3, 10, 32), (1, 2, 4, 8, 16), (100, 1_000, 10_000, 200_000)


def exponent(points, seconds):
    """The slope on logarithmic scales."""
    return float(np.polyfit(np.log(points), np.log(seconds), 1)[0])


def medians(points, run, rounds):
    """For each point the median of its seconds; rounds are interleaved."""
    found = [[] for _ in points]
    for _ in range(rounds):
        for each, point in zip(found, points, strict=True):
            start = time.perf_counter()
            run(point)
            each.append(time.perf_counter() - start)
    return [statistics.median(each) for each in found]


def show(title, points, seconds, notes=None):
    notes = notes or [""] * len(points)
    parts = [f"{point:g}: {each:.3f} s{note}" for point, each, note in zip(points, seconds, notes, strict=True)]
    print(f"{title}: {'; '.join(parts)}; exponent {exponent(points, seconds):.2f}", flush=True)


def picture(megapixels):
    """A picture of so many megapixels, four to three."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    small = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((round(height * 4 / 3), height), Image.Resampling.BICUBIC)


def images(loaded, args):
    """Seconds of a question about an image, by its megapixels: at one look, by tiles, by a search."""
    pictures = {size: picture(size) for size in args.megapixels}
    for name, method in loaded.methods.items():
        views = {}

        def ask(size, name=name, method=method, views=views):
            batch = QuestionBatch(loaded.session([pictures[size]]), [QUESTION.format("red")])
            (found,) = batch.results(method, batch.original_answers({name: method}))
            views[size] = "" if found.views is None else f" ({found.views} views)"

        seconds = medians(args.megapixels, ask, args.rounds)
        show(f"{name}, megapixels", args.megapixels, seconds, [views[size] for size in args.megapixels])


def questions(loaded, args):
    """Seconds of all questions about one image, by their number, asked one after the other."""
    image, method = picture(0.3), loaded.methods["rel_att"]

    def ask(count):
        session = loaded.session([image])
        for number in range(count):
            color = COLORS[number % len(COLORS)] + (" or white" if number >= len(COLORS) else "")
            batch = QuestionBatch(session, [QUESTION.format(color)])
            batch.results(method, batch.original_answers({"rel_att": method}))

    show("rel_att, questions about an image", args.questions, medians(args.questions, ask, args.rounds))


def records(_, args):
    """Seconds of merging and of scoring, by the number of records."""
    with tempfile.TemporaryDirectory() as folder:
        many = [record_of(number) for number in range(max(args.records))]

        def merge(count):
            path = Path(folder) / f"{time.perf_counter_ns()}-demo-rel_att.json"
            result = Results(path, {"task": "demo"})
            for record in many[:count]:
                result.append(record)
            result.merge(many[:count], many[:count])

        def score(count):
            path = Path(folder) / "llava_tiny-demo-rel_att.json"
            rows_of(ResultFile(path, "llava_tiny", "demo", "rel_att", many[:count], {"counts": {"dataset": count}}),
                    ScoreOptions())  # fmt: skip

        for title, run in (("appending and merging, records", merge), ("scoring, records", score)):
            show(title, args.records, medians(args.records, run, args.rounds))


def record_of(number):
    sure = {"original": 0.9, "crop": 0.95}
    return {"id": str(number), "question": "which?", "labels": "1", "image_path": f"{number // 3}.png",
            "original_answer": str(number % 3), "crop_answer": str(number % 2), "bbox": [0, 0, 9, 9],
            "size": ("small", "medium", "large")[number % 3], "confidence": sure}  # fmt: skip


CURVES = {"images": images, "questions": questions, "records": records}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(CURVES)}; default: all")
    add("--model", default="llava_tiny")
    add("--device", default="cpu")
    add("--views", type=int, default=VIEWS)
    add("--rounds", type=int, default=3)
    add("--megapixels", type=float, nargs="+", default=MEGAPIXELS)
    add("--questions", type=int, nargs="+", default=QUESTIONS)
    add("--records", type=int, nargs="+", default=RECORDS)
    args = parser.parse_args()
    wrong = [name for name in args.curves if name not in CURVES]
    if wrong:
        parser.error(f"there is no curve {wrong[0]!r}: choose from {', '.join(CURVES)}")
    transformers_logging.disable_progress_bar()
    how = MethodChoice(("rel_att", "rel_att_high", "rel_att_zoom"), views=args.views)
    chosen = args.curves or list(CURVES)
    loaded = load_chosen(ModelChoice(args.model, device=args.device), how) if chosen != ["records"] else None
    for name in chosen:
        CURVES[name](loaded, args)


if __name__ == "__main__":
    main()
