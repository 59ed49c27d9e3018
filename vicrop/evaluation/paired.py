"""Results question by question: the same records of several files, and two of them against each other. No torch.

python get_score.py A.json B.json
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.evaluation.metrics import outcome
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, clusters_of, scored_by
from vicrop.evaluation.statistics import bootstrap_interval, mcnemar

OUTCOMES = ("fixed", "broken", "right", "wrong")
Pair = tuple[float, float]  # the scores of a record, without and with crop


@dataclass(frozen=True)
class Common:
    """The records that several results have in common and that a metric counts in all of them.

    Attributes:
        metric: its name; records: for each result its own; pairs: for each result the scores of each record.
        left_out: how many records some result has and this does not.
    """

    metric: str
    records: list[list[dict]]
    pairs: list[list[Pair]]
    left_out: int

    def change(self, first: np.ndarray, second: np.ndarray, options: ScoreOptions) -> dict[str, Any]:
        """The mean difference of two series of scores, its interval, and p where scores are only 0 or 100."""
        change = first - second
        low, high = bootstrap_interval(change, clusters_of(self.records[0]), options.bootstrap, options.seed)
        row = {"difference": change.mean(), "low": low, "high": high}
        if np.isin([first, second], [0, 100]).all():
            row["mcnemar_p"] = mcnemar(int((change > 0).sum()), int((change < 0).sum()))
        return row


def read_all(paths: Sequence[str | Path]) -> list[ResultFile]:
    """The results at some paths.

    Raises:
        OSError, ValueError: one is no result; they are about different tasks.
    """
    files = [ResultFile.read(path) for path in paths]
    tasks = sorted({file.task for file in files})
    if len(tasks) > 1:
        raise ValueError(f"results are compared on one task, not on {' and '.join(tasks)}")
    return files


def in_common(files: Sequence[ResultFile], options: ScoreOptions) -> list[Common]:
    """For each metric of the task what the results have in common.

    Raises:
        ValueError: a record asks something else in another file; nothing is in common.
    """
    by_id = [{record["id"]: record for record in file.records} for file in files]
    ids = [key for key in by_id[0] if all(key in records for records in by_id)]
    for key in ids:
        asked = [(records[key].get("question"), records[key].get("image_path")) for records in by_id]
        other = next((number for number, each in enumerate(asked) if each != asked[0]), None)
        if other is not None:
            raise ValueError(f"{key!r} is {asked[0]} in {files[0].path}, and {asked[other]} in {files[other].path}")
    every, found = set().union(*by_id), []
    for metric, grader in options.metrics_of(files[0]).items():
        scored = [{record["id"]: (record, pair) for record, pair in scored_by(file, grader)} for file in files]
        rows = [[of[key] for of in scored] for key in ids]
        rows = [row for row in rows if all(isinstance(pair, tuple) for _, pair in row)]
        if rows:
            records, pairs = ([[row[n][part] for row in rows] for n in range(len(files))] for part in (0, 1))
            found.append(Common(metric, records, pairs, len(every) - len(rows)))  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"no question in {files[0].path} has a score there and in {files[-1].path}")
    return found


def names_of(files: Sequence[ResultFile]) -> list[str]:
    """What results are called beside each other: by what differs."""
    parts = [(file.model, file.way) for file in files]
    shown = [[values[n] for n in (0, 1) if len({each[n] for each in parts}) > 1] for values in parts]
    alike = Counter(parts)
    return [str(file.path) if alike[values] > 1 else " ".join(words) or file.path.stem
            for file, values, words in zip(files, parts, shown, strict=True)]  # fmt: skip


def compared(first: ResultFile, second: ResultFile, options: ScoreOptions) -> list[dict[str, Any]]:
    """For each metric the first result's answers with crop against the second one's.

    "outcomes" counts questions by what the crop did in the first and in the second: {(fixed, broken): 3, ...}.
    """
    rows = []
    for common in in_common([first, second], options):
        with_crop = [np.array([pair[1] for pair in pairs]) for pairs in common.pairs]
        row = {"metric": common.metric, "n": len(with_crop[0]), "left_out": common.left_out}
        row |= {"first": with_crop[0].mean(), "second": with_crop[1].mean()}
        row |= common.change(with_crop[0], with_crop[1], options)
        outcomes = zip(*([outcome(pair) for pair in pairs] for pairs in common.pairs), strict=True)
        rows.append(row | {"outcomes": Counter(outcomes)})
    return rows


def comparison_lines(files: Sequence[ResultFile], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is printed of a comparison."""
    (a, b), lines = names_of(files), []
    for row in rows:
        p = f", McNemar p {row['mcnemar_p']:.2g}" if "mcnemar_p" in row else ""
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        lines.append(f"{files[0].task}, {row['metric']}: {a} {row['first']:.2f}, {b} {row['second']:.2f}, difference "
                     f"{row['difference']:+.2f} ({interval}){p}, n {row['n']}")  # fmt: skip
        counts = row["outcomes"]
        for one, other, name, its in ((0, 1, a, b), (1, 0, b, a)):
            for what in ("fixed", "broken"):
                of = Counter({key[other]: count for key, count in counts.items() if key[one] == what})
                parts = ", ".join(f"{of[each]} {each}" for each in OUTCOMES)
                lines.append(f"  {sum(of.values())} {what} by {name}: with {its} {parts}")
        if row["left_out"]:
            lines.append(f"  {row['left_out']} records are not in both, or cannot be scored, and are left out")
    return lines
