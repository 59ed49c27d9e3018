"""The figures of the score table: a row for each metric, all records and each group of them. Needs no torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.dataset import box_of
from vicrop.evaluation.confidence import has_confidence, sureness, surer
from vicrop.evaluation.metrics import DETAILS, Scores, outcome, score
from vicrop.evaluation.result_files import ResultFile, place_of_size, say, size_of
from vicrop.evaluation.statistics import bootstrap_interval, mcnemar
from vicrop.tables import TASKS

GROUPS = ("size", "category")  # fields by which scores are broken down, where records have them
SHOWN = 10  # so many records of a file that cannot be scored are named


@dataclass(frozen=True)
class ScoreOptions:
    """What the score table shows.

    Attributes:
        metric: paper, official or both.
        by: the GROUPS that get rows of their own.
        bootstrap, seed: rounds of the bootstrap behind the intervals, and its seed.
    """

    metric: str = "both"
    by: tuple[str, ...] = GROUPS
    bootstrap: int = 10_000
    seed: int = 0

    def metrics_of(self, task: str) -> dict[str, str]:
        """{metric: grader} of a task; metrics that are neither the paper's nor official are always among them."""
        return {
            metric: grader
            for metric, grader in TASKS[task]["metrics"].items()
            if self.metric == "both" or metric.startswith(self.metric) or not metric.startswith(("paper", "official"))
        }


Scored = Scores | str | None  # both scores; a sentence on why there are none; None if the record does not count


def pair_or_reason(record: dict, grader: str) -> Scored:
    """Both scores of a record, None if the benchmark does not count it, or a sentence on why it has none."""
    try:
        return score(record, grader)
    except ValueError as error:
        return str(error)


def clusters_of(records: Sequence[dict]) -> list[str]:
    """For each record what it is about, its image: what is drawn as a whole for intervals."""
    return [str(record.get("image_path", record["id"])) for record in records]


def row_of(scored: Sequence[tuple[dict, Scored]], grader: str, options: ScoreOptions) -> dict[str, Any]:
    """The figures of some records in one metric."""
    graded = [(record, pair) for record, pair in scored if isinstance(pair, tuple)]
    row: dict[str, Any] = {"n": len(graded), "errors": sum("error" in record for record, _ in scored)}
    unscored = sum(isinstance(pair, str) for _, pair in scored)
    row |= {"unscored": unscored} if unscored else {}
    if not graded:
        return row
    before, after = np.array([pair for _, pair in graded]).T
    difference = after - before
    clusters = clusters_of([record for record, _ in graded])
    low, high = bootstrap_interval(difference, clusters, options.bootstrap, options.seed)
    outcomes = Counter(outcome(pair) for _, pair in graded)
    row |= {"without_crop": before.mean(), "with_crop": after.mean(), "difference": difference.mean(), "low": low,
            "high": high, "fixed": outcomes["fixed"], "broken": outcomes["broken"]}  # fmt: skip
    if has_confidence([record for record, _ in graded]):
        row["surer"] = np.mean([surer(pair, sureness(record) or (0.0, 0.0)) for record, pair in graded])
    if np.isin([before, after], [0, 100]).all():
        row["mcnemar_p"] = mcnemar(row["fixed"], row["broken"])
    for when, field in (("without crop", "original_answer"), ("with crop", "crop_answer")):
        if grader in DETAILS:
            answers = [record.get(field, "") for record, _ in graded]  # not read of records with an error
            details = DETAILS[grader](answers, [record for record, _ in graded])
            row |= {f"{name}, {when}": value for name, value in details.items()}
    return row


def parts_of(file: ResultFile, groups: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """{(group, value): the numbers of its records}; ("all", "all") has all of them."""
    parts = {("all", "all"): list(range(len(file.records)))}
    for group in groups:
        members: dict[str, list[int]] = {}
        for number, record in enumerate(file.records):
            value = size_of(record, file.images) if group == "size" else record.get(group)
            if value is not None:
                members.setdefault(str(value), []).append(number)
        for name in sorted(members, key=place_of_size) if group == "size" else members:
            parts[group, name] = members[name]
    return parts


def rows_of(file: ResultFile, options: ScoreOptions) -> list[dict[str, Any]]:
    """One row per metric for all records and for each value of each group; prints which records cannot be scored."""
    parts, missing, rows, unscored = parts_of(file, options.by), file.missing, [], {}
    for metric, grader in options.metrics_of(file.task).items():
        scored = [(record, pair_or_reason(record, grader)) for record in file.records]
        unscored |= {record["id"]: reason for record, reason in scored if isinstance(reason, str)}
        for (_, part), members in parts.items():
            about = {"task": file.task, "model": file.model, "method": file.method, "metric": metric, "part": part}
            row = about | row_of([scored[number] for number in members], grader, options)
            if part == "all" and missing is not None:
                row["missing"] = missing
            rows.append(row)
    say_some(file.path, [f"{reason}: it cannot be scored, and is left out" for reason in unscored.values()])
    if "size" in options.by:
        say_some(file.path, [f"{reason}: it has no size" for reason in map(why_no_box, file.records) if reason])
    return rows


def per_sample(file: ResultFile, options: ScoreOptions) -> Iterator[dict[str, Any]]:
    """Yield one line per record and metric, with both scores."""
    for metric, grader in options.metrics_of(file.task).items():
        for record in file.records:
            if isinstance(pair := pair_or_reason(record, grader), tuple):
                yield {"id": record["id"], "model": file.model, "task": file.task, "method": file.method,
                       "metric": metric, "original": pair[0], "crop": pair[1]}  # fmt: skip


def why_no_box(record: dict) -> str | None:
    """A sentence on why a record's gt_bbox is not valid; None if it is valid, or if there is none."""
    try:
        return box_of(record) and None if record.get("gt_bbox") and "size" not in record else None
    except ValueError as error:
        return str(error)


def why_not(file: ResultFile) -> str | None:
    """The first reason why a record cannot be scored; None if all can be."""
    graders = TASKS[file.task]["metrics"].values()
    found = (pair_or_reason(record, grader) for grader in graders for record in file.records)
    return next((reason for reason in found if isinstance(reason, str)), None)


def say_some(path: Path, sentences: Sequence[str]) -> None:
    """`say` the first SHOWN sentences about a file's records, and how many more there are."""
    for sentence in sentences[:SHOWN]:
        say(f"{path}: {sentence}")
    if len(sentences) > SHOWN:
        say(f"{path}: and {len(sentences) - SHOWN} more")
