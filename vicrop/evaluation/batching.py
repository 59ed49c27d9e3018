"""Batches of records through a model: made ready ahead of time, and asked one by one where something fails."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

from transformers import PreTrainedModel

from vicrop.crop import QuestionBatch
from vicrop.failures import recoverable_message

BATCH_SIZES = {"cuda": 8}  # elsewhere one
UNANSWERED = {"original_answer": "", "crop_answer": "", "bbox": None}


def batch_size_of(model: PreTrainedModel) -> int:
    """How many questions go through a model together where nothing is said."""
    return BATCH_SIZES.get(model.device.type, 1)


def in_batches(records, kind, size):
    """Lists of at most `size` neighbours of one kind."""
    for _, group in groupby(records, kind):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def prefetched(function, items):
    """Yields (item, what to call for function(item), once) while the next item's is under way in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, take_result(pool.submit(function, item))))
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def take_result(future):
    """What gives the future's result and then holds it no longer: a failed batch must leave its memory."""
    held = [future]
    return lambda: held.pop().result()


def answer_batch(batch, session, alone, methods, crop_below=None):
    """{method: [what it adds to each record: answers and box, or the error that took their place]}.

    Where there is a map, "map" is (map, its region), as results.Results.append takes it.

    A batch that fails (one image cannot be read, the memory is not enough) is asked record by record.

    Args:
        session: called for (session, numbers of the records' images) of this batch; `alone(record)` makes it for one.
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
    # Not in the except clause, in which the traceback would hold the memory of what has failed.
    if len(batch) == 1:
        return {name: [UNANSWERED | {"error": error}] for name in methods}
    questions = None
    each = [answer_batch([record], partial(alone, record), alone, methods, crop_below) for record in batch]
    return {name: [fields for found in each for fields in found[name]] for name in methods}


def question_batch(batch, session, of, crop_below=None):
    """The QuestionBatch of some records about a session's images, for each the number of its own."""
    questions, short = ([record.get(name) for record in batch] for name in ("question", "short_question"))
    return QuestionBatch(session, questions, of, short, batch, crop_below)


def outcome_or_error(questions, method, originals):
    """`outcomes` of a single record: one method may fail and another not."""
    try:
        return outcomes(questions, method, originals)[0]
    except Exception as caught:
        return UNANSWERED | {"original_answer": originals[0].text, "error": recoverable_message(caught)}


def outcomes(questions, method, originals):
    """What a method adds to each record of a QuestionBatch."""
    return [
        found.outputs | {"map": None if found.att_map is None else (found.att_map, found.region)}
        for found in questions.results(method, originals)
    ]
