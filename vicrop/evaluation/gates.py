"""What a gate would have given: crop only where the first answer is less probable than a threshold. Needs no torch.

All is worked out from a result file, in which both answers and their probabilities stand; nothing is asked again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vicrop.choices import wants_crop
from vicrop.evaluation.confidence import has_confidence, sureness, surer, why_without
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, clusters_of, parts_of, scored_by
from vicrop.evaluation.statistics import bootstrap_interval

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
COLUMNS = (
    "task", "model", "method", "metric", "part", "crop below", "n", "crops", "score", "against always", "95 % interval"
)  # fmt: skip
LEFT = 5  # columns that are flush left


def gate_rows(file: ResultFile, options: ScoreOptions) -> list[dict[str, Any]]:
    """For each metric a row of each threshold, for all records and for each value of the groups of `options.by`.

    Raises:
        ValueError: naming the file: it does not tell how sure the model was.
    """
    if not has_confidence(file.records):
        raise ValueError(why_without(file))
    about, rows = {"task": file.task, "model": file.model, "method": file.way}, []
    for metric, grader in options.metrics_of(file).items():
        scored = list(scored_by(file, grader))
        for (_, part), members in parts_of(file, options.by).items():
            graded = [(record, pair) for record, pair in map(scored.__getitem__, members) if isinstance(pair, tuple)]
            if graded:
                figures = figures_of(graded, options)
                rows += [about | {"metric": metric, "part": part, "n": len(graded)} | row for row in figures]
    return rows


def figures_of(graded: Sequence[tuple[dict, tuple[float, float]]], options: ScoreOptions) -> list[dict[str, Any]]:
    """A row for each threshold that the records can tell of; the last one has what does not depend on one, too."""
    records = [record for record, _ in graded]
    pairs, sure = np.array([pair for _, pair in graded]), [sureness(record) or (0.0, 0.0) for record in records]
    rows = []
    gated = [record for record in records if record.get("gated")]
    most = highest(gated)
    for bound in (each for each in THRESHOLDS if each <= most and not (gated and wants_crop(1.0, each))):
        crops = np.array([wants_crop(p, bound) for p, _ in sure])
        chosen = np.where(crops, pairs[:, 1], pairs[:, 0])
        row = {"threshold": bound, "crops": 100 * crops.mean(), "score": chosen.mean()}
        if not gated:  # else nothing tells what crops would have given everywhere
            change = chosen - pairs[:, 1]
            low, high = bootstrap_interval(change, clusters_of(records), options.bootstrap, options.seed)
            row |= {"against_always": change.mean(), "low": low, "high": high}
        rows.append(row)
    before, after = pairs.T
    favoured = [surer(pair, both) for (_, pair), both in zip(graded, sure, strict=True)]
    rows[-1] |= {"aurc": risk_coverage_area(before, [p for p, _ in sure]), "surer": np.mean(favoured),
                 "oracle": np.maximum(before, after).mean()}  # fmt: skip
    return rows


def highest(gated: Sequence[dict]) -> float:
    """The highest threshold that a result can tell of, given its gated records: they have no crop above their gate."""
    sure = map(sureness, gated)
    return min((both[0] for both in sure if both), default=1.0)


def risk_coverage(scores: Sequence[float] | np.ndarray, confidences: Sequence[float] | np.ndarray) -> np.ndarray:
    """(n,) risk in %, 100 minus the mean score, of the k surest answers, k = 1 to n; the order within ties is any."""
    risks, sure = 100 - np.asarray(scores, float), np.asarray(confidences)
    order = np.argsort(-sure, kind="stable")
    _, tied, counts = np.unique(-sure[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(tied, risks[order]) / counts)[tied]
    return expected.cumsum() / np.arange(1, len(risks) + 1)


def risk_coverage_area(scores: Sequence[float] | np.ndarray, confidences: Sequence[float] | np.ndarray) -> float:
    """The mean of `risk_coverage`.

    0 is a model that is right wherever it answers; its mean risk is that of one whose confidence tells nothing.
    """
    return float(risk_coverage(scores, confidences).mean())


def gate_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in COLUMNS."""
    against = (
        [f"{row['against_always']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"] if "low" in row else ["", ""]
    )
    named = [row[name] for name in ("task", "model", "method", "metric", "part")]
    figures = [f"{row['threshold']:g}", str(row["n"]), f"{row['crops']:.1f} %", f"{row['score']:.2f}"]
    return [*named, *figures, *against]


def gate_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each result and metric with what does not depend on a threshold."""
    return [f"{row['task']} {row['model']} {row['method']} {row['metric']} {row['part']}: area under the "
            f"risk-coverage curve {row['aurc']:.2f}, the surer of both answers {row['surer']:.2f}, "
            f"oracle {row['oracle']:.2f}"
            for row in rows if "aurc" in row]  # fmt: skip
