"""Which questions a finding asks: all of them, the first ones, or a sample. Needs no torch."""

from collections.abc import Sequence

import numpy as np

from vicrop.dataset import pick

# finding -> so many questions, drawn from all of the task, where neither --limit nor --ids says which; others ask all
SAMPLES = {
    "layers": 360, "overhead": 120, "kinds": 240, "windows": 120, "high": 240, "gate": 360, "budget": 40, "heads": 360,
    "causal": 180,
}  # fmt: skip


def chosen(records: Sequence[dict], finding: str, ids: str | None = None, limit: int | None = None) -> list[dict]:
    """The records that a finding is about: those of --ids, the first --limit, or else its sample; in their order."""
    count = SAMPLES.get(finding)
    if ids or limit or count is None or len(records) <= count:
        return pick(list(records), ids, limit)
    places = np.random.default_rng(0).permutation(len(records))[:count]  # the same ones each time
    return [records[place] for place in sorted(places)]
