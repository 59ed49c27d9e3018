"""How right an answer is: the paper's scores and the benchmarks' official ones, side by side. Needs no torch.

A grader is a function (answer, record) that returns 0 to 100, or None if the benchmark does not count the record.
`tables.TASKS` names the graders of each benchmark; own data may have any of them, or one's own (see own_metrics.py).
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from vicrop.dataset import Result, box_of, field_of, iou, name_of
from vicrop.evaluation.normal_text import evalai_normal, one_line, vqa_normal
from vicrop.evaluation.option_letters import (
    OPTION_LINE,
    choices,
    chosen_letter,
    first_letter,
    matched_letter,
    option_of,
)
from vicrop.evaluation.own_metrics import is_own, own_metric, own_score, parts_of, seen_from
from vicrop.tables import known

Grader = Callable[[str, dict], float | None]
Scores = tuple[float, float]  # without crop, with crop


# -------------------------------------------------------------------------------------------------------------- labels
def labels_of(record: dict) -> list[str]:
    """The labels of a record as a list of texts; raises ValueError, naming the record, if it has none."""
    labels = field_of(record, "labels")
    if not labels:
        raise ValueError(f"{name_of(record)}: labels are a text or a list of texts, not {labels!r}")
    return [labels] if isinstance(labels, str) else labels


def leave_one_out(answer: str, labels: Sequence[str]) -> float:
    """100 times the mean over the labels of min(1, matches among the other labels / 3)."""
    matches = labels.count(answer)
    scores = [min(1, (matches - (label == answer)) / 3) for label in labels]
    return 100 * sum(scores) / len(scores)


# ------------------------------------------------------------------------------------------------------------- graders
def exact(answer: str, record: dict) -> float:
    """100 if the answer equals a label once both are lower-cased and stripped of outer spaces and a final period."""
    answer = _plain(answer)
    return 100.0 * (bool(answer) and answer in map(_plain, labels_of(record)))


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").strip()


def vqa_paper(answer: str, record: dict) -> float:
    """min(1, 0.3 x matches) after VQA normalisation: TextVQA, VQAv2 and A-OKVQA in the ViCrop paper."""
    return 100 * min(1, 0.3 * [vqa_normal(label) for label in labels_of(record)].count(vqa_normal(answer)))


def textvqa(answer: str, record: dict) -> float:
    """TextVQA's own: EvalAI normalisation, leave-one-out soft accuracy (mmf, TextVQAAccuracyEvaluator)."""
    return leave_one_out(evalai_normal(answer), [evalai_normal(label) for label in labels_of(record)])


def vqav2(answer: str, record: dict) -> float:
    """VQAv2's own (vqaEval.py): leave-one-out soft accuracy; texts are normalised only if the labels differ."""
    answer, labels = one_line(answer), [one_line(label) for label in labels_of(record)]
    if len(set(labels)) > 1:
        answer, labels = vqa_normal(answer), [vqa_normal(label) for label in labels]
    return leave_one_out(answer, labels)


def aokvqa_direct(answer: str, record: dict) -> float | None:
    """A-OKVQA's direct answers (eval_predictions.py): min(1, matches / 3), exact; difficult ones are not counted."""
    return None if is_difficult(record) else 100 * min(1, labels_of(record).count(answer) / 3)


def is_difficult(record: dict) -> bool:
    """Is a question of A-OKVQA left out of its direct answers?"""
    return bool(record.get("difficult_direct_answer"))


def aokvqa_choice(answer: str, record: dict) -> float | None:
    """A-OKVQA's multiple choice (eval_predictions.py): exact; only records that have choices are counted."""
    if has_no_choices(record):
        return None
    choices, right = record["choices"], record.get("correct_choice_idx")
    if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise ValueError(f"{name_of(record)}: correct_choice_idx must be the number of a choice, not {right!r}")
    return 100.0 * (answer == choices[right])


def has_no_choices(record: dict) -> bool:
    """Is a question of A-OKVQA without choices, and so left out of its multiple choice?"""
    return not record.get("choices")


def gqa_paper(answer: str, record: dict) -> float:
    """100 if the answer contains the first label, both normalised: GQA, with one label, in the ViCrop paper."""
    label = vqa_normal(labels_of(record)[0])
    return 100.0 * (bool(label) and label in vqa_normal(answer))


def gqa(answer: str, record: dict) -> float:
    """GQA's own: 100 if answer and label are equal in lower case and without a final period."""
    return 100.0 * (_plain(answer) == _plain(labels_of(record)[0]))


def pope_paper(answer: str, record: dict) -> float:
    """Counts the answer as the nearer of "yes" and "no" (difflib's ratio; a tie is yes): POPE in the ViCrop paper."""
    return 100.0 * (nearest(answer, ("yes", "no")) == yes_or_no(record))


def pope(answer: str, record: dict) -> float:
    """POPE's own reading (evaluate.py): see `says_yes`."""
    return 100.0 * (says_yes(answer) == (yes_or_no(record) == "yes"))


def yes_or_no(record: dict) -> str:
    """The label of a record, "yes" or "no"; raises ValueError, naming the record, if it is neither."""
    label = labels_of(record)[0].strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f'{name_of(record)}: labels must be "yes" or "no", not {record["labels"]!r}')
    return label


def is_yes_or_no(record: dict) -> bool:
    """Is the label of a record "yes" or "no"?"""
    try:
        return bool(yes_or_no(record))
    except ValueError:
        return False


def says_yes(answer: str) -> bool:
    """Does an answer mean yes? It does unless its first sentence, without commas, has the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def docvqa_paper(answer: str, record: dict) -> float:
    """100 if the answer contains a label or a label contains it; an empty answer is wrong: DocVQA in ViCrop's paper."""
    return 100.0 * (bool(answer) and any(label and (answer in label or label in answer) for label in labels_of(record)))


def anls(answer: str, record: dict) -> float:
    """Average normalised Levenshtein similarity, 0 below 0.5: DocVQA's own (evaluation script of the RRC, task 1)."""
    plain = lambda text: " ".join(text.strip().lower().split())  # noqa: E731
    distances = []
    for label in labels_of(record):
        longest = max(len(label.upper()), len(answer.upper()))  # not as they are compared; "ß" is "SS" there
        distances.append(Levenshtein.distance(plain(label), plain(answer)) / longest if longest else 0.0)
    similarity = 1 - min(distances)
    return 100 * similarity if similarity >= 0.5 else 0.0


def vstar_paper(answer: str, record: dict) -> float:
    """Counts the answer as the letter of the nearest option line (difflib's ratio): V* in the ViCrop paper."""
    options = options_of(record)
    line = nearest(answer, [line for _, line, _ in options])
    return 100.0 * (next(letter for letter, own, _ in options if own == line) == labels_of(record)[0])


def nearest(answer: str, candidates: Sequence[str]) -> str:
    """The first of the candidates that are most similar to the answer by difflib's ratio."""
    return max(candidates, key=lambda candidate: difflib.SequenceMatcher(None, answer, candidate).ratio())


def vstar(answer: str, record: dict) -> float:
    """V* as a multiple choice: 100 for the right letter (see `chosen_letter`); an answer without any is wrong."""
    options_of(record)  # refuses the records that `vstar_paper` refuses, so that both count the same ones
    return 100.0 * (chosen_letter(answer, record["question"]) == labels_of(record)[0])


def options_of(record: dict) -> list[tuple[str, str, str]]:
    """The options of a record as `option_lines`, its label among them.

    Raises:
        ValueError: naming the record: its question has no proper options, or its label is none of them.
    """
    question, label = field_of(record, "question"), labels_of(record)[0]
    try:
        return choices(question, label)
    except ValueError as error:
        raise ValueError(f"{name_of(record)}: {error}") from None


def hrbench(answer: str, record: dict) -> float:
    """HR-Bench as VLMEvalKit scores it without a judge (see option_letters.matched_letter)."""
    letter = matched_letter(answer.strip(), dict(map(option_of, lines_of_options(record))))
    return 100.0 * (letter == labels_of(record)[0])


def mme_realworld(answer: str, record: dict) -> float:
    """MME-RealWorld's own (eval_your_results.py; see option_letters.first_letter)."""
    return 100.0 * (first_letter(answer, lines_of_options(record)) == labels_of(record)[0])


def lines_of_options(record: dict) -> list[str]:
    """A record's `options` as they were shown, "A. red" or "(A) red"; a ValueError, naming the record, without any."""
    lines = record.get("options")
    right = isinstance(lines, list) and all(isinstance(line, str) and OPTION_LINE.fullmatch(line) for line in lines)
    if not lines or not right:
        raise ValueError(f"{name_of(record)}: options are a list of texts like 'A. red', not {lines!r}")
    return lines


def chartqa(answer: str, record: dict) -> float:
    """Relaxed accuracy: numbers within 5 % of the label, other answers equal in small letters (pix2struct, metrics.py).

    "5%" is 0.05. A label of 0 is compared as a text: nothing is within 5 % of it.
    """
    return 100.0 * any(relaxed_match(answer, label) for label in labels_of(record))


def relaxed_match(answer: str, label: str, most: float = 0.05) -> bool:
    """Is an answer a label, or a number that differs from it by at most the share `most`?"""
    said, right = as_number(answer), as_number(label)
    if said is None or not right:
        return answer.lower() == label.lower()
    return abs(said - right) / abs(right) <= most


def as_number(text: str) -> float | None:
    """The number that a text is, a percentage as its hundredth; None if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# RefCOCO as a task: not what is answered counts, but where the crop is. The crop of no crop is the whole image.
def box_point(answer: str, record: dict) -> float:
    """100 if the middle of the crop lies in `gt_bbox` (the pointing game)."""
    (left, top, right, bottom), (x1, y1, x2, y2) = crop_and_truth(record)
    return 100.0 * (x1 <= (left + right) / 2 <= x2 and y1 <= (top + bottom) / 2 <= y2)


def box_inside(answer: str, record: dict) -> float:
    """The part of `gt_bbox` that the crop shows, in %."""
    (left, top, right, bottom), (x1, y1, x2, y2) = crop_and_truth(record)
    sides = max(0.0, min(right, x2) - max(left, x1)), max(0.0, min(bottom, y2) - max(top, y1))
    return 100 * sides[0] * sides[1] / ((x2 - x1) * (y2 - y1))


def box_iou(answer: str, record: dict) -> float:
    """Intersection over union of the crop and `gt_bbox`, in %."""
    return 100 * iou(*crop_and_truth(record))


def crop_and_truth(record: dict) -> tuple[Sequence[float], Sequence[float]]:
    """The box of a record's crop, or of its whole image where it has none, and `gt_bbox` (xyxy pixels).

    Raises:
        ValueError: naming the record: one is no box, or the size of the image is not known.
    """
    size = field_of(record, "image_size")
    if size is None or record.get("gt_bbox") is None:
        raise ValueError(f"{name_of(record)}: image_size and gt_bbox are needed to judge where a crop is")
    truth = box_of(record)
    return (box_of(record, "bbox") if record.get("bbox") else (0, 0, *size)), truth


_ALL = (exact, vqa_paper, textvqa, vqav2, aokvqa_direct, aokvqa_choice, gqa_paper, gqa, pope_paper, pope)
_ALL += (docvqa_paper, anls, vstar_paper, vstar, hrbench, mme_realworld, chartqa, box_point, box_inside, box_iou)
GRADERS: Mapping[str, Grader] = {grader.__name__: grader for grader in _ALL}
RIGHT = 50  # an answer with at least this score counts as right where only right or wrong is asked
OF_BOXES = ("box_point", "box_inside", "box_iou")  # graders that read no labels
NOT_COUNTED = {"aokvqa_direct": is_difficult, "aokvqa_choice": has_no_choices}  # when these graders return None


# These count how many of a question's ten labels an answer equals: with so many of them it may be wholly right.
ENOUGH_LABELS = {"vqa_paper": 4, "textvqa": 4, "vqav2": 4, "aokvqa_direct": 3}


def metrics_named(names: Sequence[str], folder: str | Path = ".") -> dict[str, str]:
    """{metric: grader} of names of GRADERS, or of one's own functions, FILE.py:function.

    Args:
        folder: from which FILE is seen.
    Raises:
        ValueError: no such metric, file or function; two are called alike.
    """
    found = {}
    for name in names:
        grader = seen_from(name, folder) if is_own(name) else name
        refuse_bad_grader(grader)
        metric = parts_of(grader)[1] if is_own(grader) else grader
        if metric in found:
            raise ValueError(f"two metrics are called {metric!r}: name each once")
        found[metric] = grader
    return found


def refuse_bad_grader(name: str) -> None:
    """ValueError unless a name is one of GRADERS, or that of a function of one's own that can be called."""
    try:
        _ = own_metric(name) if is_own(name) else GRADERS[name]
    except KeyError:
        known(name, [*GRADERS, "FILE.py:function"], "metric")


def graded(answer: str, record: dict, grader: str) -> float | None:
    """0 to 100 by the grader of that name; None if it does not count the record.

    Raises:
        ValueError: naming the record: it has no labels, or something else cannot be graded.
    """
    if not is_own(grader):
        return GRADERS[grader](answer, record)
    labels = labels_of(record)
    try:
        return own_score(grader, answer, labels)
    except ValueError as error:
        raise ValueError(f"{name_of(record)}: {error}") from error


def note_on_few_labels(records: Iterable[dict], grader: str) -> str | None:
    """A sentence if records have fewer labels than a grader needs to find an answer wholly right; else None."""
    enough, labels = ENOUGH_LABELS.get(grader, 1), [record.get("labels") for record in records]
    counts = [1 if isinstance(each, str) else len(each) for each in labels if isinstance(each, str | list)]
    few = sum(0 < count < enough for count in counts)
    if not few:
        return None
    return (f"{grader} expects ten labels of a question: with fewer than {enough}, as {few} records have, a right "
            "answer gets less than 100 %; the metric `exact` needs one")  # fmt: skip


def score(record: dict, grader: str) -> Scores | None:
    """(without crop, with crop) by the grader of that name; None if it does not count the record.

    A record with an error is wrong and is not graded: it may lack what the grader reads. The answer without a crop is
    graded as that of a record without one (`bbox`).

    Raises:
        ValueError: naming the record: an answer is no text, there are no labels, or something else cannot be graded.
    """
    if "error" in record:
        return None if grader in NOT_COUNTED and NOT_COUNTED[grader](record) else (0.0, 0.0)
    answers = [field_of(record, field, Result) for field in ("original_answer", "crop_answer")]
    uncropped = {name: value for name, value in record.items() if name != "bbox"}
    before, after = (graded(answer, each, grader) for answer, each in zip(answers, (uncropped, record), strict=True))
    return None if before is None or after is None else (before, after)


def outcome(pair: Scores) -> str:
    """What the crop did to an answer, given both scores: fixed, broken, right (both are) or wrong (both are)."""
    before, after = (value >= RIGHT for value in pair)
    return ("right" if after else "broken") if before else ("fixed" if after else "wrong")


# ---------------------------------------------------------------------------------------------- more than a mean score
def pope_details(answers: Sequence[str], records: Sequence[dict]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and how often it is said, in %; other labels than yes and no are left out."""
    labelled = [(answer, record) for answer, record in zip(answers, records, strict=True) if is_yes_or_no(record)]
    if not labelled:
        return {}
    answers, records = zip(*labelled, strict=True)
    true = [yes_or_no(record) == "yes" for record in records]
    said = [not so if "error" in record else says_yes(answer)  # a record with an error counts as the wrong answer
            for answer, record, so in zip(answers, records, true, strict=True)]  # fmt: skip
    hits, says, is_so = sum(map(min, said, true)), sum(said), sum(true)
    precision, recall = hits / says if says else 0.0, hits / is_so if is_so else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "yes_ratio": 100 * says / len(said)}


def vstar_details(answers: Sequence[str], records: Sequence[dict]) -> dict[str, int]:
    """{"unparsed": the number of answers from which no option can be read}."""
    letters = [None if "error" in record else chosen_letter(answer, record["question"])
               for answer, record in zip(answers, records, strict=True)]  # fmt: skip
    return {"unparsed": letters.count(None)}


def hrbench_details(answers: Sequence[str], records: Sequence[dict]) -> dict[str, float]:
    """{"average of cycles": the mean of the accuracies of the permutations, in %}, which HR-Bench reports."""
    cycles = defaultdict(list)
    for answer, record in zip(answers, records, strict=True):
        cycles[str(record.get("cycle"))].append(0.0 if "error" in record else hrbench(answer, record))
    return {"average of cycles": sum(sum(each) / len(each) for each in cycles.values()) / len(cycles)}


def mme_details(answers: Sequence[str], records: Sequence[dict]) -> dict[str, int]:
    """{"E": how often E is chosen, which says that the others are wrong}, as eval_your_results.py prints it."""
    letters = ["" if "error" in record else first_letter(answer, lines_of_options(record))
               for answer, record in zip(answers, records, strict=True)]  # fmt: skip
    return {"E": letters.count("E")}


# grader -> the function that gives further figures of its answers
DETAILS: Mapping[str, Callable[[Sequence[str], Sequence[dict]], Mapping[str, Any]]] = {
    "pope": pope_details, "vstar": vstar_details, "hrbench": hrbench_details, "mme_realworld": mme_details,
}  # fmt: skip
