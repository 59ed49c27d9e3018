"""The score table: every result file of a folder, without and with crop, in the paper's metric and the official one.

    vicrop score --data_dir ./data/results [--save_path ./] [--metric paper] [--by size] [--per_sample FILE]
    vicrop score --data_dir ./data/results --gate            # had only answers been cropped that are less sure than P
    vicrop score A.json B.json                               # one result against another, question by question
    vicrop score --ensemble A.json B.json C.json             # several results as one

The first writes evaluation_report.json, .csv and .md, beside the results if nothing else is said. Needs no torch.
"""

import csv
import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vicrop.command_line import CommandParser
from vicrop.evaluation import ensembles, gates
from vicrop.evaluation.columns import COLUMNS, cells, details_of, print_aligned, show
from vicrop.evaluation.confidence import has_confidence
from vicrop.evaluation.ensembles import ensemble_cells, ensemble_rows
from vicrop.evaluation.gates import gate_cells, gate_lines, gate_rows
from vicrop.evaluation.paired import compared, comparison_lines, read_all
from vicrop.evaluation.result_files import ResultFile, result_files, say
from vicrop.evaluation.scores import GROUPS, ScoreOptions, per_sample, rows_of, why_not
from vicrop.files import in_repository

# ------------------------------------------------------------------------------------------------------------ in files
TABLES = ("evaluation_report.json", "evaluation_report.csv", "evaluation_report.md")


def write_tables(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the files TABLES into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv, as_text = (folder / name for name in TABLES)
    as_json.write_text(json.dumps(rows, indent=1, default=float) + "\n")
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(field for row in rows for field in row)))
        writer.writeheader()
        writer.writerows(rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    text = [f"| {' | '.join(line)} |\n" for line in lines] + [f"\n{line}\n" for line in details_of(rows)]
    as_text.write_text("".join(text))


def report(
    data_dir: str | Path, save_path: str | Path, options: ScoreOptions, samples_path: str | None = None
) -> list[dict[str, Any]]:
    """The rows of all results of a folder; `write_tables` also writes them into the folder `save_path`.

    Files and records that cannot be scored are named and left out.

    Args:
        samples_path: a file to write the scores of each record to, as JSON lines.
    Raises:
        ValueError: no record at all can be scored, unless that is because there are no labels.
    """
    files, left_out = result_files(data_dir)
    if not files and not left_out:  # there are only unfinished runs: an earlier report stays
        return []
    for sentence in left_out:
        say(sentence)
    rows, files = rows_of_all(files, options, left_out)
    unlabelled = any(file.is_unlabelled(record, grader) for file in files for record in file.records
                     for grader in options.metrics_of(file).values())  # fmt: skip
    if not unlabelled and not any(row["n"] or "unscored" not in row for row in rows):
        reasons = [f"{file.path}: {why_not(file, options)}" for file in files]
        raise ValueError(f"nothing in {data_dir} can be scored: {[*left_out, *reasons][0]}")
    without = [file.path.name for file in files if not has_confidence(file.records)]
    if without:
        say(f"no column surer for what does not tell how sure the model was: {', '.join(without)}")
    write_tables(rows, Path(save_path))
    if samples_path:
        with Path(samples_path).open("w") as lines:
            for file in files:
                lines.writelines(json.dumps(line) + "\n" for line in per_sample(file, options))
    return rows


def rows_of_all(
    files: Sequence[ResultFile], options: ScoreOptions, left_out: list[str]
) -> tuple[list[dict[str, Any]], list[ResultFile]]:
    """(the rows of some results, those of them that can be scored); why others cannot is printed, and in `left_out`."""
    rows, fine = [], []
    for file in files:
        try:
            rows += rows_of(file, options)
            fine.append(file)
        except ValueError as error:  # a metric of one's own that is gone
            left_out.append(f"{error}: it is left out")
            say(left_out[-1])
    return rows, fine


# -------------------------------------------------------------------------------------------------------- command line
def parser_of_scores(prog: str) -> CommandParser:
    """The parser of get_score.py."""
    parser = CommandParser(prog, __doc__)
    add = parser.add_argument
    add("compare", nargs="*", metavar="FILE", help="two result files, to be compared question by question")
    add(
        "--ensemble",
        nargs="+",
        metavar="FILE",
        help="result files of one task, whose answers are combined; default: none are",
    )
    add("--gate", action="store_true", help="score and share of crops if only unsure first answers had been cropped")
    add("--data_dir", default="./data/results", help="folder of the result files")
    add("--save_path", help="folder for the table; default: beside the results, in --data_dir")
    add("--metric", default="both", help="of benchmarks the paper's metric, their official one, or both; or others in "
        "place of all, comma-separated: names as in docs/scores.md, or FILE.py:function")  # fmt: skip
    add("--by", type=groups_named, help=f"break scores down by this field only, one of {', '.join(GROUPS)}; "
        "category,size: by each combination; nothing: not at all; default: by each that exists, with --gate by none",
        )  # fmt: skip
    add("--bootstrap", type=int, default=10_000, help="rounds of the bootstrap behind the intervals")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--per_sample", help="file for the scores of each record, as JSON lines; default: none is written")
    return parser


def groups_named(text: str) -> tuple[str, ...]:
    """What --by names: one of GROUPS, several of them with commas for their combinations, or "nothing".

    Raises:
        argparse.ArgumentTypeError: one of them is none of GROUPS, or occurs twice.
    """
    names = text.split(",")
    if text == "nothing":
        return ()
    if not set(names) <= set(GROUPS) or len(set(names)) < len(names):
        raise ArgumentTypeError(f"must be some of {', '.join(GROUPS)}, with commas, or nothing; got {text}")
    return (text,)


def main(argv: Sequence[str] | None = None, prog: str = "get_score.py") -> None:
    """The command; `prog` is what it is called."""
    parser = parser_of_scores(prog)
    given = parser.parse_args(argv)
    if given.bootstrap < 1:
        parser.error(f"--bootstrap must be at least 1, not {given.bootstrap}")
    groups = GROUPS if given.by is None else given.by
    folder = in_repository(given.data_dir)
    try:
        options = ScoreOptions(given.metric, groups, given.bootstrap, given.seed)
    except ValueError as error:
        parser.error(str(error))
    if len(given.compare) not in (0, 2):
        parser.error(f"two result files are compared, not {len(given.compare)}")
    if (len(given.compare) > 0) + (given.ensemble is not None) + given.gate > 1:
        parser.error("FILE FILE, --ensemble and --gate are asked for one at a time")
    try:
        if given.compare:
            show_comparison(given.compare, options)
        elif given.ensemble:
            show_ensemble(given.ensemble, options)
        elif given.gate:
            show_gates(folder, options if given.by is not None else replace(options, by=()))
        else:
            show_report(folder, Path(given.save_path or folder), options, given.per_sample)
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")


def show_comparison(paths: Sequence[str], options: ScoreOptions) -> None:
    """Print two results against each other."""
    files = read_all(paths)
    print("\n".join(comparison_lines(files, compared(files[0], files[1], options))))


def show_ensemble(paths: Sequence[str], options: ScoreOptions) -> None:
    """Print several results, and what they give together."""
    rows = ensemble_rows(read_all(paths), options)
    print_aligned([ensembles.COLUMNS, *map(ensemble_cells, rows)], ensembles.LEFT)
    if rows[0]["left_out"]:
        print(f"{rows[0]['left_out']} records are not in all files, or cannot be scored, and are left out")


def show_gates(folder: Path, options: ScoreOptions) -> None:
    """Print what gates would have given, for each result of a folder that tells it.

    Raises:
        ValueError: none does.
    """
    files, reasons = result_files(folder)
    rows = []
    for file in files:
        try:
            rows += gate_rows(file, options)
        except ValueError as error:
            reasons.append(str(error))
    if not rows:
        raise ValueError(reasons[0] if reasons else f"nothing in {folder} can be scored")
    for sentence in reasons:
        say(sentence)
    print_aligned([gates.COLUMNS, *map(gate_cells, rows)], gates.LEFT)
    print("\n".join(gate_lines(rows)))


def show_report(folder: Path, save_path: Path, options: ScoreOptions, samples_path: str | None) -> None:
    """Write and print the score table; say which files that are, and what is not finished."""
    rows = report(folder, save_path, options, samples_path)
    if rows:
        show(rows)
        written = [str(save_path / name) for name in TABLES] + ([samples_path] if samples_path else [])
        print(f"written: {', '.join(written)}")
    for parts in sorted(folder.glob("*.parts")):
        scored = "only its merged records are scored" if parts.with_suffix(".json").exists() else "it is not scored"
        print(f"{parts.stem} is not finished, and {scored}: run the same command again to go on with it")


if __name__ == "__main__":
    main()
