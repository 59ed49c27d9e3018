"""Batches of records through a model: made ready ahead of time, and asked one by one where something fails."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from transformers import PreTrainedModel

from vicrop.crop import QuestionBatch
from vicrop.dataset import ASKED
from vicrop.decoding import Answer
from vicrop.failures import recoverable_message
from vicrop.methods import Method
from vicrop.session import ImageSession

BATCH_SIZES = {"cuda": 8}  # 1 on any other device
UNANSWERED = {"original_answer": "", "crop_answer": "", "bbox": None}

Item = TypeVar("Item")
Made = TypeVar("Made")
# The session of a batch's images, and for each record the number of its image.
BatchSession = tuple[ImageSession, list[int]]


def batch_size_of(model: PreTrainedModel) -> int:
    """How many questions go through a model together if the user sets no number."""
    return BATCH_SIZES.get(model.device.type, 1)


def in_batches(records: Iterable[dict], kind: Callable[[dict], Any], size: int) -> Iterator[list[dict]]:
    """Yield lists of at most `size` neighbouring records for which `kind` returns the same value."""
    for _, group in groupby(records, kind):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def prefetched(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Callable[[], Made]]]:
    """Yield (item, a function to call once, which returns function(item)).

    A thread already computes function(next item) meanwhile.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, take_result(pool.submit(function, item))))
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def take_result(future: Future[Made]) -> Callable[[], Made]:
    """A function to call once: it returns the future's result and keeps no reference, so that memory becomes free."""
    held = [future]
    return lambda: held.pop().result()


def answer_batch(
    batch: Sequence[dict], session: Callable[[], BatchSession], alone: Callable[[dict], BatchSession],
    methods: dict[str, Method], crop_below: float | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """{method: [the fields that it adds to each record: answers and box, or an error instead of them]}.

    If the method made a map, the field "map" is (map, its region), as results.Results.append takes it.

    If a batch fails (an image cannot be read, or memory is short), its records are asked one by one.

    Args:
        session: returns the BatchSession of this batch; alone: returns the BatchSession of a single record.
        methods: {name: Method}; crop_below: as crop.QuestionBatch takes it.
    """
    try:
        questions = question_batch(batch, *session(), crop_below)
        originals = questions.original_answers(methods)
        if len(batch) > 1:
            return {name: outcomes(questions, method, originals) for name, method in methods.items()}
    except Exception as caught:
        error = recoverable_message(caught)
    else:
        return {name: [outcome_or_error(questions, method, originals)] for name, method in methods.items()}
    # Not in the except clause: there the traceback would keep the memory of the failed batch in use.
    if len(batch) == 1:
        return {name: [UNANSWERED | {"error": error}] for name in methods}
    questions = None
    each = [answer_batch([record], partial(alone, record), alone, methods, crop_below) for record in batch]
    return {name: [fields for found in each for fields in found[name]] for name in methods}


def question_batch(
    batch: Sequence[dict], session: ImageSession, of: Sequence[int], crop_below: float | None = None
) -> QuestionBatch:
    """The QuestionBatch of some records about a session's images; `of` has the number of each record's image."""
    questions = [record.get(ASKED) or record["question"] for record in batch]
    short = [record.get("short_question") or (record["question"] if ASKED in record else None) for record in batch]
    return QuestionBatch(session, questions, of, short, batch, crop_below)


def outcome_or_error(questions: QuestionBatch, method: Method, originals: Sequence[Answer]) -> dict[str, Any]:
    """`outcomes` of a single record, or its error: one method may fail where another one does not."""
    try:
        return outcomes(questions, method, originals)[0]
    except Exception as caught:
        return UNANSWERED | {"original_answer": originals[0].text, "error": recoverable_message(caught)}


def outcomes(questions: QuestionBatch, method: Method, originals: Sequence[Answer]) -> list[dict[str, Any]]:
    """The fields that a method adds to each record of a QuestionBatch."""
    return [
        found.outputs | {"map": None if found.att_map is None else (found.att_map, found.region)}
        for found in questions.results(method, originals)
    ]
