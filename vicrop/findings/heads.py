"""How many heads, chosen how: the ablations of the localization heads (arXiv 2503.06287), with a box for each phrase.

Heads are found on one half of the images and judged on the other.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vicrop.attribution import attention as attention_maps
from vicrop.dataset import box_of
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import TaskModel, halved, images_of, measured, settings_of
from vicrop.findings.phrases import asking_of, phrases_of
from vicrop.findings.sample import chosen
from vicrop.findings.table import Estimate, Table, difference, estimate, in_words
from vicrop.heads import (
    FIRST_LAYER,
    SIGMA,
    TOP_K,
    Criteria,
    Head,
    Measures,
    by_count,
    counts,
    frequent,
    greedy,
    head_name,
    mean_entropy,
    smoothed,
)
from vicrop.localization.evaluate_boxes import inside, iou
from vicrop.localization.grounding import box_in_image, cells_in_image, peak_in_image
from vicrop.localization.masks import mean_relu
from vicrop.session import ImageSession

MOST = 10  # heads at most
OVERLAP = 0.5  # a box is right from so much IoU on
DRAWS = 5  # of random heads, for each phrase; TRIALS of samples, for how often a head is chosen
TRIALS, SAMPLE_SIZES, SHOWN = 100, (10, 30, 80), 10
BOTH, GREEDY, UNSMOOTHED = "both criteria", "each phrase's own", "both, not smoothed"
ATTENTION, ENTROPY, NEITHER = "attention only", "entropy only", "neither (random)"
RIGHT, POINTING = "right box", "pointing"
Orders = Mapping[str, list[Head]]  # variant -> heads, the best first


# ---------------------------------------------------------------------------------------------------- which heads
def refuse_missing_layers(task_model: TaskModel) -> None:
    """ValueError if a layer has no attention: a head is named by the place of its layer."""
    if task_model.layers != tuple(range(len(task_model.layers))):
        raise ValueError(f"every layer of the model must have attention, and only {task_model.layers} have it")


def read_maps(mode: str, task_model: TaskModel, record: dict) -> tuple[ImageSession, np.ndarray]:
    """(the session of a record's image, the attention (layers, heads, h, w) of its phrase's last token)."""
    session = task_model.ask(record).session
    prompt = {"referseg": session.adapter.phrase, "vqa": session.adapter.prompt}[mode](record["question"])
    (maps,) = attention_maps(session, [prompt], task_model.layers)
    return session, maps.cpu().numpy()


def measures_of(mode: str, task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"sums", "entropy", "bottom"}: what the criteria see of each head (layers, heads); no entropy is None."""
    found = Criteria().measure(read_maps(mode, task_model, record)[1])
    entropy = [[float(each) if np.isfinite(each) else None for each in row] for row in found.entropy]
    return {"sums": found.sums.tolist(), "entropy": entropy, "bottom": found.bottom.tolist()}


def as_measures(record: dict) -> Measures:
    """The heads.Measures that `measures_of` has kept."""
    entropy = np.array(record["entropy"], dtype=float)
    return Measures(
        np.array(record["sums"]), np.where(np.isnan(entropy), np.inf, entropy), np.array(record["bottom"], dtype=bool)
    )


def orders_of(samples: Sequence[Measures]) -> dict[str, list[Head]]:
    """The fixed heads by both criteria and by each alone, at most MOST; found from all samples."""
    criteria, entropy = Criteria(), mean_entropy(samples)
    sums = np.mean([each.sums for each in samples], 0)
    later, pool = later_heads(sums.shape)
    orders = {
        BOTH: by_count(counts(samples, criteria), entropy),
        ATTENTION: sorted(pool, key=lambda head: -sums[head]),
        ENTROPY: by_count(counts(samples, criteria, later), entropy),
    }
    return {name: order[:MOST] for name, order in orders.items()}


def later_heads(shape: Sequence[int]) -> tuple[np.ndarray, list[Head]]:
    """((layers, heads) bool, the same as a list) of the heads from FIRST_LAYER on."""
    later = np.zeros(tuple(shape), dtype=bool)
    later[FIRST_LAYER:] = True
    return later, [(int(layer), int(head)) for layer, head in np.argwhere(later)]


def random_orders(shape: Sequence[int], record: dict) -> list[list[Head]]:
    """MOST heads in random order, DRAWS times; others for each record, so that intervals know of the draw."""
    pool, rng = later_heads(shape)[1], np.random.default_rng(list(str(record["id"]).encode()))
    return [[pool[number] for number in rng.permutation(len(pool))[:MOST]] for _ in range(DRAWS)]


# ------------------------------------------------------------------------------------------------ how good they are
def hits_of(orders: Orders, mode: str, task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{variant: {RIGHT: [for 1, 2, ... heads], POINTING: [...]}} of a record, each in %; of random heads, means."""
    session, maps = read_maps(mode, task_model, record)
    (layout,), (image,) = session.layouts, session.images
    box = box_of(record, image_size=image.size)
    criteria = Criteria(top_k=MOST)
    own, drawn = greedy(criteria.measure(maps), criteria), random_orders(maps.shape[:2], record)
    variants = [*((name, [order], SIGMA) for name, order in orders.items()), (NEITHER, drawn, SIGMA),
                (GREEDY, [own], SIGMA), (UNSMOOTHED, [orders[BOTH]], 0.0)]  # fmt: skip
    found = {}
    for name, several, sigma in variants:
        hits = [judged(maps, order, sigma, layout.region, image.size, box) for order in several]
        right, pointing = np.mean(hits, 0).T.tolist()
        found[name] = {RIGHT: right, POINTING: pointing}
    return found


def judged(
    maps: np.ndarray, order: Sequence[Head], sigma: float, region: Sequence[float], size: Sequence[int],
    box: Sequence[float],
) -> list[tuple[float, float]]:  # fmt: skip
    """[(100 if the box is right, 100 if the map's maximum lies in it)] with the first 1, 2, ... MOST heads.

    Where there are fewer heads, all that there are.
    """
    total, hits = np.zeros(maps.shape[-2:]), []
    for number in range(MOST):
        if number < len(order):
            total = total + smoothed(maps[order[number]], sigma)
            found = box_in_image(mean_relu(total) & cells_in_image(total.shape, region, size), region, size)
            right = found is not None and iou(found, box) >= OVERLAP
            hits.append((100.0 * right, 100.0 * inside(peak_in_image(total, region, size), box)))
        else:
            hits.append(hits[-1])
    return hits


# -------------------------------------------------------------------------------------------------------- the finding
def heads(run: RunSettings, out: Path) -> Table:
    """Right boxes over the number of heads: by both criteria, one or none; fixed or each phrase's own; smoothed or not.

    The phrases are those of `phrases_of`.
    """
    run, dataset = phrases_of(run)
    choosing, judging = halved(chosen(dataset, "heads", run.ids, run.limit))
    asking = asking_of(run)
    mode = asking.conv_mode
    kept = measured(run, out, "heads_choosing", partial(measures_of, mode), records=choosing,
                    dataset=dataset, check=refuse_missing_layers, conv_mode=mode)  # fmt: skip
    samples = [as_measures(record) for record in kept]
    orders = orders_of(samples)
    names = {name: ",".join(map(head_name, order)) for name, order in orders.items()}
    how = {"heads": names, "conv_mode": mode, "random_heads": "drawn for each phrase"}
    records = measured(run, out, "heads", partial(hits_of, orders, mode), records=judging, dataset=dataset, **how)
    tables = {what: over_heads(records, what) for what in (RIGHT, POINTING)}
    main = tables[RIGHT]
    where = f"found on {len(samples)} phrases of {run.question_path}, judged on {len(records)} about other images"
    main.notes[:0] = [f"{where}; most often chosen: {names[BOTH]}", *asking.notes, *kept.notes, *records.notes]
    main.more = {POINTING: tables[POINTING], "frequency": how_often(samples)}
    main.settings = settings_of(run, out) | {"conv_mode": mode}
    return main


def over_heads(records: Sequence[dict], what: str) -> Table:
    """The table of RIGHT or POINTING over the number of heads, with paired differences at TOP_K of them."""
    images, variants = images_of(records), (BOTH, ATTENTION, ENTROPY, NEITHER, GREEDY, UNSMOOTHED)

    def hits(variant: str, count: int) -> list[float]:
        return [record[variant][what][count - 1] for record in records]

    rows = {count: {name: estimate(hits(name, count), images) for name in variants} for count in range(1, MOST + 1)}
    notes = []
    for other in variants[1:]:
        gain = difference(hits(BOTH, TOP_K), hits(other, TOP_K), images)
        notes.append(f"{what}, {TOP_K} heads: {BOTH} against {other}: {in_words(gain)} points")
    unit = f"% with IoU of at least {OVERLAP}" if what == RIGHT else "% with the map's maximum in the box"
    return Table(f"{what}, by the number of heads", "heads", unit, rows, notes, curves=True)


def how_often(samples: Sequence[Measures]) -> Table:
    """How often a head is among the TOP_K chosen ones, over trials of some samples each."""
    rng, criteria, rows = np.random.default_rng(0), Criteria(), {}
    sizes = [size for size in SAMPLE_SIZES if 2 * size <= len(samples)] or [max(1, len(samples) // 2)]
    found: dict[int, list[set[Head]]] = {}
    for size in sizes:
        picks = (rng.permutation(len(samples))[:size] for _ in range(TRIALS))
        found[size] = [set(frequent([samples[number] for number in pick], criteria)) for pick in picks]
    every = {head for trials in found.values() for trial in trials for head in trial}
    share = {head: [np.mean([head in trial for trial in found[size]]) for size in sizes] for head in every}
    for head in sorted(every, key=lambda head: (-share[head][-1], head))[:SHOWN]:
        rows[head_name(head)] = {f"{size} phrases": trial_share(head, found[size]) for size in sizes}
    title = f"how often a head is among the {TOP_K} chosen, over {TRIALS} trials"
    return Table(title, "head", "% of trials", rows, intervals="by bootstrap over trials, which share phrases")


def trial_share(head: Head, trials: Sequence[set[Head]]) -> Estimate:
    """In how many % of trials a head was chosen."""
    return estimate([100.0 * (head in trial) for trial in trials], list(map(str, range(len(trials)))))
