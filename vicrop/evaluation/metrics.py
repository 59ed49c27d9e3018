"""How right an answer is: the paper's scores and the benchmarks' official ones, side by side. Needs no torch.

A grader is a function (answer, record) that returns 0 to 100, or None if the benchmark does not count the record.
`tables.TASKS` names the graders of each benchmark; own data may have any of them, or one's own (see own_metrics.py).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from vicrop.dataset import Result, field_of, name_of
from vicrop.evaluation.own_metrics import is_own, own_metric, own_score, parts_of, seen_from
from vicrop.tables import known

Grader = Callable[[str, dict], float | None]
Scores = tuple[float, float]  # without crop, with crop

# -------------------------------------------------------------------------------------------------- normalised answers
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = {"a", "an", "the"}
APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
# A word that lacks one apostrophe -> the word with it. The official list has "somebody'd" the other way round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # replaced at most: the official code passes a flag (of value 32) where the number of them belongs


@lru_cache(maxsize=1 << 18)
def vqa_normal(text: str) -> str:
    """A text in lower case, without punctuation and articles, with digits for number words (VQA, vqaEval.py)."""
    return _words(_unpunctuated(_one_line(text)))


@lru_cache(maxsize=1 << 18)
def evalai_normal(text: str) -> str:
    """`vqa_normal` as TextVQA's evaluation does it (mmf, EvalAIAnswerProcessor): commas and 's are treated first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_unpunctuated(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(text: str) -> str:
    number, found = COMMA_IN_NUMBER.search(text) is not None, text
    for mark in PUNCTUATION:
        glued = not (number or f"{mark} " in found or f" {mark}" in found)
        text = text.replace(mark, " " if glued else "")
    return PERIOD.sub("", text, PERIODS)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


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
    answer, labels = _one_line(answer), [_one_line(label) for label in labels_of(record)]
    if len(set(labels)) > 1:
        answer, labels = vqa_normal(answer), [vqa_normal(label) for label in labels]
    return leave_one_out(answer, labels)


def aokvqa_direct(answer: str, record: dict) -> float | None:
    """A-OKVQA's direct answers (eval_predictions.py): min(1, matches / 3), exact; difficult ones are not counted."""
    return None if is_difficult(record) else 100 * min(1, labels_of(record).count(answer) / 3)


def is_difficult(record: dict) -> bool:
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


def choices(question: str, label: str) -> list[tuple[str, str, str]]:
    """The options of a question as `option_lines`; a ValueError if it has none, or the label is none of them."""
    options = option_lines(question)
    letters = [letter for letter, *_ in options]
    if not letters:
        raise ValueError("its question has no lines like '(A) red'")
    following = [f"({letter})" for letter in LETTERS[len(letters) :][:1]]
    joined = any(mark in text for mark in following for *_, text in options)  # several options on one line
    if joined or len(letters) < 2 or sorted(letters) != LETTERS[: len(letters)]:
        raise ValueError("its question must have two options or more, each on a line of its own, with letters from A "
                         f"on, and has lines of {', '.join(letters)}")  # fmt: skip
    if label not in letters:
        raise ValueError(f"labels are the letter of an option ({', '.join(letters)}), not {label!r}")
    return options


LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
OPTION = re.compile(r"(?:\s*(?i:options?|choices?):)?(\s*\(?([A-Z])[).:]\s*(.*?)\s*)")


def option_lines(question: str) -> list[tuple[str, str, str]]:
    """[(letter, its line, the text behind the letter)] of the options of a question, "(A) red" or "A. red".

    Other text before, between ("Options:") and after them (an instruction) does not matter.
    """
    found = map(OPTION.fullmatch, question.split("\n")[1:])
    return [(each[2], each[1], each[3]) for each in found if each]


SAID_BEFORE = r"(?:(?:the )?(?:correct )?(?:answer|option)(?: is)?:? ?){0,2}"  # "The answer is option"
LETTER = re.compile(rf"^{SAID_BEFORE}\(?([A-Z])(?:[).:,\n]|$)", re.IGNORECASE)


def chosen_letter(answer: str, question: str) -> str | None:
    """The letter of the option that an answer to a question with lines "(A) text" chooses, or None.

    A letter at its beginning counts if nothing or a mark follows it ("A", "(A) red", "A: red", not "A red one"). Else
    the only option counts whose text is in the answer (where "dark red" is an option, it does not also name "red").
    """
    options = {letter: text for letter, _, text in option_lines(question)}
    found = LETTER.match(answer.strip())
    if found and found[1].upper() in options:
        return found[1].upper()
    said = f" {vqa_normal(answer)} "
    texts = {letter: f" {vqa_normal(text)} " for letter, text in options.items() if text}
    texts = {letter: text for letter, text in texts.items() if text in said}
    named = [letter for letter, text in texts.items() if text in without_longer(said, text, texts.values())]
    return named[0] if len(named) == 1 else None


def without_longer(said: str, text: str, texts: Iterable[str]) -> str:
    """`said`, without those of `texts` that are longer than `text` and contain it."""
    for longer in texts:
        if text in longer and text != longer:
            said = said.replace(longer, " | ")
    return said


_ALL = (exact, vqa_paper, textvqa, vqav2, aokvqa_direct, aokvqa_choice, gqa_paper, gqa, pope_paper, pope)
_ALL += (docvqa_paper, anls, vstar_paper, vstar)
GRADERS: Mapping[str, Grader] = {grader.__name__: grader for grader in _ALL}
RIGHT = 50  # an answer with at least this score counts as right where only right or wrong is asked
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

    A record with an error is wrong and is not graded: it may lack what the grader reads.

    Raises:
        ValueError: naming the record: an answer is no text, there are no labels, or something else cannot be graded.
    """
    if "error" in record:
        return None if grader in NOT_COUNTED and NOT_COUNTED[grader](record) else (0.0, 0.0)
    answers = [field_of(record, field, Result) for field in ("original_answer", "crop_answer")]
    before, after = (graded(answer, record, grader) for answer in answers)
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


# grader -> the function that gives further figures of its answers
DETAILS: Mapping[str, Callable[[Sequence[str], Sequence[dict]], Mapping[str, Any]]] = {
    "pope": pope_details, "vstar": vstar_details,
}  # fmt: skip
