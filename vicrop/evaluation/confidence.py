"""How sure a model was of the answers in a result file, and which of two answers that favours. Needs no torch."""

from collections.abc import Sequence

from vicrop.evaluation.result_files import ResultFile

BOTH = ("original", "crop")


def sureness(record: dict) -> tuple[float, float] | None:
    """The probabilities of a record's answers, without and with crop; None if it has none. Of an error: 0."""
    if "error" in record:
        return 0.0, 0.0
    kept = record.get("confidence")
    found = [kept.get(name) for name in BOTH] if isinstance(kept, dict) else []
    numbers = [float(p) for p in found if isinstance(p, int | float) and 0 <= p <= 1]
    return (numbers[0], numbers[1]) if len(numbers) == len(BOTH) else None


def has_confidence(records: Sequence[dict]) -> bool:
    """Has each record that was answered the probabilities of its answers, and is there one?"""
    answered = [record for record in records if "error" not in record]
    return bool(answered) and all(sureness(record) for record in answered)


def why_without(file: ResultFile) -> str:
    """What is to be said of a file whose records do not tell how sure the model was."""
    return f"{file.path} does not tell how sure the model was of its answers: run it again with this version"


def surer(pair: tuple[float, float], sure: tuple[float, float]) -> float:
    """Of two scores that of the answer with the higher probability; with crop where both are as probable."""
    return pair[1] if sure[1] >= sure[0] else pair[0]
