"""The score table: every result file of a folder, without and with crop, in the paper's metric and the official one.

    python get_score.py --data_dir ./data/results --save_path ./ [--metric paper] [--by size] [--per_sample FILE]

Writes evaluation_report.json, .csv and .md. Needs no torch.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from dataset import box_of, field_of, image_of, load_task, refuse_bad_ids, with_ids
from files import ROOT, in_repository, read_json, read_meta
from graders import DETAILS, outcome, score
from images import size_as_seen
from info import METHODS, MODELS, SIZES, TASKS

GROUPS = ("size", "category")  # fields by which scores are broken down, where records have them
REFERENCE_METHODS = ("grad", "grad_high")  # further names that the published code gives its methods
KNOWN_METHODS = (*METHODS, *REFERENCE_METHODS)
SHOWN = 10  # of the records of a file that cannot be scored


# --------------------------------------------------------------------------------------------------------------- files
def name_of(path):
    """(model, task, method) of a result file, by its name; the model may be anyone's.

    Raises:
        ValueError: it is not named as a result is.
    """
    parts = path.stem.rsplit("-", 2)
    if len(parts) != 3:
        raise ValueError(f"{path.name} in {path.parent} is not named MODEL-TASK-METHOD.json")
    for name, table, what in ((parts[1], TASKS, "task"), (parts[2], KNOWN_METHODS, "method")):
        if name not in table:
            raise ValueError(f"{path.name} in {path.parent}: unknown {what} {name!r}, known are {', '.join(table)}")
    return tuple(parts)


def result_files(folder):
    """([(model, task, method, path, records)] of a folder in the order of the tables, [why others are left out]).

    Raises:
        ValueError: there is nothing at all, not even begun.
    """
    found, said = [], []
    paths = [path for path in sorted(Path(folder).glob("*.json")) if not path.name.endswith(".meta.json")]
    for path in paths:
        if not path.name.startswith((".", "evaluation_report")):
            try:
                found.append((*name_of(path), path, read_results(path)))
            except (ValueError, OSError) as error:
                said.append(f"{error}: it is left out")
    if not found and not said and not list(Path(folder).glob("*.parts")):
        raise ValueError(f"no result files in {folder}: run `bash run_all.sh` or run.py first")
    return sorted(found, key=lambda file: [place_in_table(name) for name in (file[1], file[0], file[2])]), said


def place_in_table(name):
    """What sorts tasks, models and methods as info.py lists them, others behind by name."""
    return place_among([*TASKS, *MODELS, *KNOWN_METHODS], name), name


def place_among(names, name):
    """The number of a name in a list, that after the last for one that is not in it."""
    return names.index(name) if name in names else len(names)


def read_results(path):
    """The records of a result file; those without an id are named and left out.

    Raises:
        ValueError: no complete JSON list of records, none that has an id, or an id that comes twice.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}, not a list of records")
    records, nameless = with_ids(records)
    refuse_bad_ids(records, path)
    if nameless and not records:
        raise ValueError(f"{path}: {nameless[0]}")
    for sentence in nameless:
        say(f"{path}: {sentence}: it is left out")
    return records


def about_of(path):
    """What a result's .meta.json says of how it was made; empty without one, or (said) where it cannot be read."""
    try:
        return read_meta(path.with_suffix(".meta.json"))
    except (ValueError, OSError) as error:
        say(f"{error}: {path.name} is taken without it")
        return {}


def say(sentence: str) -> None:
    """What has to be said of a file or record that is left out, beside the table."""
    print(sentence, file=sys.stderr)


def images_of(about, task):
    """The folder of the images that a result is about."""
    return ROOT / about.get("settings", {}).get("image_path", TASKS[task]["image_path"])


def missing_from(records, task, about):
    """How many records of the dataset a result does not have; None where that cannot be told.

    Args:
        about: what the result's meta file holds, which knows the dataset that was asked about; may be empty.
    """
    if "dataset" in about.get("counts", {}):
        return about["counts"]["dataset"] - len(records)
    path, ids = in_repository(TASKS[task]["question_path"]), {record["id"] for record in records}
    try:
        known = {record["id"] for record in load_task(path)} if path.is_file() else set()
    except (ValueError, OSError) as error:
        say(f"{error}: how many of its records are missing cannot be told")
        return None
    return len(known - ids) if ids <= known else None


def size_of(record, image_folder):
    """small, medium or large by the part of the image that gt_bbox covers; None without gt_bbox or image."""
    if "size" in record or not record.get("gt_bbox"):
        return record.get("size")
    try:
        size = field_of(record, "image_size") or size_as_seen(image_of(record, image_folder))
        x1, y1, x2, y2 = box_of(record, image_size=size)
    except (ValueError, OSError):  # no image or no box in it: the run, or gt_crop, which needs one, has said so
        return None
    part = (x2 - x1) * (y2 - y1) / (size[0] * size[1])
    return next(name for name, limit in SIZES.items() if part < limit)


def place_of(size):
    """Where a size stands among others: from small to large, then those that are not ours."""
    return place_among(list(SIZES), size)


# ---------------------------------------------------------------------------------------------------------- statistics
def bootstrap_interval(differences, clusters, rounds, seed):
    """95 % percentile interval of a mean: whole clusters (images) are drawn, with replacement.

    Clusters with the same sum and number of differences are interchangeable, so that their kinds are drawn, by a
    multinomial: the same distribution, in a fraction of the time.

    Args:
        differences: (n,) array; clusters: n hashable names.
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums, counts = np.bincount(cluster, differences), np.bincount(cluster)
    kinds, number = np.unique(np.stack([sums.round(9), counts], 1), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(sums), number / len(sums), size=rounds)  # (rounds, kinds)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    return tuple(float(bound) for bound in np.percentile(means, (2.5, 97.5)))


def mcnemar(fixed, broken):
    """Two-sided exact p of McNemar's test: are answers fixed and broken equally often?"""
    return float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


# --------------------------------------------------------------------------------------------------------------- table
def row_of(scored, grader, rounds, seed):
    """The figures of some records in one metric, given [(record, both scores, None, or why it has none)]."""
    graded = [(record, pair) for record, pair in scored if isinstance(pair, tuple)]
    row = {"n": len(graded), "errors": sum("error" in record for record, _ in scored)}
    unscored = sum(isinstance(pair, str) for _, pair in scored)
    row |= {"unscored": unscored} if unscored else {}
    if not graded:
        return row
    before, after = np.array([pair for _, pair in graded]).T
    difference = after - before
    clusters = [str(r.get("image_path", r["id"])) for r, _ in graded]
    low, high = bootstrap_interval(difference, clusters, rounds, seed)
    outcomes = Counter(outcome(pair) for _, pair in graded)
    row |= {"without_crop": before.mean(), "with_crop": after.mean(), "difference": difference.mean(), "low": low,
            "high": high, "fixed": outcomes["fixed"], "broken": outcomes["broken"]}  # fmt: skip
    if np.isin([before, after], [0, 100]).all():
        row["mcnemar_p"] = mcnemar(row["fixed"], row["broken"])
    for when, field in (("without crop", "original_answer"), ("with crop", "crop_answer")):
        if grader in DETAILS:
            answers = [record.get(field, "") for record, _ in graded]  # of an error it is not read
            details = DETAILS[grader](answers, [record for record, _ in graded])
            row |= {f"{name}, {when}": value for name, value in details.items()}
    return row


def rows_of(model, task, method, path, records, options):
    """One row per metric for all records, and for each value of each group; says which records cannot be scored."""
    about = about_of(path)
    images, missing = images_of(about, task), missing_from(records, task, about)
    metrics = {name: grader for name, grader in TASKS[task]["metrics"].items() if wanted(name, options.metric)}
    parts = {("all", "all"): list(range(len(records)))}  # numbers of records
    for group in options.by:
        members = {}
        for number, record in enumerate(records):
            value = size_of(record, images) if group == "size" else record.get(group)
            if value is not None:
                members.setdefault(str(value), []).append(number)
        for name in sorted(members, key=place_of) if group == "size" else members:
            parts[group, name] = members[name]
    rows, unscored = [], {}
    for metric, grader in metrics.items():
        scored = [(record, pair_or_reason(record, grader)) for record in records]
        unscored |= {record["id"]: reason for record, reason in scored if isinstance(reason, str)}
        for (_, part), members in parts.items():
            row = {"task": task, "model": model, "method": method, "metric": metric, "part": part}
            row |= row_of([scored[number] for number in members], grader, options.bootstrap, options.seed)
            if part == "all" and missing is not None:
                row["missing"] = missing
            rows.append(row)
    say_some(path, [f"{reason}: it cannot be scored, and is left out" for reason in unscored.values()])
    if "size" in options.by:
        say_some(path, [f"{reason}: it has no size" for reason in map(why_no_box, records) if reason])
    return rows


def why_no_box(record: dict) -> str | None:
    """Why a record's gt_bbox is none that can lie in its image; None if it has one, or none at all."""
    try:
        return box_of(record) and None if record.get("gt_bbox") and "size" not in record else None
    except ValueError as error:
        return str(error)


def say_some(path: Path, sentences: list[str]) -> None:
    """`say` what there is to say of a file's records, or of the first ones."""
    for sentence in sentences[:SHOWN]:
        say(f"{path}: {sentence}")
    if len(sentences) > SHOWN:
        say(f"{path}: and {len(sentences) - SHOWN} more")


def pair_or_reason(record: dict, grader: str) -> tuple[float, float] | str | None:
    """Both scores of a record, None where the benchmark does not count it, or a sentence on why it has none."""
    try:
        return score(record, grader)
    except ValueError as error:
        return str(error)


def wanted(metric, chosen):
    """Is a metric one of those asked for? Those that are neither the paper's nor official always are."""
    return chosen == "both" or metric.startswith(chosen) or not metric.startswith(("paper", "official"))


def per_sample(model, task, method, path, records, options):
    """One line per record and metric: both scores."""
    for metric, grader in TASKS[task]["metrics"].items():
        for record in records if wanted(metric, options.metric) else ():
            if isinstance(pair := pair_or_reason(record, grader), tuple):
                yield {"id": record["id"], "model": model, "task": task, "method": method, "metric": metric,
                       "original": pair[0], "crop": pair[1]}  # fmt: skip


COLUMNS = ("task", "model", "method", "metric", "part", "n", "missing", "errors", "without crop", "with crop",
           "difference", "95 % interval", "p", "fixed", "broken")  # fmt: skip


def cells(row):
    """The cells of a row of the table."""
    shown = {name: row.get(name, "") for name in COLUMNS}
    if "difference" in row:
        shown |= {"without crop": f"{row['without_crop']:.2f}", "with crop": f"{row['with_crop']:.2f}",
                  "difference": f"{row['difference']:+.2f}",
                  "95 % interval": f"{row['low']:+.2f} to {row['high']:+.2f}"}  # fmt: skip
    if "mcnemar_p" in row:
        shown["p"] = f"{row['mcnemar_p']:.2g}"
    return [str(shown[name]) for name in COLUMNS]


def print_aligned(lines, left):
    """Print lines of texts in columns, the first `left` of them flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        words = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(words).rstrip())


def details_of(rows):
    """A line of each row that has more figures than the table's, or records that are not in its n."""
    for row in rows:
        about = f"{row['task']} {row['model']} {row['method']} {row['metric']} {row['part']}"
        if "unscored" in row:
            yield f"{about}: {row['unscored']} records cannot be scored and are not in n"
        details = [f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                   for name, value in row.items() if "," in name]  # fmt: skip
        if details:
            yield f"{about}: {'; '.join(details)}"


def show(rows):
    print_aligned([COLUMNS, *map(cells, rows)], left=5)
    print("".join(f"{line}\n" for line in details_of(rows)), end="")
    print("Scores in %; intervals by bootstrap over images; p: McNemar's exact test. A record with an error is wrong.")


def report(data_dir, save_path, options):
    """Rows of all files of a folder, also written to evaluation_report.json, .csv and .md in `save_path`.

    Files and records that cannot be scored are named, and the others are.
    Raises:
        ValueError: nothing at all can be scored.
    """
    files, left_out = result_files(data_dir)
    if not files and not left_out:  # all is only begun: an earlier report stays
        return []
    for sentence in left_out:
        say(sentence)
    rows = [row for found in files for row in rows_of(*found, options)]
    if not any(row["n"] or "unscored" not in row for row in rows):
        reasons = [f"{path}: {why_not(task, records)}" for _, task, _, path, records in files]
        raise ValueError(f"nothing in {data_dir} can be scored: {[*left_out, *reasons][0]}")
    folder = Path(save_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_report.json").write_text(json.dumps(rows, indent=1, default=float) + "\n")
    with (folder / "evaluation_report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(field for row in rows for field in row)))
        writer.writeheader()
        writer.writerows(rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    text = [f"| {' | '.join(line)} |\n" for line in lines] + [f"\n{line}\n" for line in details_of(rows)]
    (folder / "evaluation_report.md").write_text("".join(text))
    if options.per_sample:
        with Path(options.per_sample).open("w") as file:
            for found in files:
                file.writelines(json.dumps(line) + "\n" for line in per_sample(*found, options))
    return rows


def why_not(task: str, records: list[dict]) -> str | None:
    """The first reason why a record cannot be scored; None if all can be."""
    found = (pair_or_reason(record, grader) for grader in TASKS[task]["metrics"].values() for record in records)
    return next((reason for reason in found if isinstance(reason, str)), None)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", default="./data/results", help="folder of the result files")
    add("--save_path", default="./", help="folder for the report")
    add("--metric", choices=("paper", "official", "both"), default="both")
    add("--by", choices=(*GROUPS, "nothing"), help="break down by this only; default: by all that records have")
    add("--bootstrap", type=int, default=10_000, help="rounds of the bootstrap")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--per_sample", help="file for the scores of each record, as JSON lines")
    options = parser.parse_args(argv)
    options.by = {None: GROUPS, "nothing": ()}.get(options.by, (options.by,))
    if options.bootstrap < 1:
        parser.error(f"--bootstrap {options.bootstrap} is not at least 1")
    return options


def main(argv=None):
    options = parse(argv)
    folder = in_repository(options.data_dir)
    try:
        rows = report(folder, options.save_path, options)
    except (ValueError, OSError) as error:
        sys.exit(f"get_score.py: {error}")
    if rows:
        show(rows)
    for parts in sorted(folder.glob("*.parts")):
        scored = "scored above as far as it was merged" if parts.with_suffix(".json").exists() else "not scored"
        print(f"{parts.stem} is not finished, and {scored}: the same command again goes on with it")


if __name__ == "__main__":
    main()
