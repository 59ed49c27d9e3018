"""Greedy decoding of a batch of rows, on from drafts: what is said, and how probable it was.

answers = Decoding(scores, drafts, ends, most)      # what greedy decoding confirms of the drafts, and one token more
while not answers.over:
    answers.add(scores_after(answers.last))

A draft is what an answer may turn out to be. It is read together with the prompt, so that confirming it takes no steps
of its own; where it is wrong, the right token is known at once. What comes out is the same with any draft.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor


class Answer(NamedTuple):
    """An answer, and how sure the model was of it.

    Attributes:
        text: what was said, stripped.
        confidence: the product of its tokens' probabilities, the end token's included; five digits, so that what
            another batch or another order of work would change is not in it.
        tokens: their ids, with the end token if there was one.
    """

    text: str
    confidence: float
    tokens: tuple[int, ...]


Draft = Sequence[int]  # token ids, as those of an Answer


def likeliest(scores: Tensor) -> tuple[list, list]:
    """(the likeliest token, its log-probability), nested as the axes of logits (..., vocabulary) float32."""
    values, tokens = scores.max(-1)
    return tokens.tolist(), (values - scores.logsumexp(-1)).tolist()


class Decoding:
    """The answers of a batch while they are made.

    Args:
        scores: (batch, width, vocabulary) float32 logits, all rows ending together: of a row with a draft of n tokens
            the last n are those after its prompt and after each of the draft's tokens but the last; of a row without
            one the last.
        drafts: for each row token ids; empty where there is none.
        ends: tokens that end an answer; most: tokens that an answer has at most.

    Attributes:
        tokens: for each row those of its answer so far, up to an end token.
        logs: for each row their log-probabilities.
        unread: for each row how many tokens have been read in vain, as they came after a wrong one or an end.
    """

    def __init__(self, scores: Tensor, drafts: Sequence[Draft], ends: Collection[int], most: int):
        self.ends, self.most = frozenset(ends), most
        self.tokens: list[list[int]] = []
        self.logs: list[list[float]] = []
        self.unread: list[int] = []
        for best, logs, draft in zip(*likeliest(scores), drafts, strict=True):
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

    def add(self, scores: Tensor) -> None:
        """Take the likeliest next token of the rows that are not complete; scores (batch, vocabulary) float32."""
        for tokens, logs, token, log in zip(self.tokens, self.logs, *likeliest(scores), strict=True):
            if not self._is_over(tokens):
                tokens.append(token)
                logs.append(log)
