"""The score table: every result file of a folder, without and with crop, overall and by group.

    python get_score.py --data_dir ./data/results --save_path ./

Writes evaluation_report.json and evaluation_report.csv. Needs no torch.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

from info import METHODS, MODELS, TASKS
from records import in_repository

GROUPS = ("size", "category")  # fields of a record by which scores are broken down, where records have them


# ----------------------------------------------------------------------------------------------------------- graders
def labels_of(record):
    if "labels" not in record:
        raise ValueError(f"record {record.get('id')!r} has no labels to score its answers by")
    labels = record["labels"]
    return labels if isinstance(labels, list) else [labels]


def exact(answer, record):
    """100 if the answer equals a label once both are lower-cased and stripped of outer spaces and a final period."""
    plain = lambda text: str(text).strip().lower().removesuffix(".").strip()  # noqa: E731
    return 100.0 * (plain(answer) in {plain(label) for label in labels_of(record)} and bool(plain(answer)))


GRADERS = {"exact": exact}


# ------------------------------------------------------------------------------------------------------------- table
def result_files(folder):
    """[(model, task, method, path)] of a folder; a file that is none of ours is an error, not silence."""
    found, strange = [], []
    for path in sorted(Path(folder).glob("*.json")):
        if path.name.endswith(".meta.json") or path.name.startswith((".", "evaluation_report")):
            continue
        parts = path.stem.rsplit("-", 2)
        if len(parts) == 3 and parts[0] in MODELS and parts[1] in TASKS and parts[2] in METHODS:
            found.append((*parts, path))
        else:
            strange.append(path.name)
    if strange:
        raise ValueError(f"{', '.join(strange)} in {folder}: not named MODEL-TASK-METHOD.json with names of info.py")
    if not found:
        unfinished = [parts.stem for parts in sorted(Path(folder).glob("*.parts"))]
        begun = f" (begun, not finished: {', '.join(unfinished)})" if unfinished else ""
        raise ValueError(f"no result files in {folder}{begun}: run `bash run_all.sh` or run.py first")
    order = {name: place for place, name in enumerate([*TASKS, *MODELS, *METHODS])}
    return sorted(found, key=lambda file: [order[name] for name in (file[1], file[0], file[2])])


def mean_and_margin(values):
    """Mean and half-width of its 95 % confidence interval (normal approximation), in the unit of the values."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def rows_of(model, task, method, path):
    """One row for all records of a file and one for each value of a group."""
    records = json.loads(path.read_text())
    grade = GRADERS.get(TASKS[task]["grader"])
    parts = {"all": records}
    for group in GROUPS:
        for record in records:
            if group in record:
                parts.setdefault(str(record[group]), []).append(record)
    rows = []
    for part, members in parts.items():
        row = {"task": task, "model": model, "method": method, "part": part, "records": len(members),
               "errors": sum("error" in record for record in members)}  # fmt: skip
        if grade and members:
            before = [grade(record["original_answer"], record) for record in members]
            after = [grade(record["crop_answer"], record) for record in members]
            row["without_crop"], row["without_crop_margin"] = mean_and_margin(before)
            row["with_crop"], row["with_crop_margin"] = mean_and_margin(after)
            row["gain"], row["gain_margin"] = mean_and_margin([b - a for a, b in zip(before, after, strict=True)])
        rows.append(row)
    return rows


def show(rows):
    columns = ("task", "model", "method", "part", "records", "errors")
    scores = ("without_crop", "with_crop", "gain")
    cells = [[*columns, *(score.replace("_", " ") for score in scores)]]
    for row in rows:
        graded = "without_crop" in row
        numbers = [
            f"{row[s]:{'+' if s == 'gain' else ''}.1f} ± {row[s + '_margin']:.1f}" if graded else "no grader"
            for s in scores
        ]
        cells.append([str(row[column]) for column in columns] + numbers)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    print("Scores in %, ± half of the 95 % confidence interval; records that ended in an error count as wrong.")


def report(data_dir, save_path):
    rows = [row for found in result_files(data_dir) for row in rows_of(*found)]
    folder = Path(save_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_report.json").write_text(json.dumps(rows, indent=1) + "\n")
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with (folder / "evaluation_report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="./data/results", help="folder of the result files")
    parser.add_argument("--save_path", default="./", help="folder for the report")
    args = parser.parse_args()
    try:
        folder = in_repository(args.data_dir)
        show(report(folder, args.save_path))
        for parts in sorted(folder.glob("*.parts")):
            scored = "scored above as far as it was merged" if parts.with_suffix(".json").exists() else "not scored"
            print(f"{parts.stem} is not finished, and {scored}: the same command again goes on with it")
    except (ValueError, OSError) as error:
        sys.exit(f"get_score.py: {error}")


if __name__ == "__main__":
    main()
