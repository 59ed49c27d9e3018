"""How right an answer is: the paper's scores and the benchmarks' official ones, side by side. Needs no torch.

A grader is `(answer, record) -> 0..100`, or None where the benchmark does not count the record. They are named in
`info.TASKS`.
"""

import difflib
import re
from functools import lru_cache

from rapidfuzz.distance import Levenshtein

from vicrop.dataset import Result, field_of, name_of
from vicrop.tables import TASKS

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
# A word of which one apostrophe is missing gets it back. The official list takes "somebody'd" the other way.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in APOSTROPHES.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # so many at most: the official code passes a flag where the number of replacements belongs


@lru_cache(maxsize=1 << 18)
def vqa_normal(text):
    """A text without punctuation, articles and capitals, number words as digits (VQA, vqaEval.py)."""
    return _words(_unpunctuated(_one_line(text)))


@lru_cache(maxsize=1 << 18)
def evalai_normal(text):
    """The same as TextVQA's evaluation does it (EvalAI, mmf's EvalAIAnswerProcessor): commas and 's first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_unpunctuated(_one_line(text)))


def _one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def _unpunctuated(text):
    number, found = COMMA_IN_NUMBER.search(text) is not None, text
    for mark in PUNCTUATION:
        glued = not (number or f"{mark} " in found or f" {mark}" in found)
        text = text.replace(mark, " " if glued else "")
    return PERIOD.sub("", text, PERIODS)


def _words(text):
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


# -------------------------------------------------------------------------------------------------------------- labels
def labels_of(record):
    """The labels of a record as a list of texts; raises ValueError, naming the record, if it has none."""
    labels = field_of(record, "labels")
    if not labels:
        raise ValueError(f"{name_of(record)}: labels are a text or a list of texts, not {labels!r}")
    return [labels] if isinstance(labels, str) else labels


def leave_one_out(answer, labels):
    """Mean over the labels of min(1, matches among the others / 3), times 100."""
    matches = labels.count(answer)
    scores = [min(1, (matches - (label == answer)) / 3) for label in labels]
    return 100 * sum(scores) / len(scores)


# ------------------------------------------------------------------------------------------------------------- graders
def exact(answer, record):
    """100 if the answer equals a label once both are lower-cased and stripped of outer spaces and a final period."""
    answer = _plain(answer)
    return 100.0 * (bool(answer) and answer in map(_plain, labels_of(record)))


def _plain(text):
    return text.strip().lower().removesuffix(".").strip()


def vqa_paper(answer, record):
    """min(1, 0.3 x matches) after VQA normalisation: TextVQA, VQAv2 and A-OKVQA in the ViCrop paper."""
    return 100 * min(1, 0.3 * [vqa_normal(label) for label in labels_of(record)].count(vqa_normal(answer)))


def textvqa(answer, record):
    """TextVQA's own: EvalAI normalisation, leave-one-out soft accuracy (mmf, TextVQAAccuracyEvaluator)."""
    return leave_one_out(evalai_normal(answer), [evalai_normal(label) for label in labels_of(record)])


def vqav2(answer, record):
    """VQAv2's own (vqaEval.py): leave-one-out soft accuracy; normalised only where the labels differ."""
    answer, labels = _one_line(answer), [_one_line(label) for label in labels_of(record)]
    if len(set(labels)) > 1:
        answer, labels = vqa_normal(answer), [vqa_normal(label) for label in labels]
    return leave_one_out(answer, labels)


def aokvqa_direct(answer, record):
    """A-OKVQA's direct answers (eval_predictions.py): min(1, matches / 3), exact; difficult ones are not counted."""
    return None if is_difficult(record) else 100 * min(1, labels_of(record).count(answer) / 3)


def is_difficult(record):
    return bool(record.get("difficult_direct_answer"))


def aokvqa_choice(answer, record):
    """A-OKVQA's multiple choice (eval_predictions.py): exact; only records that have choices are counted."""
    if has_no_choices(record):
        return None
    choices, right = record["choices"], record.get("correct_choice_idx")
    if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise ValueError(f"{name_of(record)}: correct_choice_idx {right!r} is the number of no choice")
    return 100.0 * (answer == choices[right])


def has_no_choices(record):
    return not record.get("choices")


def gqa_paper(answer, record):
    """Is the label part of the answer, both normalised? GQA in the ViCrop paper, with one label."""
    label = vqa_normal(labels_of(record)[0])
    return 100.0 * (bool(label) and label in vqa_normal(answer))


def gqa(answer, record):
    """GQA's: the answer is the label, once lower-cased and without a final period."""
    return 100.0 * (_plain(answer) == _plain(labels_of(record)[0]))


def pope_paper(answer, record):
    """The nearer of "yes" and "no" (difflib's ratio; yes if equal): POPE in the ViCrop paper."""
    return 100.0 * (nearest(answer, ("yes", "no")) == yes_or_no(record))


def pope(answer, record):
    """POPE's own reading (evaluate.py): see `says_yes`."""
    return 100.0 * (says_yes(answer) == (yes_or_no(record) == "yes"))


def yes_or_no(record):
    """The label of a record, "yes" or "no"; raises ValueError, naming the record, if it is neither."""
    label = labels_of(record)[0].strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f'{name_of(record)}: labels must be "yes" or "no", not {record["labels"]!r}')
    return label


def is_yes_or_no(record):
    """Is the label of a record "yes" or "no"?"""
    try:
        return bool(yes_or_no(record))
    except ValueError:
        return False


def says_yes(answer):
    """Does an answer mean yes? No if its first sentence, without commas, has the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def docvqa_paper(answer, record):
    """Is a label part of the answer, or the answer part of a label? DocVQA in the ViCrop paper; nothing is wrong."""
    return 100.0 * (bool(answer) and any(label and (answer in label or label in answer) for label in labels_of(record)))


def anls(answer, record):
    """Average normalised Levenshtein similarity, 0 below 0.5: DocVQA's own (evaluation script of the RRC, task 1)."""
    plain = lambda text: " ".join(text.strip().lower().split())  # noqa: E731
    distances = []
    for label in labels_of(record):
        longest = max(len(label.upper()), len(answer.upper()))  # not as they are compared; "ß" is "SS" there
        distances.append(Levenshtein.distance(plain(label), plain(answer)) / longest if longest else 0.0)
    similarity = 1 - min(distances)
    return 100 * similarity if similarity >= 0.5 else 0.0


def vstar_paper(answer, record):
    """The letter of the nearest option line (difflib's ratio): V* in the ViCrop paper."""
    options = options_of(record)
    line = nearest(answer, [line for _, line, _ in options])
    return 100.0 * (next(letter for letter, own, _ in options if own == line) == labels_of(record)[0])


def nearest(answer, candidates):
    """The first of the candidates that are most similar to the answer by difflib's ratio."""
    return max(candidates, key=lambda candidate: difflib.SequenceMatcher(None, answer, candidate).ratio())


def vstar(answer, record):
    """V* as a multiple choice: the letter that the answer says (see `chosen_letter`); unparsed answers are wrong."""
    options_of(record)  # refuses what one of both metrics could not score
    return 100.0 * (chosen_letter(answer, record["question"]) == labels_of(record)[0])


def options_of(record: dict) -> list[tuple[str, str, str]]:
    """The options of a record as `option_lines`, its label among them.

    Raises:
        ValueError: naming the record: its question has no options that can be told apart, or its label is none of them.
    """
    question, label = field_of(record, "question"), labels_of(record)[0]
    try:
        return choices(question, label)
    except ValueError as error:
        raise ValueError(f"{name_of(record)}: {error}") from None


def choices(question: str, label: str) -> list[tuple[str, str, str]]:
    """The options of a question as `option_lines`; a ValueError if they are none, or the label is none of them."""
    options = option_lines(question)
    letters = [letter for letter, *_ in options]
    if not letters:
        raise ValueError("its question has no lines like '(A) red'")
    following = [f"({letter})" for letter in LETTERS[len(letters) :][:1]]
    joined = any(mark in text for mark in following for *_, text in options)  # several stand on one line
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

    What stands before them, between ("Options:") and behind (an instruction) does not matter.
    """
    found = map(OPTION.fullmatch, question.split("\n")[1:])
    return [(each[2], each[1], each[3]) for each in found if each]


SAID_BEFORE = r"(?:(?:the )?(?:correct )?(?:answer|option)(?: is)?:? ?){0,2}"  # "The answer is option"
LETTER = re.compile(rf"^{SAID_BEFORE}\(?([A-Z])(?:[).:,\n]|$)", re.IGNORECASE)


def chosen_letter(answer, question):
    """The letter of the option that an answer to a question with lines "(A) text" chooses, or None.

    A letter at its beginning counts if nothing or a mark follows ("A", "(A) red", "A: red", not "A red one"); else the
    only option whose text is in the answer ("dark red" does not name an option "red").
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


def without_longer(said, text, texts):
    """What is said without those of the texts that have this one in them."""
    for longer in texts:
        if text in longer and text != longer:
            said = said.replace(longer, " | ")
    return said


_ALL = (exact, vqa_paper, textvqa, vqav2, aokvqa_direct, aokvqa_choice, gqa_paper, gqa, pope_paper, pope)
_ALL += (docvqa_paper, anls, vstar_paper, vstar)
GRADERS = {grader.__name__: grader for grader in _ALL}
RIGHT = 50  # where one has to say whether an answer is right: a score from here on
NOT_COUNTED = {"aokvqa_direct": is_difficult, "aokvqa_choice": has_no_choices}  # when these graders return None


def first_grader(task):
    """The grader of a task's first metric, for those who want only one."""
    return next(iter(TASKS[task]["metrics"].values()))


def score(record, grader):
    """(without crop, with crop), or None where the grader does not count the record.

    An error is wrong, and is not graded: what the record lacks may be the reason for it.

    Raises:
        ValueError: naming the record: an answer that is no text, no labels, or whatever else cannot be graded.
    """
    if "error" in record:
        return None if grader in NOT_COUNTED and NOT_COUNTED[grader](record) else (0.0, 0.0)
    answers = [field_of(record, field, Result) for field in ("original_answer", "crop_answer")]
    scores = [GRADERS[grader](answer, record) for answer in answers]
    return None if None in scores else tuple(scores)


def outcome(pair):
    """What the crop did to an answer, given both scores: it fixed or broke it, or both are right, or both wrong."""
    before, after = (value >= RIGHT for value in pair)
    return ("right" if after else "broken") if before else ("fixed" if after else "wrong")


# ---------------------------------------------------------------------------------------------- more than a mean score
def pope_details(answers, records):
    """Precision, recall and F1 of "yes", and how often it is said, in %; errors that lack labels are not among it."""
    labelled = [(answer, record) for answer, record in zip(answers, records, strict=True) if is_yes_or_no(record)]
    if not labelled:
        return {}
    answers, records = zip(*labelled, strict=True)
    true = [yes_or_no(record) == "yes" for record in records]
    said = [not so if "error" in record else says_yes(answer)  # an error is wrong, whichever it had to be
            for answer, record, so in zip(answers, records, true, strict=True)]  # fmt: skip
    hits, says, is_so = sum(map(min, said, true)), sum(said), sum(true)
    precision, recall = hits / says if says else 0.0, hits / is_so if is_so else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "yes_ratio": 100 * says / len(said)}


def vstar_details(answers, records):
    """How many answers choose no option that can be told."""
    letters = [None if "error" in record else chosen_letter(answer, record["question"])
               for answer, record in zip(answers, records, strict=True)]  # fmt: skip
    return {"unparsed": letters.count(None)}


DETAILS = {"pope": pope_details, "vstar": vstar_details}  # grader -> further figures of its answers
