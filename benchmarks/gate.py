"""What a gate costs: the questions of a dataset with one answer, with a crop each, and with crops where unsure.

    python -m benchmarks.gate [--model llava_tiny] [--method rel_att] [--crop_below 0.9] [--rounds 9] [--limit N]

As a run does it: the questions about an image share its session, and are asked one by one. A round takes the images in
turn, each in all three ways one after the other, every second one in the opposite order. The gate would cost nothing
itself if its time, in units of one plain answer, were 1 + s (u - 1): s is the share of questions with a crop, and u the
time of an answer, a map and an answer with crop in the same unit.
"""

import argparse
import statistics
import time
from itertools import groupby

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
        """A QuestionBatch for each question of a group, on one fresh session."""
        image, questions = group
        session = self.loaded.session([image])
        return [QuestionBatch(session, [question], crop_below=crop_below) for question in questions]

    def one_answer(self, group):
        """The questions of a group, each answered once."""
        return [batch.original_answers({}) for batch in self.batches(group)]

    def both(self, group, crop_below=None):
        """The questions of a group, answered with a map and a crop where they are wanted; as CropResults."""
        methods = self.loaded.methods
        return [batch.results(methods[self.method], batch.original_answers(methods))
                for batch in self.batches(group, crop_below)]  # fmt: skip


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
    ways = {"one answer": asked.one_answer, "no gate": asked.both,
            "gate": lambda group: asked.both(group, args.crop_below)}  # fmt: skip
    found = [result for group in asked.groups for (result,) in asked.both(group)]
    share = statistics.mean(wants_crop(result.confidence["original"], args.crop_below) for result in found)
    rounds = []
    for _ in range(args.rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for number, group in enumerate(asked.groups):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                start = time.perf_counter()
                ways[name](group)
                seconds[name] += time.perf_counter() - start
        rounds.append(seconds)
    plain, every, gated = (statistics.median(each[name] / each["one answer"] for each in rounds) for name in ways)
    low, _, high = statistics.quantiles([each["gate"] / each["one answer"] for each in rounds], n=4)
    print(f"{args.model}, {args.method}, {len(found)} questions, {args.rounds} rounds: u = {every / plain:.2f}, "
          f"s = {share:.3f}, gate at {args.crop_below} {gated:.3f} ({low:.3f} to {high:.3f}), "
          f"1 + s (u - 1) = {1 + share * (every - 1):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
