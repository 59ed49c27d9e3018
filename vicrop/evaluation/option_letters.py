"""Which option of a multiple choice an answer means: our reading, and those of two benchmarks. Needs no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence

from vicrop.evaluation.normal_text import vqa_normal


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


OPTION_LINE = re.compile(r"(?:([A-Z])\. |\(([A-Z])\) ?)(.*)", re.DOTALL)


def option_of(line: str) -> tuple[str, str]:
    """(letter, text) of an option as a benchmark lists it, "A. red" or "(A) red".

    Raises:
        ValueError: it is neither.
    """
    found = OPTION_LINE.fullmatch(line)
    if not found:
        raise ValueError(f"options begin like 'A. red' or '(A) red', not {line!r}")
    return found[1] or found[2], found[3]


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


# --------------------------------------------------------------------------------------- as other code reads answers
# What VLMEvalKit takes for a refusal; it counts as the letter Z, which is no option.
REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 5  # a letter counts among the last words of an answer only


def matched_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that VLMEvalKit reads without a judge (`can_infer` of its matching_util.py); None if it reads none.

    Its revisions differ. This is the one in which a letter must be among the last words; at least one (134b4ea) turns
    the comparison round, and takes no letter of a short answer at all.

    The only option's letter that is a word of the answer counts, if it is one of the last five; else "answer is B";
    else the only option whose text is in the answer, unless that is twice as long as all options together.

    Args:
        options: letter -> text.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = ANSWER_IS.search(answer)
    if said and said[1].upper() in options:
        return said[1].upper()
    small = answer.lower()
    if len(small) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in small]
    return named[0] if len(named) == 1 else None


# What MME-RealWorld's eval_your_results.py deletes from answers. Its list lacks two commas, so that the last four texts
# are two, which no answer has.
PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer",
            "The best option is" "The correct option is", "Best answer:" "Best option:")  # fmt: skip
MANY_WORDS = 10  # an answer of more words is not looked for among the options


def first_letter(answer: str, lines: Sequence[str]) -> str:
    """The letter that MME-RealWorld's eval_your_results.py reads (`extract_characters_regex`); "" if it reads none.

    The first capital from A to E counts, wherever it stands ("Best answer: C" is B), else the first option of which the
    answer is a part (an empty one is a part of the first).

    Args:
        lines: the options as they are shown, "(A) red" or "A. red".
    """
    said = answer.strip()
    for prefix in PREFIXES:
        said = said.replace(prefix, "")
    letter = re.search("[ABCDE]", said)
    if letter:
        return letter[0]
    if len(said.split()) > MANY_WORDS:
        return ""
    return next((option_of(line)[0] for line in lines if said.lower() in line.lower()), "")
