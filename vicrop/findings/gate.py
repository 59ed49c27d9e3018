"""Right answers and crops by the gate: a crop only where the first answer is less probable than a bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.choices import wants_crop
from vicrop.evaluation.confidence import surer
from vicrop.evaluation.gates import THRESHOLDS, risk_coverage_area
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import TaskModel, graded, halved, images_of, measured
from vicrop.findings.table import Table, difference, estimate, in_words


def scores_and_confidence(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "sure", "with_crop": {method: {"score", "sure"}}}: how right an answer is, and how probable it was."""
    batch = task_model.ask(record)
    originals, with_crop = batch.original_answers(task_model.methods), {}
    for name, method in task_model.methods.items():
        (found,) = batch.results(method, originals)
        with_crop[name] = {
            "score": task_model.grade(found.crop_answer, record), "sure": found.confidence["crop"],
        }  # fmt: skip
    return {
        "score": task_model.grade(originals[0].text, record), "sure": originals[0].confidence, "with_crop": with_crop,
    }  # fmt: skip


def gated(records: Sequence[dict], method: str, bound: float) -> list[float]:
    """The score of each record behind a gate."""
    return [record["with_crop"][method]["score"] if wants_crop(record["sure"], bound) else record["score"]
            for record in records]  # fmt: skip


def crops(records: Sequence[dict], bound: float) -> list[float]:
    """For each record 100 where a gate lets a crop be made, else 0."""
    return [100.0 * wants_crop(record["sure"], bound) for record in records]


def gate(run: RunSettings, out: Path) -> Table:
    """Right answers and the share of crops over the bound; the best bound is chosen on one half of the images."""
    records = graded(measured(run, out, "gate", scores_and_confidence))
    images = images_of(records)
    rows = {
        bound: {method: estimate(gated(records, method, bound), images) for method in run.how.names}
        | {"crops": estimate(crops(records, bound), images)}
        for bound in THRESHOLDS
    }
    area = risk_coverage_area([record["score"] for record in records], [record["sure"] for record in records])
    notes = [f"area under the risk-coverage curve of the answers without crop: {area:.2f} (0 is best)"]
    notes += records.notes
    choosing, judging = halved(records)
    for method in run.how.names:
        bound = max(THRESHOLDS, key=lambda each: np.mean(gated(choosing, method, each)))  # the lowest of equal ones
        parts = images_of(judging)
        change = difference(gated(judging, method, bound), gated(judging, method, 1.0), parts)
        share = in_words(estimate(crops(judging, bound), parts))
        notes.append(f"{method}: below {bound:g} is best on one half of the images; on the other it crops {share} %, "
                     f"and changes what a crop everywhere gives by {in_words(change)} points")  # fmt: skip
        pairs = [((record["score"], crop["score"]), (record["sure"], crop["sure"]))
                 for record, crop in ((record, record["with_crop"][method]) for record in records)]  # fmt: skip
        both = in_words(estimate([surer(*pair) for pair in pairs], images))
        notes.append(f"{method}: the surer of both answers is right in {both} %, either of them in "
                     f"{in_words(estimate([max(scores) for scores, _ in pairs], images))} %")  # fmt: skip
    return Table("right answers, and crops, by the gate", "crop below", "%", rows, notes, curves=True)
