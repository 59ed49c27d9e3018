"""Errors that a run survives: those of one record, and too little memory. Any other is a mistake in the code."""

import torch
from accelerate.utils.memory import should_reduce_batch_size

# Of one record or command: a sentence, no traceback.
RECOVERABLE = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)


def recoverable_message(error: Exception) -> str:
    """An exception as a sentence, if it comes from a record or from too little memory; any other is raised again."""
    if isinstance(error, RECOVERABLE) or should_reduce_batch_size(error):
        return str(error) or type(error).__name__
    raise error
