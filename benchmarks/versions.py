"""This checkout against another one, question by question: two processes that take turns.

    git worktree add ../before COMMIT
    python -m benchmarks.versions ../before [--shape small tiny] [--method rel_att grad_att] [--pairs 15]

A pair is one question in each checkout, one right after the other, the order changing from pair to pair. Printed are
the median over the pairs of (this / other) in seconds, with quartiles, and the ratio of peak memory above the weights.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.shapes import GROUPS, SHAPES, TINY

HERE = Path(__file__).resolve().parent.parent
WORKER = """
import sys
from transformers.utils import logging
logging.disable_progress_bar()
from benchmarks.vicrop import WAYS, Trial, timed
trial = Trial({shape!r}, {method!r}, {device!r}, {tokens}, 1)
for _ in range(3):
    timed(trial, WAYS["ours"])
print("ready", flush=True)
for line in sys.stdin:
    print(timed(trial, WAYS["ours"]), flush=True)
"""


class Worker:
    """A process in a checkout that answers one question each time it is told to."""

    def __init__(self, checkout: Path, **what):
        code = WORKER.format(**what)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read_until_ready()

    def read_until_ready(self) -> None:
        for line in self.process.stdout:
            if line.strip() == "ready":
                return
        raise RuntimeError("a worker ended before it was ready")

    def seconds(self) -> float:
        """Seconds of one question."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def peak(checkout: Path, shape: str, method: str, device: str, tokens: int) -> int:
    """Bytes above the weights that a question needs at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vicrop", "--shape", shape, "--method", method, "--device", device,
               "--tokens", str(tokens), "--peak_of", "ours"]  # fmt: skip
    found = subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    return int(found.stdout.split()[-1])


def compare(other: Path, pairs: int, peaks: int, **what) -> str:
    """A row of the table."""
    ours, theirs = Worker(HERE, **what), Worker(other, **what)
    ratios = []
    for number in range(pairs):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        seconds = {first: first.seconds(), second: second.seconds()}
        ratios.append(seconds[ours] / seconds[theirs])
    for worker in (ours, theirs):
        worker.close()
    low, middle, high = statistics.quantiles(ratios, n=4)
    memory = [(peak(HERE, **what), peak(other, **what)) for _ in range(peaks)]
    own, its = (statistics.median(each) for each in zip(*memory, strict=True))
    row = [what["shape"], what["method"], f"{middle:.3f} ({low:.3f} to {high:.3f})"]
    row += [f"{own / its:.3f}", f"{own / 1e6:.0f} / {its / 1e6:.0f}"]
    return "| " + " | ".join(row) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("other", type=Path, help="the other checkout")
    add("--shape", nargs="+", choices=[*GROUPS, *TINY, *SHAPES], default=["small", "tiny"])
    add("--method", nargs="+", default=["rel_att", "grad_att"])
    add("--pairs", type=int, default=15)
    add("--peaks", type=int, default=3, help="measurements of peak memory in each checkout")
    add("--tokens", type=int, default=4, help="length of every answer")
    add("--device", default="cpu")
    args = parser.parse_args()
    print("| shape | method | seconds, this / other | peak memory, this / other | MB |\n|---|---|---|---|---|")
    for shape in [shape for name in args.shape for shape in GROUPS.get(name, [name])]:
        for method in args.method:
            what = {"shape": shape, "method": method, "device": args.device, "tokens": args.tokens}
            print(compare(args.other, args.pairs, args.peaks, **what), flush=True)


if __name__ == "__main__":
    main()
