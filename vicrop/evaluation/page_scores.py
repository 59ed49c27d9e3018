"""The scores on the page of results: table, methods by sizes, and how far a model's confidence can be trusted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vicrop.evaluation.columns import COLUMNS, cells
from vicrop.evaluation.confidence import has_confidence, sureness
from vicrop.evaluation.ensembles import chosen_by_rules, first_answers, votes_of
from vicrop.evaluation.gates import risk_coverage
from vicrop.evaluation.paired import in_common
from vicrop.evaluation.result_files import ResultFile, place_of_size, size_of
from vicrop.evaluation.scores import ScoreOptions, parts_of, rows_of, scored_by, why_not

POINTS = 100  # of a risk-coverage curve, at most
Cell = list[float] | None  # [score, n]; None where nothing counts
WORDS = {"without": "without crop", "with": "{method}", "surer": "{method}, the surer of both answers"}


def names_of(results: Sequence[ResultFile]) -> list[dict[str, str]]:
    """[{"model", "method"}] of the results; the method is followed by the folder where two results have both alike."""
    alike = Counter((result.model, result.way) for result in results)
    folders = [f" ({r.path.parent})" if alike[r.model, r.way] > 1 else "" for r in results]
    return [{"model": r.model, "method": r.way + folder} for r, folder in zip(results, folders, strict=True)]


def scores(results: Sequence[ResultFile], metric: str, options: ScoreOptions) -> dict[str, Any]:
    """The score table: {"columns", "rows", "left_out" (a sentence), "matrix"}; `metric` is that of the matrix.

    There are no rows, and there is a "why", if nothing can be scored.
    """
    rows_of_each = [rows_of(r, options) for r in results]
    rows = [row for each in rows_of_each for row in each]
    if not any(row["n"] or "unscored" not in row for row in rows):
        without = sum(not record.get("labels") for record in results[0].records)
        count = f"{without} of {len(results[0].records)} records have no labels"
        why = next(filter(None, (why_not(r, options) for r in results)), count)
        return {"columns": COLUMNS, "rows": [], "why": why, "left_out": "", "matrix": None}
    unscored = {f"{row['model']} {row['method']} {row['metric']}": row.get("unscored") for row in rows
              if row["part"] == "all"}  # fmt: skip
    counts = [f"{name} {count}" for name, count in unscored.items() if count]
    left_out = f"Records that cannot be scored and are not in n: {', '.join(counts)}." if counts else ""
    return {"columns": COLUMNS, "rows": list(map(cells, rows)), "left_out": left_out,
            "matrix": matrix(results, rows_of_each, metric, options)}  # fmt: skip


def matrix(
    results: Sequence[ResultFile], rows_of_each: Sequence[list[dict]], metric: str, options: ScoreOptions
) -> dict[str, Any]:
    """Methods x object sizes: {"parts": ["all", "small", ...], "rows": [{"model", "method", "cells": [Cell]}]}.

    A model's row of the answers without crop has None as its method; it comes once, or once for each result if these
    differ. Below the methods come the surer of both answers of each, and what the results give together.
    """
    sizes = dict.fromkeys(part for r in results for group, part in parts_of(r, ("size",)) if group == "size")
    parts, rows, surer = ["all", *sorted(sizes, key=place_of_size)], [], []
    for name, own in zip(names_of(results), rows_of_each, strict=True):
        found: dict[str, dict] = {}
        for row in own:
            if row["metric"] == metric and row["n"]:
                found.setdefault(row["part"], row)
        for method, field, group in (
            (None, "without_crop", rows),
            (name["method"], "with_crop", rows),
            (f"{name['method']}, the surer of both answers", "surer", surer),
        ):
            scored = [[found[part][field], found[part]["n"]] if field in found.get(part, ()) else None
                      for part in parts]  # fmt: skip
            row = {"model": name["model"], "method": method, "cells": scored}
            if row not in rows and (group is rows or any(scored)):
                group.append(row)
    return {"parts": parts, "rows": [*rows, *surer, *together(results, parts, metric, options)]}


def together(
    results: Sequence[ResultFile], parts: Sequence[str], metric: str, options: ScoreOptions
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to combine several results (see ensembles), over the questions that they share."""
    if len(results) < 2 or not all(has_confidence(r.records) for r in results):
        return
    try:
        shared = [each for each in in_common(results, options) if each.metric == metric]
    except ValueError:  # there are none that have a score
        return
    if not shared:
        return
    (common,) = shared
    sizes = np.array([size_of(record, results[0].images) for record in common.records[0]], dtype=object)
    for rule, chosen in chosen_by_rules(votes_of(results, common)).items():
        members = [chosen if part == "all" else chosen[sizes == part] for part in parts]
        row: list[Cell] = [[each.mean(), len(each)] if len(each) else None for each in members]
        yield {"model": None, "method": f"all results together, {rule}", "cells": row}


def risk_curves(results: Sequence[ResultFile], grader: str) -> list[dict[str, Any]]:
    """[{"name", "kind", "area", "points": [[coverage, risk], ...]}], in %, of results that tell how sure the model was.

    "kind" is without (a crop; once where these answers are alike), with, or surer (of both answers).
    """
    curves, told = [], set()
    for result, name in zip(results, names_of(results), strict=True):
        graded = [(record, pair) for record, pair in scored_by(result, grader) if isinstance(pair, tuple)]
        if not has_confidence([record for record, _ in graded]):
            continue
        right, sure = (np.array(each, float) for each in zip(
            *((pair, sureness(record) or (0.0, 0.0)) for record, pair in graded), strict=True))  # fmt: skip
        kinds = {"without": (right[:, 0], sure[:, 0]), "with": (right[:, 1], sure[:, 1]),
                 "surer": (np.where(sure[:, 1] >= sure[:, 0], right[:, 1], right[:, 0]), sure.max(1))}  # fmt: skip
        first = name["model"], first_answers([record for record, _ in graded])
        for kind, pair in kinds.items():
            if kind != "without" or first not in told:
                shown = f"{name['model']}, {WORDS[kind].format(method=name['method'])}"
                curves.append({"name": shown, "kind": kind, **curve(*pair)})
        told.add(first)
    return curves


def curve(scores: np.ndarray, confidences: np.ndarray) -> dict[str, Any]:
    """The area and the points of `risk_curves`."""
    risks = risk_coverage(scores, confidences)
    numbers = np.unique(np.linspace(1, len(risks), min(POINTS, len(risks))).round().astype(int))
    points = np.stack([100 * numbers / len(risks), risks[numbers - 1]], 1)
    return {"area": float(risks.mean()), "points": points.round(2).tolist()}
