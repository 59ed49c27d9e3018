"""What a gate costs: the questions of a dataset with one answer, with a crop each, and with crops where unsure.

    python -m benchmarks.gate [--model llava_tiny] [--method rel_att] [--crop_below 0.9] [--rounds 9] [--limit N]

As a run does it: the questions about an image share its session, and are asked one by one. A round takes the images in
turn, each in all three ways one after the other, every second one in the opposite order. Were all questions alike, a
gate that costs nothing itself would take 1 + s (u - 1) in units of one plain answer: s is the share of questions with
a crop, and u the time of an answer, a map and an answer with crop in the same unit. They are not alike: an unsure first
answer is seldom the one that the crop gives, so as a draft it saves less. Hence also u of the questions with a crop.
"""

import argparse
import time
from itertools import groupby

import numpy as np
from transformers.utils import logging as transformers_logging

from vicrop.choices import MethodChoice, ModelChoice, wants_crop
from vicrop.crop import QuestionBatch
from vicrop.dataset import load_task
from vicrop.files import ROOT
from vicrop.images import load_image
from vicrop.loaded import load_chosen

DEMO = ROOT / "data" / "demo"


class Asked:
    """A model, and what it is asked: groups of records about an image each."""

    def __init__(self, model, method, limit):
        self.loaded, self.method = load_chosen(ModelChoice(model, device="cpu"), MethodChoice((method,))), method
        records = load_task(DEMO / "data.json")[:limit]
        self.groups = [(load_image(DEMO / "images" / name), [record["question"] for record in group])
                       for name, group in groupby(records, lambda record: record["image_path"])]  # fmt: skip

    def batches(self, group, crop_below=None):
        """A QuestionBatch for each question of a group, on one fresh session, which is made with the first one."""
        image, questions = group
        session = self.loaded.session([image])
        for question in questions:
            yield QuestionBatch(session, [question], crop_below=crop_below)

    def one_answer(self, batch):
        """A question answered once."""
        batch.original_answers({})

    def both(self, batch):
        """A question answered with a map and a crop, where that is wanted; its CropResult."""
        methods = self.loaded.methods
        (result,) = batch.results(methods[self.method], batch.original_answers(methods))
        return result


def timed(asked, rounds, crop_below):
    """{way: (rounds, questions) seconds}."""
    ways = {"one answer": (asked.one_answer, None), "no gate": (asked.both, None), "gate": (asked.both, crop_below)}
    seconds = {name: [[] for _ in range(rounds)] for name in ways}
    for number in range(rounds):
        for place, group in enumerate(asked.groups):
            for name in list(ways)[:: -1 if place % 2 else 1]:
                ask, bound = ways[name]
                batches = asked.batches(group, bound)
                for _ in group[1]:
                    start = time.perf_counter()
                    ask(next(batches))
                    seconds[name][number].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llava_tiny")
    add("--method", default="rel_att")
    add("--crop_below", type=float, default=0.9)
    add("--rounds", type=int, default=9)
    add("--limit", type=int, help="only the first N questions of the demo")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    asked = Asked(args.model, args.method, args.limit)
    found = [asked.both(batch) for group in asked.groups for batch in asked.batches(group)]
    crops = np.array([wants_crop(result.confidence["original"], args.crop_below) for result in found])
    plain, every, gated = timed(asked, args.rounds, args.crop_below).values()
    whole = plain.sum(1)  # of each round
    extra = (every - plain)[:, crops].sum(1) / crops.mean()  # of maps and answers with crop, where the gate wants them
    told = {"u": every.sum(1) / whole, "u of those with a crop": 1 + extra / whole, "gate": gated.sum(1) / whole}
    told = {name: np.quantile(ratios, (0.5, 0.25, 0.75)) for name, ratios in told.items()}
    all_alike, own = (1 + crops.mean() * (middle - 1) for middle, *_ in list(told.values())[:2])
    print(f"{args.model}, {args.method}, {len(found)} questions, {args.rounds} rounds, gate at {args.crop_below}: s = "
          f"{crops.mean():.3f}, "
          + ", ".join(f"{name} {middle:.3f} ({low:.3f} to {high:.3f})" for name, (middle, low, high) in told.items())
          + f"; 1 + s (u - 1) = {all_alike:.3f}, with u of those with a crop {own:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
