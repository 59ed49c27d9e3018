"""How much an embedded model gets right of a fresh set of streets, by kind and size, without and with crops.

    python -m tiny.evaluate llava_tiny --seed 7 --per_kind 500 --out DIR
    python -m tiny.evaluate llava_tiny --model_id FOLDER --question_path data/demo/data.json --out DIR

Prints a table for no crop and for each method, and writes it as OUT/scores.json. The answers are those of run.py, whose
result files lie in OUT, too: killed, the same command goes on.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from tiny.questions import KINDS
from tiny.sets import ABSENT, kinds_of, write_set
from vicrop.evaluation.command import main as run_main
from vicrop.evaluation.ensembles import NO_CROP
from vicrop.evaluation.metrics import exact
from vicrop.tables import SIZES

METHODS = "gt_crop,rel_att"
Table = dict[str, dict[str, tuple[float, int]]]  # method -> "kind size" -> (% right, questions)


def answers_of(model: str, methods: str, questions: Path, out: Path, options: Sequence[str]) -> dict[str, list[dict]]:
    """{method: records with answers} of run.py."""
    run_main([
        "--model", model, "--method", methods, "--task", "demo", "--question_path", str(questions),
        "--image_path", str(questions.parent / "images"), "--save_path", str(out), *options,
    ])  # fmt: skip
    paths = {method: out / f"{model}-demo-{method}.json" for method in methods.split(",")}
    return {method: json.loads(path.read_text()) for method, path in paths.items()}


def table_of(answers: dict[str, list[dict]]) -> Table:
    """Right answers of each method, and without crop, of each kind and size (and of all sizes of a kind)."""
    table = {}
    for method, records in answers.items():
        columns = {method: "crop_answer"} | ({} if NO_CROP in table else {NO_CROP: "original_answer"})
        for name, answer in columns.items():
            hits = defaultdict(list)
            for record in records:
                kind, size = record.get("category", "reading"), record.get("size", "all")
                for part in {f"{kind} {size}", f"{kind} all"}:
                    hits[part].append("error" not in record and exact(record[answer], record))
            table[name] = {part: (sum(found) / len(found), len(found)) for part, found in hits.items()}
    return table


def printed(table: Table) -> str:
    """The table as text: a line per kind and size, a column per method."""
    methods = sorted(table, key=lambda name: name != NO_CROP)
    lines = [f"{'':28}{'n':>6}" + "".join(f"{name:>12}" for name in methods)]
    for kind in KINDS:
        for size in (*SIZES, ABSENT, "all"):
            part = f"{kind} {size}"
            if part in table[methods[0]]:
                number = table[methods[0]][part][1]
                lines.append(f"{part:28}{number:6}" + "".join(f"{table[name][part][0]:12.1f}" for name in methods))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of info.MODELS, as llava_tiny")
    parser.add_argument("--model_id", help="another checkpoint of that family")
    parser.add_argument("--methods", default=METHODS, help="methods of run.py, with commas")
    parser.add_argument("--seed", type=int, default=7, help="of the set; any is disjoint from the training scenes")
    parser.add_argument("--per_kind", type=int, default=500, help="questions of each kind")
    parser.add_argument("--kinds", type=kinds_of, default=tuple(KINDS), help="which kinds, with commas")
    parser.add_argument("--question_path", type=Path, help="a set that is there already, in place of a fresh one")
    parser.add_argument("--limit", type=int, help="ask only so many questions")
    parser.add_argument("--out", type=Path, required=True, help="folder for the set and the results")
    args = parser.parse_args()
    name = "-".join(map(str, ["set", args.seed, args.per_kind, *(args.kinds if set(args.kinds) < set(KINDS) else ())]))
    questions = args.question_path or args.out / name / "data.json"
    if not questions.exists():
        write_set(questions.parent, args.seed, args.per_kind, args.kinds)
    options = ["--model_id", args.model_id] if args.model_id else []
    options += ["--limit", str(args.limit)] if args.limit else []
    table = table_of(answers_of(args.model, args.methods, questions, args.out, options))
    (args.out / "scores.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{args.model}, {questions}, {torch.get_num_threads()} threads\n{printed(table)}")


if __name__ == "__main__":
    main()
