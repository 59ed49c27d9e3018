"""Batches of records through a model: made ready ahead of time, and asked one by one where something fails."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

import torch
from accelerate.utils.memory import should_reduce_batch_size

from vicrop import Case

# Of one record or command: a sentence, no traceback.
FAILURES = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
UNANSWERED = {"original_answer": "", "crop_answer": "", "bbox": None}


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
            waiting.append((item, once(pool.submit(function, item))))
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def once(future):
    """What gives the future's result and then holds it no longer: a failed batch must leave its memory."""
    held = [future]
    return lambda: held.pop().result()


def answer_batch(batch, look, alone, functions):
    """{method: [what it adds to each record: answers and box, or the error that took their place]}.

    Where there is a map, "map" is (map, its region), as records.Results.append takes it.

    A batch that fails (one image cannot be read, the memory is not enough) is asked record by record.

    Args:
        look: called for (look, numbers of the records' images) of this batch; `alone(record)` makes it for a record.
    """
    try:
        case = case_of(batch, *look())
        originals = case.original_answers(functions)
        if len(batch) > 1:
            return {method: outcomes(case, method, functions[method], originals) for method in functions}
    except Exception as caught:
        error = what_failed(caught)
    else:
        return {method: [outcome_or_error(case, method, functions[method], originals)] for method in functions}
    # Not in the except clause, in which the traceback would hold the memory of what has failed.
    if len(batch) == 1:
        return {method: [UNANSWERED | {"error": error}] for method in functions}
    case = None
    each = [answer_batch([record], partial(alone, record), alone, functions) for record in batch]
    return {method: [fields for found in each for fields in found[method]] for method in functions}


def case_of(batch, look, of):
    questions, short = ([record.get(name) for record in batch] for name in ("question", "short_question"))
    return Case(look, questions, of, short, batch)


def outcome_or_error(case, method, function, originals):
    """`outcomes` of a single record: one method may fail and another not."""
    try:
        return outcomes(case, method, function, originals)[0]
    except Exception as caught:
        return UNANSWERED | {"original_answer": originals[0], "error": what_failed(caught)}


def what_failed(error):
    """An exception as a sentence, if it comes from a record or from too little memory; any other is raised again."""
    if isinstance(error, FAILURES) or should_reduce_batch_size(error):
        return str(error) or type(error).__name__
    raise error


def outcomes(case, method, function, originals):
    """What a method adds to each record of a case."""
    return [
        {
            "original_answer": found.original_answer,
            "crop_answer": found.crop_answer,
            "bbox": list(found.bbox),
            **found.fields,
            "map": None if found.att_map is None else (found.att_map, found.region),
        }
        for found in case.findings(method, function, originals)
    ]
