"""Do the localization heads cause the answer? Their attention to the image is spread evenly, or moved to another sign.

As many random heads are treated in the same way, once of all layers from heads.FIRST_LAYER on and once of the same
layers as the chosen ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicrop.crop import QuestionBatch
from vicrop.dataset import box_of
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import questions_of
from vicrop.findings.measure import TaskModel, graded, images_of, measured
from vicrop.findings.table import Estimate, Table, difference, estimate, in_words
from vicrop.heads import FIRST_LAYER, Head, head_name, valid_heads
from vicrop.layouts import Layout
from vicrop.redirection import Redirection, redirected

DRAWS = 3  # of random heads, for each record
CHOSEN, RANDOM, SAME_LAYERS = "chosen heads", "random heads", "random heads of these layers"
KINDS = (CHOSEN, RANDOM, SAME_LAYERS)
AS_IT_IS, EVENLY = "as it is", "spread evenly"
BEFORE, MOVED = "as it is, where there is another place", "moved to that place"
SAID_BEFORE, SAYS_OTHER = "says what is at that place, as it is", "says what is there, moved to it"


def covered(layout: Layout, box: Sequence[float]) -> np.ndarray | None:
    """(h, w): how much of each cell of a map lies in a box (xyxy pixels of the image), as shares that sum to 1.

    None where the map shows nothing of the box.
    """
    shares = []
    for axis, cells in ((1, layout.grid[0]), (0, layout.grid[1])):
        edges = np.linspace(layout.region[axis], layout.region[axis + 2], cells + 1)
        shares.append((np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis])).clip(0))
    area = np.outer(*shares)
    return area / area.sum() if area.any() else None


def weights_of(layout: Layout, shares: np.ndarray) -> Tensor:
    """(N,) what each of an image's N tokens gets, given the shares (h, w) of a map's cells."""
    weights = torch.zeros(layout.num_tokens)
    cells = torch.from_numpy(layout.index).flatten()
    return weights.index_add_(0, cells, torch.from_numpy(shares).float().flatten())


def answer_with(batch: QuestionBatch, heads: Sequence[Head], weights: Tensor) -> str:
    """The answer to a question without crop while some heads look elsewhere in the image.

    Args:
        weights: (N,) where what they pay to the image's N tokens goes.
    """
    session = batch.session
    (query,) = session.queries(batch.prompts)
    places, layers = session.row(query).rest.image_at, {layer for layer, _ in heads}
    own = {layer: tuple(head for other, head in heads if other == layer) for layer in layers}
    sent = {session.attention_modules[layer]: Redirection(each, places, weights) for layer, each in own.items()}
    with redirected(sent):
        (answer,) = session.answer(batch.prompts)
    return answer


def drawn(rng: np.random.Generator, chosen: Sequence[Head], pool: Sequence[Head], same_layers: bool) -> list[Head]:
    """As many heads as the chosen ones, drawn from those of a pool that are not; or as many of each of their layers.

    Raises:
        ValueError: the pool has fewer.
    """
    others = [head for head in pool if head not in chosen]
    wanted = Counter(layer for layer, _ in chosen) if same_layers else {None: len(chosen)}
    found = []
    for layer, count in wanted.items():
        here = [head for head in others if layer in (None, head[0])]
        if len(here) < count:
            which = "heads" if layer is None else f"heads of layer {layer}"
            raise ValueError(f"the chosen heads are compared with {count} other {which}, from layer {FIRST_LAYER} on, "
                             f"and there are {len(here)}: --loc_heads must name others")  # fmt: skip
        found += [here[number] for number in rng.permutation(len(here))[:count]]
    return found


def draws_of(task_model: TaskModel, heads: Sequence[Head], record: dict) -> dict[str, list[list[Head]]]:
    """{CHOSEN: [the heads], RANDOM: [others, DRAWS times], SAME_LAYERS: ...}; the same ones each time for a record."""
    per_layer = task_model.model.config.get_text_config().num_attention_heads
    valid_heads(heads, max(task_model.layers) + 1, per_layer)
    pool = [(layer, head) for layer in task_model.layers if layer >= FIRST_LAYER for head in range(per_layer)]
    rng = np.random.default_rng(list(str(record["id"]).encode()))
    return {CHOSEN: [list(heads)]} | {
        name: [drawn(rng, heads, pool, name == SAME_LAYERS) for _ in range(DRAWS)] for name in KINDS[1:]
    }


def effects(
    heads: Sequence[Head], others: Callable[[dict], list[dict]], task_model: TaskModel, record: dict
) -> dict[str, Any]:
    """{"score", EVENLY: {CHOSEN: score, ...}, MOVED: ..., SAYS_OTHER: ...} of a record; of random heads, means.

    The last two are missing where there is no other place with another label, and SAID_BEFORE is: the plain answer's
    score, were that place asked about.
    """
    batch = task_model.ask(record)
    plain = task_model.answer(batch)
    found: dict[str, Any] = {"score": task_model.grade(plain, record)}
    if found["score"] is None:
        return found
    (layout,), (image,), draws = batch.session.layouts, batch.session.images, draws_of(task_model, heads, record)

    def scores(weights: Tensor, *records: dict) -> list[dict[str, float]]:
        answers = {kind: [answer_with(batch, each, weights) for each in several] for kind, several in draws.items()}
        return [{kind: float(np.mean([task_model.grade(answer, each) or 0.0 for answer in said]))
                 for kind, said in answers.items()} for each in records]  # fmt: skip

    (found[EVENLY],) = scores(torch.full((layout.num_tokens,), 1 / layout.num_tokens), record)
    places = [] if batch.session.adapter.connector else others(record)
    shown = ((other, covered(layout, box_of(other, image_size=image.size))) for other in places)
    for other, shares in ((other, shares) for other, shares in shown if shares is not None):
        found[SAID_BEFORE] = task_model.grade(plain, other) or 0.0
        found[MOVED], found[SAYS_OTHER] = scores(weights_of(layout, shares), record, other)
        break
    return found


def other_places(records: Sequence[dict], record: dict) -> list[dict]:
    """The other records about the same image and of the same kind that have another place and another label."""
    same, other_than = ("image_path", "category"), ("gt_bbox", "labels")
    return [other for other in records if other.get("gt_bbox") is not None
            and all(other.get(name) == record.get(name) for name in same)
            and all(other.get(name) != record.get(name) for name in other_than)]  # fmt: skip


def causal(run: RunSettings, out: Path) -> Table:
    """Right answers while the chosen heads, or as many random ones, look elsewhere in the image.

    Raises:
        ValueError: the model's localization heads are not known; it has too few others.
    """
    heads = run.how.heads
    if not heads:
        raise ValueError(f"the localization heads of {run.model.name} must be known: --loc_heads names them, "
                         "and `vicrop findings heads` finds them")  # fmt: skip
    measure = partial(effects, heads, partial(other_places, questions_of(run)))
    check = lambda task_model: draws_of(task_model, heads, {"id": ""})  # noqa: E731
    # `rows` tells these measurements from those of an earlier version, which lack them.
    records = graded(measured(run, out, "causal", measure, check=check, rows=[BEFORE, SAID_BEFORE]))
    moved = [record for record in records if MOVED in record]
    rows: dict[Any, dict[str, Estimate]] = {}
    notes = [f"the chosen heads are {', '.join(map(head_name, heads))}; random ones are drawn {DRAWS} times a question",
             *records.notes]  # fmt: skip
    parts = (AS_IT_IS, "score", EVENLY, records), (BEFORE, "score", MOVED, moved)
    for before, field, what, group in (*parts, (SAID_BEFORE, SAID_BEFORE, SAYS_OTHER, moved)):
        if not group:
            continue
        images = images_of(group)
        rows[before] = dict.fromkeys(KINDS, estimate([record[field] for record in group], images))
        rows[what] = {kind: estimate([record[what][kind] for record in group], images) for kind in KINDS}
        for kind in KINDS[1:]:
            notes.append(f"{what}: {CHOSEN} against {kind}: {in_words(against(group, what, kind))} points")
    if not moved:
        notes.append("no attention was moved: that needs another place with another label in the same image, and a "
                     "model whose language part sees the image's cells themselves")  # fmt: skip
    return Table("right answers while heads look elsewhere", "attention", "% right", rows, notes)


def against(group: Sequence[dict], what: str, kind: str) -> Estimate:
    """The estimate of what the chosen heads change more than those of a kind."""
    first, second = ([record[what][name] for record in group] for name in (CHOSEN, kind))
    return difference(first, second, images_of(group))
