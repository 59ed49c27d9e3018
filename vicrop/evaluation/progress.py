"""The bar of a run: how much of a job all processes have finished, the time left, and the score so far."""

import time

from tqdm import tqdm

from vicrop.evaluation.metrics import score

SECONDS_BETWEEN_LOOKS = 0.5  # at what other processes have finished


class Progress:
    """One bar per machine: how much of a job all processes have finished, the time left, and the score so far."""

    def __init__(self, results, done, wanted, grader, name, state):
        self.results, self.grader, self.shown = results, grader, state.is_local_main_process
        self.wanted = {record["id"] for record in wanted}
        self.finished = {method: {} for method in results}  # id -> (score without crop, with crop), or None
        for method, records in done.items():
            self._take(method, records.values())
        self.next_look = 0.0
        self.bar = tqdm(total=len(wanted), initial=self._count(), desc=name, unit="question", disable=not self.shown)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.update(last=True)
        self.bar.close()

    def update(self, last=False):
        """Look what has been finished since the last call, here and by other processes."""
        if not self.shown or (time.monotonic() < self.next_look and not last):
            return
        self.next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        for method, result in self.results.items():
            self._take(method, result.poll())
        self.bar.set_postfix(self._scores(), refresh=False)
        self.bar.update(self._count() - self.bar.n)

    def _take(self, method, records):
        for record in records:
            if record["id"] in self.wanted:
                self.finished[method][record["id"]] = self._graded(record)

    def _graded(self, record):
        try:
            return score(record, self.grader)
        except ValueError:  # no labels, or none that can be graded: that is for get_score.py to say
            return None

    def _count(self):
        return min(len(finished) for finished in self.finished.values())

    def _scores(self):
        shown = {}
        for method, finished in self.finished.items():
            scores = [pair for pair in finished.values() if pair]
            if scores:
                without, with_crop = (sum(column) / len(scores) for column in zip(*scores, strict=True))
                shown |= {"no crop": f"{without:.1f}", method: f"{with_crop:.1f}"}
        return shown
