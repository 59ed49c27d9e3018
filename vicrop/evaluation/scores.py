"""The figures of the score table: a row for each metric, all records and each group of them. Needs no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.dataset import box_of
from vicrop.evaluation.confidence import has_confidence, sureness, surer
from vicrop.evaluation.metrics import (
    DETAILS,
    Scores,
    metrics_named,
    note_on_few_labels,
    outcome,
    refuse_bad_grader,
    score,
)
from vicrop.evaluation.result_files import ResultFile, place_of_size, say, size_of
from vicrop.evaluation.statistics import bootstrap_interval, mcnemar

# Fields by which scores are broken down, where records have them; a list puts a record into several parts.
GROUPS = ("size", "category", "subcategory", "detail", "cycle")
OF_BENCHMARKS = ("both", "paper", "official")  # which of a benchmark's metrics
SHOWN = 10  # so many records of a file that cannot be scored are named
NO_LABELS = "it has no labels"  # why a record of own data has no score; such records are counted, not named


@dataclass(frozen=True)
class ScoreOptions:
    """What the score table shows.

    Attributes:
        metric: paper, official or both; or those to score by instead, names of metrics as a run takes them.
        by: the GROUPS that get rows of their own, or combinations of them, as "category,size".
        bootstrap, seed: rounds of the bootstrap behind the intervals, and its seed.
    Raises:
        ValueError: no such metric, file or function.
    """

    metric: str = "both"
    by: tuple[str, ...] = GROUPS
    bootstrap: int = 10_000
    seed: int = 0

    def __post_init__(self):
        _ = self.instead

    @property
    def instead(self) -> Mapping[str, str]:
        """{metric: grader} to score by in place of those of the results; empty if there are none."""
        return {} if self.metric in OF_BENCHMARKS else metrics_named(list(map(str.strip, self.metric.split(","))))

    def metrics_of(self, file: ResultFile) -> Mapping[str, str]:
        """{metric: grader} of a result; metrics that are neither the paper's nor official are always among them.

        Raises:
            ValueError: naming the file: there is none that can be used.
        """
        if self.instead:
            return self.instead
        gone = gone_metrics(file)
        found = {
            metric: grader
            for metric, grader in file.metrics.items()
            if self.metric == "both" or metric.startswith(self.metric) or not metric.startswith(("paper", "official"))
            if metric not in gone
        }
        if not found:
            why = next(
                iter(gone.values()), f"of {file.task} there is no metric {self.metric}, but {', '.join(file.metrics)}"
            )
            raise ValueError(f"{file.path}: {why}")
        return found


def gone_metrics(file: ResultFile) -> dict[str, str]:
    """{metric: a sentence on why it cannot be used} of those of a result: its file is gone, or has no such function."""
    said = {}
    for metric, grader in file.metrics.items():
        try:
            refuse_bad_grader(grader)
        except ValueError as error:
            said[metric] = f"its metric {metric} cannot be used (--metric names another): {error}"
    return said


Scored = Scores | str | None  # both scores; a sentence on why there are none; None if the record does not count


def scored_by(file: ResultFile, grader: str) -> Iterator[tuple[dict, Scored]]:
    """Yield (record, its Scored) for each record of a result."""
    for record in file.records:
        yield record, NO_LABELS if file.is_unlabelled(record, grader) else pair_or_reason(record, grader)


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
    """{(group, value): the numbers of its records}; ("all", "all") has all of them.

    Args:
        groups: of GROUPS; several with commas between them stand for each combination of their values.
    """
    parts = {("all", "all"): list(range(len(file.records)))}
    for group in groups:
        fields = group.split(",")
        members: dict[tuple[str, ...], list[int]] = {}
        for number, record in enumerate(file.records):
            for values in product(*(values_of(record, field, file) for field in fields)):
                members.setdefault(values, []).append(number)
        columns = [list(dict.fromkeys(column)) for column in zip(*members, strict=True)]
        ordered = (sorted(column, key=place_of_size) if field == "size" else column
                   for field, column in zip(fields, columns, strict=False))  # fmt: skip
        for values in product(*ordered):
            if values in members:
                parts[group, ", ".join(values)] = members[values]
    return parts


def values_of(record: dict, field: str, file: ResultFile) -> list[str]:
    """What a record has in one of the GROUPS: none, one, or several values."""
    value = size_of(record, file.images) if field == "size" else record.get(field)
    return [str(each) for each in (value if isinstance(value, list) else [value]) if each is not None]


def rows_of(file: ResultFile, options: ScoreOptions) -> list[dict[str, Any]]:
    """One row per metric for all records and for each value of each group; prints which records cannot be scored.

    Raises:
        ValueError: as ScoreOptions.metrics_of.
    """
    parts, missing, rows = parts_of(file, options.by), file.missing, []
    unlabelled, broken = set(), {}  # a record without labels may be broken for a metric that reads none
    for metric, grader in options.metrics_of(file).items():
        scored = list(scored_by(file, grader))
        reasons = {record["id"]: reason for record, reason in scored if isinstance(reason, str)}
        unlabelled |= {key for key, reason in reasons.items() if reason == NO_LABELS}
        broken |= {key: reason for key, reason in reasons.items() if reason != NO_LABELS}
        for (_, part), members in parts.items():
            about = {"task": file.task, "model": file.model, "method": file.way, "metric": metric, "part": part}
            row = about | row_of([scored[number] for number in members], grader, options)
            if part == "all" and missing is not None:
                row["missing"] = missing
            rows.append(row)
    for sentence in notes_on(file, options, len(unlabelled)):
        say(f"{file.path}: {sentence}")
    say_some(file.path, [f"{reason}: it cannot be scored, and is left out" for reason in broken.values()])
    if any("size" in group.split(",") for group in options.by):
        say_some(file.path, [f"{reason}: it has no size" for reason in map(why_no_box, file.records) if reason])
    return rows


def notes_on(file: ResultFile, options: ScoreOptions, without_labels: int) -> Iterator[str]:
    """Yield sentences on how a result is scored, where that will surprise; so many of its records have no labels."""
    if without_labels:
        yield f"{without_labels} of {len(file.records)} records have no labels, and are not scored"
    if not options.instead:
        yield from gone_metrics(file).values()
        for changed in file.changed_metrics:
            yield f"{changed.name} has changed since these answers were given: they are scored by what it is now"
    yield from filter(None, (note_on_few_labels(file.records, each) for each in options.metrics_of(file).values()))


def per_sample(file: ResultFile, options: ScoreOptions) -> Iterator[dict[str, Any]]:
    """Yield one line per record and metric, with both scores."""
    for metric, grader in options.metrics_of(file).items():
        for record, pair in scored_by(file, grader):
            if isinstance(pair, tuple):
                yield {"id": record["id"], "model": file.model, "task": file.task, "method": file.way,
                       "metric": metric, "original": pair[0], "crop": pair[1]}  # fmt: skip


def why_no_box(record: dict) -> str | None:
    """A sentence on why a record's gt_bbox is not valid; None if it is valid, or if there is none."""
    try:
        return box_of(record) and None if record.get("gt_bbox") and "size" not in record else None
    except ValueError as error:
        return str(error)


def why_not(file: ResultFile, options: ScoreOptions) -> str | None:
    """The first reason why a record cannot be scored; None if all can be, or have no labels as own data may."""
    found = (reason for grader in options.metrics_of(file).values() for _, reason in scored_by(file, grader))
    return next((reason for reason in found if isinstance(reason, str) and reason != NO_LABELS), None)


def say_some(path: Path, sentences: Sequence[str]) -> None:
    """`say` the first SHOWN sentences about a file's records, and how many more there are."""
    for sentence in sentences[:SHOWN]:
        say(f"{path}: {sentence}")
    if len(sentences) > SHOWN:
        say(f"{path}: and {len(sentences) - SHOWN} more")
