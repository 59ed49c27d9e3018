"""Several results as one: of each question the answer that the models are surest of, or that most give. No torch.

python get_score.py --ensemble A.json B.json C.json
"""

from collections import Counter, defaultdict
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
    """The vote that is the most probable answer; the later one where several are."""
    return max(reversed(votes), key=lambda vote: vote.confidence)


def majority(votes: Sequence[Vote]) -> Vote:
    """The most probable of the votes for the answer that most members give; of several such answers likewise."""
    groups = defaultdict(list)
    for vote in votes:
        groups[" ".join(vote.answer.split()).rstrip(".").lower()].append(vote)
    most = max(map(len, groups.values()))
    return highest([vote for vote in votes if any(vote in group for group in groups.values() if len(group) == most)])


RULES: dict[str, Callable[[Sequence[Vote]], Vote]] = {"highest p": highest, "majority, then p": majority}


def votes_of(files: Sequence[ResultFile], common: Common) -> dict[str, list[Vote]]:
    """{member: its votes, question by question}: the first answers of each model, and each file's answers with crop."""
    members = {}
    models = Counter(file.model for file in files)
    for number, (file, name) in enumerate(zip(files, names_of(files), strict=True)):
        records, pairs = common.records[number], common.pairs[number]
        sure = [sureness(record) or (0.0, 0.0) for record in records]
        first = NO_CROP if len(models) == 1 else f"{file.model} {NO_CROP}"
        for member, field, which in ((first, "original_answer", 0), (name, "crop_answer", 1)):
            if member not in members:
                rows = zip(records, sure, pairs, strict=True)
                members[member] = [Vote(str(each.get(field) or ""), p[which], pair[which]) for each, p, pair in rows]
    return members


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
