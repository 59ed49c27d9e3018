"""How long the score table takes for many records: python -m benchmarks.scores [--records 200000]"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from vicrop.evaluation import score_table as get_score

WORDS = [
    "red",
    "blue",
    "two",
    "three",
    "the",
    "a",
    "dog's",
    "cat,",
    "1,000",
    "dont",
    "yes",
    "no",
    "left",
    "right",
    "coca-cola",
    "St.",
    "5",
    "pm",
]


def result(number, rng):
    """A result record of VQAv2 with ten labels of a few words."""
    phrases = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(4)]
    return {
        "id": str(number), "question": "what is it?", "image_path": f"{number // 5}.jpg",
        "labels": rng.choices(phrases, k=10),
        "original_answer": rng.choice(phrases), "crop_answer": rng.choice(phrases), "bbox": [0, 0, 336, 336],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    count, rng = parser.parse_args().records, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llava-vqav2-rel_att.json"
        path.write_text(json.dumps([result(number, rng) for number in range(count)]))
        began = time.perf_counter()
        rows = get_score.report(folder, folder, get_score.parse([]))
        seconds = time.perf_counter() - began
    print(
        f"{count} records, {path.stem}: {len(rows)} rows in {seconds:.1f} s, with 10,000 rounds of the bootstrap each"
    )


if __name__ == "__main__":
    main()
