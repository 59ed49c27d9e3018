"""The paper's findings, measured on any model and any dataset with `gt_bbox`.

    python -m tools.findings layers --model llava_tiny --question_path DIR/data.json --image_path DIR/images

layers: per layer, how much of the attention lies on the right place, and how often the crop then gives the right
answer; with it a layer is chosen (on data that is not the test set).
"""

import argparse
import sys

import numpy as np
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from graders import GRADERS, first_grader
from info import GENERAL_PROMPT, TASKS
from records import check_record, in_repository, load_task
from run import add_model_options, look_options, place
from utils import bbox_in_region
from vicrop import load_model, look_class, model_module


def overlaps(starts, length, cells, extent):
    """(len(starts), cells): the share of each cell of a line that [start, start + length] covers, for many starts."""
    size = extent / cells
    edges = np.arange(cells) * size
    starts = np.asarray(starts, dtype=np.float64)[:, None]
    covered = np.minimum(starts + length, edges + size) - np.maximum(starts, edges)
    return covered.clip(0) / size


def attention_ratio(att_map, region, box):
    """How much more attention a box gets than a box of its size anywhere (the ViCrop paper's section 3).

    Args:
        att_map: (h, w) attention over `region` (xyxy pixels of the image).
        box: xyxy pixels of the image.
    Returns:
        attention inside the box over the mean inside all same-sized boxes at whole-pixel positions; cells that a box
        covers in part count in part. 1 means no preference; nan if the box lies outside of the region.
    """
    att_map = np.asarray(att_map, dtype=np.float64)
    inside, anywhere = [], []
    for axis in (1, 0):  # rows, then columns
        low, high = region[axis], region[axis + 2]
        start, stop = (min(max(box[axis + side], low), high) - low for side in (0, 2))
        length, cells = stop - start, att_map.shape[1 - axis]
        inside.append(overlaps([start], length, cells, high - low)[0])
        anywhere.append(overlaps(np.arange(high - low - length + 1), length, cells, high - low).mean(0))
    share, mean = (rows @ att_map @ columns for rows, columns in (inside, anywhere))
    return float(share / mean) if mean > 0 else float("nan")


def mean_and_margin(values):
    """Mean and half-width of its 95 % confidence interval (normal approximation), in the unit of the values."""
    return np.mean(values), 1.96 * np.std(values, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


def layers(args):
    """Rows of {layer, attention ratio over all questions and over the wrongly answered ones, accuracy with crop}."""
    module = model_module(args.model)
    model, processor = load_model(args.model, args.model_id, *place(args), args.revision)
    options = look_options(args)
    look_class(module).check(model, **options)
    grade = GRADERS[first_grader(args.task)]
    folder = in_repository(args.image_path)
    every = look_class(module).layers(model, "mean")
    choices = [*every, "mean"]
    ratios, correct, wrong = {layer: [] for layer in every}, {choice: [] for choice in choices}, []
    records = load_task(args.question_path)[: args.limit]
    for record in tqdm(records, unit="question"):
        if not record.get("gt_bbox"):
            raise ValueError(f"record {record['id']!r} has no gt_bbox, and the attention ratio is about that box")
        look = look_class(module)([check_record(record, folder)], model, processor, **options)
        prompt, general = look.prompt(record["question"]), look.prompt(GENERAL_PROMPT)
        wrong.append(not grade(look.answer(prompt, layers=every)[0], record))
        attention = look.attention(prompt, every)[0].mean(1).float().cpu().numpy()  # (layers, h, w)
        for layer, att_map in zip(every, attention, strict=True):
            ratios[layer].append(attention_ratio(att_map, look.regions[0], record["gt_bbox"]))
        answers = {}  # by box: layers that agree need one answer
        for choice in choices:
            att_map = module.rel_att.reading(model, choice).of(look, prompt, general)[0]
            box = bbox_in_region(att_map, look.regions[0], look.images[0].size, look.bbox_size)
            if box not in answers:
                answers[box] = look.answer(prompt, crops=[look.images[0].crop(box)])[0]
            correct[choice].append(grade(answers[box], record))
    rows = []
    for choice in choices:
        row = {"layer": choice, "with_crop": mean_and_margin(correct[choice])}
        if choice in ratios:
            found = np.array(ratios[choice])
            row |= {"ratio": np.nanmean(found), "ratio_wrong": np.nanmean(found[wrong]) if any(wrong) else float("nan")}
        rows.append(row)
    print(f"{len(records)} questions, {100 * (1 - np.mean(wrong)):.1f} % right without crop")
    print("layer  attention ratio  on wrong answers  % right with crop (rel_att)")
    for row in rows:
        ratio = f"{row['ratio']:15.2f}  {row['ratio_wrong']:16.2f}" if "ratio" in row else " " * 33
        print(f"{row['layer']!s:5}  {ratio}  {row['with_crop'][0]:11.1f} ± {row['with_crop'][1]:.1f}")
    return rows


FINDINGS = {"layers": layers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("finding", choices=FINDINGS)
    add_model_options(parser)
    add("--task", choices=TASKS, default="demo", help="whose first metric judges the answers")
    add("--question_path", required=True, help="questions with gt_bbox; for choosing a layer not those of a test set")
    add("--image_path", required=True, help="folder of their images")
    add("--limit", type=int, help="only the first N records")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        FINDINGS[args.finding](args)
    except (ValueError, OSError) as error:
        sys.exit(f"findings: {error}")


if __name__ == "__main__":
    main()
