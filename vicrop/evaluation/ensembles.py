"""Several results as one: of each question the answer that the models are surest of, or that most give. No torch.

python get_score.py --ensemble A.json B.json C.json
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vicrop.evaluation.confidence import has_confidence, sureness, why_without
from vicrop.evaluation.paired import Common, in_common, names_of
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions

NO_CROP = "no crop"
COLUMNS = ("task", "metric", "member", "n", "score", "against the best", "95 % interval", "p")
LEFT = 3  # columns that are flush left


class Vote(NamedTuple):
    """An answer of one member to one question."""

    answer: str
    confidence: float
    score: float


def highest(votes: Sequence[Vote]) -> Vote:
    """The vote that is the most probable answer; where several are, the `frequent` one, and of these the last.

    Probabilities in results are rounded, so of a model that is sure many are 1.
    """
    most = max(vote.confidence for vote in votes)
    return frequent([vote for vote in votes if vote.confidence == most])[-1]


def majority(votes: Sequence[Vote]) -> Vote:
    """The most probable of the votes for the answer that most members give; of several such answers likewise."""
    return highest(frequent(votes))


def frequent(votes: Sequence[Vote]) -> list[Vote]:
    """The votes for the answer that most of them give, or for all such answers."""
    said = [" ".join(vote.answer.split()).rstrip(".").lower() for vote in votes]
    counts = Counter(said)
    return [vote for vote, answer in zip(votes, said, strict=True) if counts[answer] == max(counts.values())]


RULES: dict[str, Callable[[Sequence[Vote]], Vote]] = {"highest p": highest, "majority, then p": majority}


def votes_of(files: Sequence[ResultFile], common: Common) -> dict[str, list[Vote]]:
    """{member: its votes, question by question}: each file's answers with crop, and first answers, once if alike."""
    names, firsts = names_of(files), list(map(first_answers, common.records))
    called, members = names_of_firsts(files, firsts), {}
    for name, first, records, pairs in zip(names, firsts, common.records, common.pairs, strict=True):
        sure = [sureness(record) or (0.0, 0.0) for record in records]
        for member, field, which in ((called[first], "original_answer", 0), (name, "crop_answer", 1)):
            rows = zip(records, sure, pairs, strict=True)
            votes = [Vote(str(each.get(field) or ""), p[which], pair[which]) for each, p, pair in rows]
            members.setdefault(member, votes)
    return members


def first_answers(records: Sequence[dict]) -> tuple[str, ...]:
    """What was answered without a crop."""
    return tuple(str(record.get("original_answer")) for record in records)


def names_of_firsts(files: Sequence[ResultFile], firsts: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """{first answers: what they are called}: by the model, and by the file where checkpoints or prompts differ too."""
    several = len({file.model for file in files}) > 1
    owners = dict(reversed([*zip(firsts, zip(files, names_of(files), strict=True), strict=True)]))
    called = {first: f"{file.model} {NO_CROP}" if several else NO_CROP for first, (file, _) in owners.items()}
    alike = Counter(called.values())
    return {first: f"{called[first]} before {name}" if alike[called[first]] > 1 else called[first]
            for first, (_, name) in owners.items()}  # fmt: skip


def chosen_by_rules(members: Mapping[str, Sequence[Vote]]) -> dict[str, np.ndarray]:
    """{rule: the score of the answer that it chooses, question by question}."""
    questions = list(zip(*members.values(), strict=True))
    return {rule: np.array([choose(votes).score for votes in questions]) for rule, choose in RULES.items()}


def ensemble_rows(files: Sequence[ResultFile], options: ScoreOptions) -> list[dict[str, Any]]:
    """For each metric a row of each member, and of each of the RULES with its difference to the best member.

    Raises:
        ValueError: a result does not tell how sure the model was, or asks other questions.
    """
    for file in files:
        if not has_confidence(file.records):
            raise ValueError(why_without(file))
    rows = []
    for common in in_common(files, options):
        members = votes_of(files, common)
        scores = {name: np.array([vote.score for vote in votes]) for name, votes in members.items()}
        best = max(scores, key=lambda name: scores[name].mean())
        about = {"task": files[0].task, "metric": common.metric, "n": len(scores[best]), "left_out": common.left_out}
        rows += [about | {"member": name, "score": each.mean()} for name, each in scores.items()]
        for rule, chosen in chosen_by_rules(members).items():
            rows.append(about | {"member": rule, "score": chosen.mean(), "best": best}
                        | common.change(chosen, scores[best], options))  # fmt: skip
        oracle = np.max(list(scores.values()), axis=0)
        rows.append(about | {"member": "the best answer of all (oracle)", "score": oracle.mean()})
    return rows


def ensemble_cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row, in COLUMNS."""
    against = [f"{row['difference']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"] if "low" in row else ["", ""]
    p = f"{row['mcnemar_p']:.2g}" if "mcnemar_p" in row else ""
    name = f"{row['member']} (best: {row['best']})" if "best" in row else row["member"]
    return [row["task"], row["metric"], name, str(row["n"]), f"{row['score']:.2f}", *against, p]
