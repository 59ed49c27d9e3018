"""The bar of a run: how much of a job all processes have finished, the time left, and the score so far."""

import time
from collections.abc import Iterable, Mapping, Sequence

from accelerate import PartialState
from tqdm import tqdm

from vicrop.evaluation.metrics import Scores, score
from vicrop.evaluation.results import Results

SECONDS_BETWEEN_LOOKS = 0.5  # between two looks at what other processes have finished


class Progress:
    """One bar per machine: how much of a job all processes have finished, the time left, and the score so far."""

    def __init__(
        self, results: Mapping[str, Results], done: Mapping[str, dict], wanted: Sequence[dict], grader: str, name: str,
        state: PartialState,
    ):  # fmt: skip
        self.results, self.grader, self.shown = results, grader, state.is_local_main_process
        self.wanted = {record["id"] for record in wanted}
        self.finished: dict[str, dict] = {method: {} for method in results}  # method -> {id: Scores or None}
        for method, records in done.items():
            self._take(method, records.values())
        self.next_look = 0.0
        self.bar = tqdm(total=len(wanted), initial=self._count(), desc=name, unit="question", disable=not self.shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.update(last=True)
        self.bar.close()

    def update(self, last: bool = False) -> None:
        """Show what this and other processes have finished since the last call; `last` looks in any case."""
        if not self.shown or (time.monotonic() < self.next_look and not last):
            return
        self.next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        for method, result in self.results.items():
            self._take(method, result.poll())
        self.bar.set_postfix(self._scores(), refresh=False)
        self.bar.update(self._count() - self.bar.n)

    def _take(self, method: str, records: Iterable[dict]) -> None:
        for record in records:
            if record["id"] in self.wanted:
                self.finished[method][record["id"]] = self._graded(record)

    def _graded(self, record: dict) -> Scores | None:
        try:
            return score(record, self.grader)
        except ValueError:  # no labels, or none that can be graded: get_score.py says so
            return None

    def _count(self) -> int:
        return min(len(finished) for finished in self.finished.values())

    def _scores(self) -> dict[str, str]:
        shown = {}
        for method, finished in self.finished.items():
            scores = [pair for pair in finished.values() if pair]
            if scores:
                without, with_crop = (sum(column) / len(scores) for column in zip(*scores, strict=True))
                shown |= {"no crop": f"{without:.1f}", method: f"{with_crop:.1f}"}
        return shown
