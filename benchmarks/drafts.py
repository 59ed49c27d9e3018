"""What drafts and gates change: nothing in float32, and in bfloat16 as many answers as this says.

    python -m benchmarks.drafts [--model llava_tiny] [--method rel_att] [--batch_size 8] [--dtype bfloat16]
                                [--question_path FILE] [--limit N]

Each question of a dataset is answered with a crop: with the first answer as a draft, with no draft, with the very
answer that comes out as a draft, and with a wrong one. A gate of 1 must give the plain answers, one of 0 the first
ones.
"""

import argparse
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.vicrop import rejected
from vicrop.choices import MethodChoice, ModelChoice
from vicrop.crop import QuestionBatch
from vicrop.dataset import load_task
from vicrop.evaluation.batching import in_batches
from vicrop.files import ROOT
from vicrop.loaded import load_chosen
from vicrop.tables import DTYPES


def compared(loaded, method, batch, folder):
    """{what was tried: how many answers of a batch of records it changed}."""
    names = list(dict.fromkeys(record["image_path"] for record in batch))
    of = [names.index(record["image_path"]) for record in batch]
    questions = [record["question"] for record in batch]

    def asked(drafts=None, crop_below=None):
        """(first answers, answers with crop) on a session of its own."""
        session = loaded.session([folder / name for name in names])
        asking = QuestionBatch(session, questions, of, [None] * len(batch), batch, crop_below)
        first = asking.original_answers(loaded.methods)
        given = first if drafts is None else [a._replace(tokens=d) for a, d in zip(first, drafts, strict=True)]
        results = asking.results(loaded.methods[method], given)
        return first, [
            asking.with_crops.get((number, each.bboxes), given[number]) for number, each in enumerate(results)
        ]

    first, plain = asked([()] * len(batch))
    right = [answer.tokens for answer in plain]
    tried = {
        "draft": asked()[1],
        "draft accepted": asked(right)[1],
        "draft rejected": asked([rejected(tokens) for tokens in right])[1],
        "gate of 1": asked(crop_below=1.0)[1],
        "gate of 0": asked(crop_below=0.0)[1],
    }
    return {name: differing(answers, first if name == "gate of 0" else plain) for name, answers in tried.items()}


def differing(answers, wanted):
    """How many answers have another text than they should."""
    return sum(one.text != other.text for one, other in zip(answers, wanted, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llava_tiny")
    add("--method", default="rel_att")
    add("--batch_size", type=int, default=1)
    add("--dtype", choices=DTYPES, default="float32")
    add("--device")
    add("--question_path", type=Path, default=ROOT / "data/demo/data.json", help="its images lie beside it, in images/")
    add("--limit", type=int, help="only the first N questions")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    loaded = load_chosen(ModelChoice(args.model, dtype=args.dtype, device=args.device), MethodChoice((args.method,)))
    records = load_task(args.question_path)[: args.limit]
    batches = list(in_batches(records, lambda record: None, args.batch_size))
    found = Counter()
    for batch in tqdm(batches, unit="batch"):
        found.update(compared(loaded, args.method, batch, args.question_path.parent / "images"))
    told = ", ".join(f"{name} {100 * found[name] / len(records):.2f} %" for name in found)
    print(f"{args.model}, {args.method}, {args.dtype}, batch {args.batch_size}, {len(records)} questions; "
          f"answers that differ: {told}")  # fmt: skip


if __name__ == "__main__":
    main()
