"""Answers made alike before they are compared, as the VQA benchmarks do it. Needs no torch."""

import re
from functools import lru_cache

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
    return _words(_unpunctuated(one_line(text)))


@lru_cache(maxsize=1 << 18)
def evalai_normal(text: str) -> str:
    """`vqa_normal` as TextVQA's evaluation does it (mmf, EvalAIAnswerProcessor): commas and 's are treated first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_unpunctuated(one_line(text)))


def one_line(text: str) -> str:
    """A text without line breaks, tabs and outer spaces."""
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
