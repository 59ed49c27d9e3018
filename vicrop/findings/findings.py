"""The ViCrop paper's findings, on any model and any dataset with `gt_bbox`: a table, a plot and JSON of each.

    python -m tools.findings sizes --model llava_tiny   # right answers by object size: no crop, true crop, methods
    python -m tools.findings attention                  # how much more attention the true place gets, by layer
    python -m tools.findings layers                     # right answers by layer: chosen on one half, judged on another
    python -m tools.findings overhead                   # seconds and forward passes of a question, by method

All options of run.py may follow (--model, --task, --question_path, --method, --limit, ...). In --out there are then
MODEL-TASK-FINDING.json, .png, and what was measured of each question, by which a finding that was killed goes on.
"""

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import get_score
import run
from attention import counted
from attribution import attention as attention_maps
from batches import FAILURES, what_failed
from checkpoints import default_device, load_model, model_module
from dataset import box_of, check_record, load_task, pick
from files import ROOT, in_repository, write_atomically
from graders import GRADERS, RIGHT, first_grader
from images import allow_pixels
from pictures import bars_figure, curves_figure, save_figure
from records import Results, answered
from session import ImageSession, layer_numbers
from vicrop import QuestionBatch, build_methods, method_of

ROUNDS = 2000  # of the bootstrap
NO_CROP, TRUE_CROP, MEAN = "no crop", "gt_crop", "mean"


@dataclass
class Table:
    """A finding: per row an estimate of each series, in one unit; and what follows from it, in words."""

    title: str
    rows_are: str  # "layer"
    unit: str
    rows: dict  # row -> {series: estimate}
    notes: list = field(default_factory=list)
    plotted: tuple = ()  # the series that are drawn; all if empty
    digits: int = 1  # after the point
    even: float | None = None  # a value that says nothing; around it the plot is logarithmic


def estimate(values, images):
    """{"mean", "low", "high", "n"}: with the 95 % interval of a bootstrap over images."""
    if not len(values):
        return {"mean": None, "low": None, "high": None, "n": 0}
    low, high = get_score.bootstrap_interval(np.asarray(values, dtype=float), images, ROUNDS, seed=0)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def in_words(found, digits=1):
    """An estimate as a text."""
    if not found["n"]:
        return "-"
    mean, low, high = (f"{found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


# --------------------------------------------------------------------------------------------- one question at a time
class Subject:
    """A loaded model and how it is asked, from the command line."""

    def __init__(self, args):
        module = model_module(args.model)
        self.model, self.processor = load_model(args.model, args.model_id, *run.place(args), args.revision)
        self.options = run.adapter_options(args)
        self.methods = build_methods(module, args.method, self.model, args.layer, args.loc_heads, **self.options)
        self.grade, self.folder = GRADERS[first_grader(args.task)], in_repository(args.image_path)
        self.layers = layer_numbers(self.model, MEAN)  # all of the language model's

    def ask(self, record):
        """A record's question, in a fresh session of its image."""
        session = ImageSession([check_record(record, self.folder)], self.model, self.processor, **self.options)
        short = [record.get("short_question")]
        return QuestionBatch(session, [record["question"]], short_questions=short, records=[record])

    def answer(self, batch):
        """The answer to a question without crop; what maps of any layer will read is read off its first pass."""
        (answer,) = batch.session.answer(
            batch.prompts, layers=self.layers if batch.prompts == batch.map_prompts else ()
        )
        return answer


def measured(args, finding, measure, warm_up=False, **more):
    """[record | what was measured of it] of the task's records; those of an earlier, killed call are not asked again.

    A record that cannot be measured is named, and left out.

    Args:
        measure: `(subject, record) -> {field: value}`, JSON.
        warm_up: measure the first one twice: what is slow only once does not count.
        more: settings that must be equal, besides those of run.py, for a finding to go on.
    """
    dataset = load_task(args.question_path)
    records = pick(dataset, args.ids, args.limit)
    settings = settings_of(args) | more
    results = Results(file_of(args, finding, ".records.json"), settings)
    done = {} if args.overwrite else results.done(args.retry_errors)
    todo = [record for record in records if record["id"] not in done]
    if todo:
        subject = Subject(args)
        if args.overwrite:  # old results go only when others can come in their place
            results.clear()
        for record in tqdm(todo, desc=f"{args.model} {finding}", unit="question"):
            try:
                if warm_up:
                    measure(subject, record)
                    warm_up = False
                fields = measure(subject, record)
            except Exception as error:
                fields = {"error": what_failed(error)}
            results.append(answered(record, fields))
    _, errors = results.merge(records, dataset)
    for key, error in errors.items():
        print(f"{key}: {error}", file=sys.stderr)
    finished = results.done()
    kept = [finished[record["id"]] for record in records if record["id"] not in errors]
    if not kept:
        raise ValueError("no record could be measured")
    return kept


def graded(records):
    """Those that the benchmark counts."""
    found = [record for record in records if record["score"] is not None]
    if not found:
        raise ValueError(f"none of the {len(records)} records is one that the benchmark counts")
    return found


def settings_of(args):
    """All that a finding depends on, for JSON."""
    settings = run.settings(args, torch.device(args.device or default_device()))
    return settings | {"methods": [run.own_settings(args, method) for method in args.method]}


def file_of(args, finding, ending):
    return Path(args.out) / f"{args.model}-{args.task}-{finding}{ending}"


def images_of(records):
    return [record["image_path"] for record in records]


# --------------------------------------------------------------------------------------------------------------- sizes
def sizes(args):
    """Right answers by the share of the image that the object covers (the paper's section 3): small ones are misread.

    Cropping at the true place is its intervention: that the answer is then right shows that size was the reason.
    """
    records = pick(load_task(args.question_path), args.ids, args.limit)
    wanted, notes = {record["id"] for record in records}, []
    if any(record.get("gt_bbox") for record in records):
        args.method = list(dict.fromkeys([*args.method, TRUE_CROP]))
    else:
        notes.append(f"no record has a gt_bbox, so there is no {TRUE_CROP}")
    run.run_task(args)  # results that are there are taken as they are, or refused
    grader, images, scores = first_grader(args.task), in_repository(args.image_path), {}
    for method in args.method:
        path = Path(args.save_path) / f"{args.model}-{args.task}-{method}.json"
        for record in get_score.read_results(path):
            size, pair = get_score.size_of(record, images), get_score.pair_or_reason(record, grader)
            if isinstance(pair, str) and record["id"] in wanted:
                get_score.say(f"{path}: {pair}: it cannot be scored, and is left out")
            elif record["id"] in wanted and size and pair:
                for part in (size, "all"):
                    own = scores.setdefault(part, {})
                    own.setdefault(method, {})[record["id"]] = pair[1], record["image_path"]
                    without = own.setdefault(NO_CROP, {})
                    if "error" not in record or record["id"] not in without:  # another method may have answered it
                        without[record["id"]] = pair[0], record["image_path"]
    if not scores:
        raise ValueError(f"{args.question_path}: sizes are those of gt_bbox, and no record that can be scored has one")
    order = sorted(scores, key=lambda part: (part == "all", get_score.place_of(part)))
    rows = {part: {name: estimate(*zip(*scores[part][name].values(), strict=True)) for name in (NO_CROP, *args.method)}
            for part in order}  # fmt: skip
    smallest, largest = order[0], order[-2]
    fall = rows[largest][NO_CROP]["mean"] - rows[smallest][NO_CROP]["mean"]
    if smallest != largest:
        notes.append(f"without crop {fall:.1f} points fewer are right about {smallest} objects than {largest} ones")
    return Table("right answers by object size", "size", "% right", rows, notes)


# ----------------------------------------------------------------------------------------------------------- attention
def attention_ratio(att_map, region, box):
    """How much more attention a box gets than a box of its size anywhere (the ViCrop paper's section 4).

    Args:
        att_map: (..., h, w) attention over `region` (xyxy pixels of the image).
        box: xyxy pixels of the image.
    Returns:
        (...) float64: attention inside the box over the mean inside all same-sized boxes at whole-pixel positions;
        cells that a box covers in part count in part. 1 means no preference; nan if the box lies outside of the region.
    """
    # Up to a point the attention is the integral image there, linear in between. So the mean over all boxes is one
    # product of it with the mean weights of their edges, exactly, and no box is summed up by itself.
    sums = np.asarray(att_map, dtype=np.float64).cumsum(-2).cumsum(-1)
    integral = np.pad(sums, [(0, 0)] * (sums.ndim - 2) + [(1, 0), (1, 0)])  # (..., h + 1, w + 1)
    inside, anywhere = [], []
    for axis in (1, 0):  # rows, then columns
        low, high = region[axis], region[axis + 2]
        start, stop = (min(max(box[axis + side], low), high) - low for side in (0, 2))
        length, edges = stop - start, np.linspace(0, high - low, integral.shape[-1 - axis])
        inside.append(edge_weights([stop], edges)[0] - edge_weights([start], edges)[0])
        starts = np.arange(int(high - low - length) + 1)
        anywhere.append((edge_weights(starts + length, edges) - edge_weights(starts, edges)).mean(0))
    share, mean = (rows @ integral @ columns for rows, columns in (inside, anywhere))
    return np.divide(share, mean, out=np.full_like(mean, np.nan), where=mean > 0)


def edge_weights(points, edges):
    """(points, edges): with them values at `edges` become those at points, linearly in between."""
    return np.stack([np.interp(points, edges, one) for one in np.eye(len(edges))], 1)


def ratios_of(subject, record):
    """{"score", "ratio"} of a record: how right the answer is, and the attention ratio of each layer."""
    if not record.get("gt_bbox"):
        raise ValueError(f"record {record['id']!r} has no gt_bbox, and the attention ratio is about that box")
    batch = subject.ask(record)
    (image,), (layout,) = batch.session.images, batch.session.layouts
    box, score_of = box_of(record, image_size=image.size), subject.grade(subject.answer(batch), record)
    (maps,) = attention_maps(batch.session, batch.map_prompts, subject.layers)
    heads_mean = maps.mean(1).cpu().numpy()  # (layers, h, w)
    ratios = attention_ratio(heads_mean, layout.region, box).tolist()
    return {"score": score_of, "ratio": [None if np.isnan(ratio) else ratio for ratio in ratios]}


def attention(args):
    """The attention ratio of each layer, for right and for wrong answers apart (the paper's section 4)."""
    args.method = []  # no crop is asked for
    records = graded(measured(args, "attention", ratios_of))
    groups = {"right answers": [], "wrong answers": []}
    for record in records:
        groups["right answers" if record["score"] >= RIGHT else "wrong answers"].append(record)
    rows = {}
    for layer in range(len(records[0]["ratio"])):
        seen = {name: [r for r in group if r["ratio"][layer] is not None] for name, group in groups.items()}
        rows[layer] = {
            name: estimate([r["ratio"][layer] for r in group], images_of(group)) for name, group in seen.items()
        }
    notes = []
    if groups["wrong answers"]:
        best = max(rows, key=lambda layer: rows[layer]["wrong answers"]["mean"] or 0)
        found = in_words(rows[best]["wrong answers"])
        notes.append(f"on wrong answers layer {best} gives the true place {found} times the attention of a like box")
    title = "attention to the true place over that to a box like it"
    return Table(title, "layer", "attention ratio", rows, notes, even=1)


# -------------------------------------------------------------------------------------------------------------- layers
def scores_by_layer(subject, record):
    """{"score", "with_crop": {method: {layer or MEAN: score}}} of a record; layers as texts."""
    batch, answers = subject.ask(record), {}  # by box: layers that agree need one answer
    score_of, scores = subject.grade(subject.answer(batch), record), {name: {} for name in subject.methods}
    for name, method in subject.methods.items():
        for choice in (MEAN, *subject.layers):  # the mean reads all layers at once, and the session keeps what it read
            ((box, *_),) = batch.find(method.bind(subject.model, choice))
            if box not in answers:
                (answers[box],) = batch.session.answer(batch.prompts, crops=[batch.session.images[0].crop(box)])
            scores[name][str(choice)] = subject.grade(answers[box], record)
    return {"score": score_of, "with_crop": scores}


def layers(args):
    """Right answers with the crop of each layer; the layer chosen on one half of the images, judged on the other.

    And what it costs to average all layers, for which no data is needed to choose by (the paper's ablation).
    """
    for method in args.method:
        if "layers" not in method_of(model_module(args.model), method).reads:
            raise ValueError(f"{method} reads no layer: this finding is about methods that do")
    records = graded(measured(args, "layers", scores_by_layer))
    halves = dict(zip(("to choose", "to judge"), halved(records), strict=True))
    numbers = [int(choice) for choice in records[0]["with_crop"][args.method[0]] if choice != MEAN]
    rows = {
        choice: {
            f"{method}, {name}": estimate([r["with_crop"][method][str(choice)] for r in half], images_of(half))
            for method in args.method
            for name, half in halves.items()
        }
        for choice in (*numbers, MEAN)
    }
    judging, notes = halves["to judge"], []
    for method in args.method:
        chosen_by = {layer: rows[layer][f"{method}, to choose"]["mean"] for layer in numbers}
        best = max(numbers, key=chosen_by.get)
        tied = [layer for layer in numbers if chosen_by[layer] == chosen_by[best]]
        choice = f"layer {best} is chosen" + (f" (the first of {len(tied)} that are equal)" if len(tied) > 1 else "")
        scores = [record["with_crop"][method] for record in judging]
        cost = in_words(estimate([each[str(best)] - each[MEAN] for each in scores], images_of(judging)))
        right = in_words(rows[best][f"{method}, to judge"])
        notes.append(f"{method}: {choice}; on the other half {right} % are right, "
                     f"and averaging all layers costs {cost} points")  # fmt: skip
    without = in_words(estimate([record["score"] for record in judging], images_of(judging)))
    notes.append(f"without crop {without} % are right there")
    judged = tuple(f"{method}, to judge" for method in args.method)
    return Table("right answers with the crop of each layer", "layer", "% right", rows, notes, judged)


def halved(records, seed=0):
    """Two lists of records about different images, so many in each."""
    images = np.random.default_rng(seed).permutation(sorted(set(images_of(records))))
    first = set(images[: (len(images) + 1) // 2].tolist())
    parts = [[r for r in records if (r["image_path"] in first) is half] for half in (True, False)]
    if not all(parts):
        raise ValueError("a layer is chosen on one half of the images and judged on the other: at least 2 are needed")
    return parts


# ------------------------------------------------------------------------------------------------------------ overhead
def times_of(subject, record):
    """{"seconds", "forwards"} of a record, each {way: value}; the ways are no crop, and each method."""
    seconds, forwards = {}, {}
    for way in (NO_CROP, *subject.methods):
        methods = {name: method for name, method in subject.methods.items() if name == way}
        began = time.perf_counter()
        with counted(subject.model.get_decoder()) as passes:
            batch = subject.ask(record)
            originals = batch.original_answers(methods)
            for method in methods.values():
                batch.results(method, originals)
        seconds[way], forwards[way] = time.perf_counter() - began, len(passes)
    return {"seconds": seconds, "forwards": forwards}


def overhead(args):
    """Seconds and forward passes of the language model for a question: answered without crop, and by each method.

    Each way begins with the image's file and ends with both answers as texts; one question at a time.
    """
    device = torch.device(args.device or default_device())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    where = f"{torch.get_num_threads()} threads of {platform.machine()}" if device.type == "cpu" else name
    records = measured(args, "overhead", times_of, warm_up=True, where=where)
    rows = {}
    for way in records[0]["seconds"]:
        seconds, passes = ([record[name][way] for record in records] for name in ("seconds", "forwards"))
        more = [record["seconds"][way] / record["seconds"][NO_CROP] for record in records]
        series = {"seconds": seconds, "times no crop": more, "forward passes": passes}
        rows[way] = {name: estimate(values, images_of(records)) for name, values in series.items()}
    title, notes = "time of a question, both answers included", [f"one question at a time on {where}"]
    return Table(title, "method", "seconds", rows, notes, ("seconds",), digits=3)


# ------------------------------------------------------------------------------------------------------- command line
FINDINGS = {  # name -> its function, and the methods that it is about if nothing is said
    "sizes": (sizes, "rel_att,grad_att,pure_grad,loc_att"),
    "attention": (attention, "rel_att"),
    "layers": (layers, "rel_att,grad_att"),
    "overhead": (overhead, "rel_att,grad_att,pure_grad,loc_att,rel_att_high,grad_att_high,pure_grad_high,loc_att_high"),
}


def show(table):
    """Print a Table."""
    series = list(next(iter(table.rows.values())))
    print(f"{table.title} ({table.unit}, 95 % intervals by bootstrap over images)")
    lines = [[table.rows_are, *series, "n"]]
    for name, found in table.rows.items():
        counts = dict.fromkeys(str(each["n"]) for each in found.values())
        lines.append([str(name), *(in_words(found[each], table.digits) for each in series), "/".join(counts)])
    get_score.print_aligned(lines, left=1)
    for note in table.notes:
        print(note)


def figure(table, title):
    """The plot of a Table: curves over layers, bars over anything else."""
    rows = {row: {name: found for name, found in series.items() if not table.plotted or name in table.plotted}
            for row, series in table.rows.items()}  # fmt: skip
    if table.rows_are == "layer":
        return curves_figure(rows, table.rows_are, table.unit, title, table.even)
    return bars_figure(rows, table.unit, title)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("finding", choices=FINDINGS)
    parser.add_argument("--out", default=ROOT / "data" / "results" / "findings", help="folder of what is found")
    own, rest = parser.parse_known_args(argv)
    args = run.parse(["--method", FINDINGS[own.finding][1], *rest])  # a later --method counts
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("a finding is made by one process; `sizes` takes the results that run.py has made with several")
    args.finding, args.out = own.finding, own.out
    for option, given, why in refused(args):
        if given:
            parser.error(f"--{option}: {why}, leave it out")
    return args


def refused(args):
    """[(option of run.py, whether it was given, why a finding has no use for it)]"""
    by_layer, singly = args.finding in ("attention", "layers"), args.finding != "sizes"
    one_by_one = f"{args.finding} asks one question at a time and keeps no maps"
    return [
        ("image", args.image, "findings are about the questions of a task"),
        ("total_chunks", args.total_chunks > 1, "a finding is made of all its questions, by one process"),
        ("layer", by_layer and args.layer is not None, "this finding is about all layers"),
        ("batch_size", singly and args.batch_size, one_by_one),
        ("save_maps", singly and args.save_maps, one_by_one),
    ]


def main(argv=None):
    args = parse(argv)
    allow_pixels(args.max_image_pixels)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        table = FINDINGS[args.finding][0](args)
    except FAILURES as error:
        sys.exit(f"findings: {error}")
    show(table)
    write_atomically(file_of(args, args.finding, ".json"), asdict(table) | {"settings": settings_of(args)})
    picture = file_of(args, args.finding, ".png")
    save_figure(figure(table, f"{args.model}, {args.task}: {table.title}"), picture)
    print(f"written: {picture.with_suffix('.json')}, {picture}")


if __name__ == "__main__":
    main()
