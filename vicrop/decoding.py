"""Greedy decoding of a batch of rows, on from drafts: what is said, and how probable it was.

answers = Decoding(logits, drafts, ends, most)      # what greedy decoding confirms of the drafts, and one token more
while not answers.over:
    answers.add(logits_after(answers.last))

A draft is what an answer may turn out to be. It is read together with the prompt, so that confirming it takes no steps
of its own; where it is wrong, the right token is known at once. What comes out is the same with any draft.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# (token ids said so far, (vocabulary,) float32 logits) -> scores of the same shape: the next token has the highest one.
Rule = Callable[[Sequence[int], Tensor], Tensor]


class Answer(NamedTuple):
    """An answer, and how sure the model was of it.

    Attributes:
        text: what was said, stripped.
        confidence: the product of its tokens' probabilities by the model's logits, the end token's included; five
            digits, so that what another batch or another order of work would change is not in it.
        tokens: their ids, with the end token if there was one.
    """

    text: str
    confidence: float
    tokens: tuple[int, ...]


Draft = Sequence[int]  # token ids, as those of an Answer


def usable(drafts: Sequence[Draft], config: Any, tokenizer: Any, most: int) -> list[Draft]:
    """Drafts as far as they can be read behind a prompt: a mark of an image among them would be taken for one.

    Args:
        config, tokenizer: the model's, which know its marks; most: tokens that an answer has at most.
    """
    named = [value for name, value in vars(config).items() if "_token_" in name and isinstance(value, int)]
    special, cut = {*named, *tokenizer.all_special_ids}, []
    for draft in drafts:
        stop = next((n for n, token in enumerate(draft, 1) if token in special), len(draft))
        cut.append(tuple(draft[: min(stop, most)]))
    return cut


def highest(scores: Tensor, logits: Tensor) -> tuple[list, list]:
    """(the token of the highest score, its log-probability by the logits), nested as the axes of (..., vocabulary)."""
    tokens = scores.argmax(-1)
    logs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    return tokens.tolist(), logs.tolist()


def ruled(rules: Sequence[Rule], said: Sequence[Sequence[Sequence[int]]], logits: Tensor) -> Tensor:
    """The scores of (batch, width, vocabulary) logits by the rule of each row; without rules they are the logits.

    Args:
        said: for each row what was said before each of its last places, so many as are looked at.
    """
    if not rules:
        return logits
    scores = logits.clone()
    for row, rule, beginnings in zip(scores, rules, said, strict=True):
        for place, tokens in enumerate(beginnings, -len(beginnings)):
            row[place] = rule(tokens, row[place])
    return scores


class Decoding:
    """The answers of a batch while they are made.

    Args:
        logits: (batch, width, vocabulary) float32, all rows ending together: of a row with a draft of n tokens the
            last n are those after its prompt and after each of the draft's tokens but the last; of a row without one
            the last.
        drafts: for each row token ids; empty where there is none.
        ends: tokens that end an answer; most: tokens that an answer has at most.
        rules: for each row what chooses the next token; none: the likeliest is chosen.

    Attributes:
        tokens: for each row those of its answer so far, up to an end token.
        logs: for each row their log-probabilities.
        unread: for each row how many tokens have been read in vain, as they came after a wrong one or an end.
    """

    def __init__(self, logits: Tensor, drafts: Sequence[Draft], ends: Collection[int], most: int,
                 rules: Sequence[Rule] = ()):  # fmt: skip
        self.ends, self.most, self.rules = frozenset(ends), most, rules
        self.tokens: list[list[int]] = []
        self.logs: list[list[float]] = []
        self.unread: list[int] = []
        said = [[draft[:count] for count in range(max(1, len(draft)))] for draft in drafts]
        for best, logs, draft in zip(*highest(ruled(rules, said, logits), logits), drafts, strict=True):
            read = max(1, len(draft))
            best, logs = best[-read:], logs[-read:]
            agreed = next((n for n, (own, other) in enumerate(zip(best, draft, strict=False)) if own != other), read)
            taken = self._up_to_end(best[: min(agreed + 1, most)])
            self.tokens.append(taken)
            self.logs.append(logs[: len(taken)])
            self.unread.append(read - len(taken))

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        return tokens[: next((n for n, token in enumerate(tokens, 1) if token in self.ends), len(tokens))]

    def _is_over(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ends or len(tokens) >= self.most

    @property
    def over(self) -> bool:
        """Is every row's answer complete?"""
        return all(map(self._is_over, self.tokens))

    @property
    def last(self) -> list[int]:
        """For each row the last token of its answer, which the decoder has not read."""
        return [tokens[-1] for tokens in self.tokens]

    def add(self, logits: Tensor) -> None:
        """Take the next token of the rows that are not complete; logits (batch, vocabulary) float32."""
        scores = ruled(self.rules, [[tokens] for tokens in self.tokens], logits[:, None])[:, 0]
        for tokens, logs, token, log in zip(self.tokens, self.logs, *highest(scores, logits), strict=True):
            if not self._is_over(tokens):
                tokens.append(token)
                logs.append(log)
