"""The general prompt in the question's pass, against a pass of its own that ends at the layer that is read.

    python -m benchmarks.general_prompt [--shape llava-small] [--rounds 24]

Prefills alone, of images encoded beforehand. Every second round takes the two ways in the opposite order; median and
quartiles of their ratio.
"""

import argparse
import statistics
import time

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.shapes import GROUPS, QUESTIONS
from benchmarks.vicrop import Trial
from vicrop.tables import GENERAL_PROMPT


def rows_of(session):
    """The rows of a question and of the general prompt."""
    prompts = [session.adapter.prompt(text) for text in (QUESTIONS[0], GENERAL_PROMPT)]
    return [session.row(query) for query in session.queries(prompts, [0, 0])]


def apart(session, rows, layers):
    session.prefill(rows[:1], layers)
    session.prefill(rows[1:], layers, only_rows=True)


def together(session, rows, layers):
    session.prefill(rows, layers)


def seconds(trial, way):
    session = trial.session(trial.images)
    with torch.no_grad(), session.frozen.frozen_eval():
        rows = rows_of(session)
        start = time.perf_counter()
        way(session, rows, sorted(trial.layers))
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=["small", *GROUPS["small"]])
    parser.add_argument("--rounds", type=int, default=24)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    for shape in GROUPS["small"] if args.shape == "small" else [args.shape]:
        trial = Trial(shape, "rel_att", "cpu", 4, 1)
        seconds(trial, apart), seconds(trial, together)  # the first ones warm up
        ratios = []
        for number in range(args.rounds):
            pair = (apart, together)[:: -1 if number % 2 else 1]
            took = {way: seconds(trial, way) for way in pair}
            ratios.append(took[together] / took[apart])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{shape}, {args.rounds} pairs: together / apart {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
