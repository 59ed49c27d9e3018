"""The papers' findings, on any model and any dataset with `gt_bbox`: a table, a plot and JSON of each.

    vicrop findings sizes --model llava_tiny     # right answers by object size: no crop, true crop, methods
    vicrop findings attention                    # how much more attention the true place gets, by layer
    vicrop findings layers                       # right answers by layer: chosen on one half, judged on another
    vicrop findings overhead                     # seconds and forward passes of a question, by method
    vicrop findings kinds --task streets         # right answers by kind of question (`category`), in all ways to crop
    vicrop findings windows                      # right answers by the size of the window that is cut out
    vicrop findings high                         # right answers with the map of the whole image, and of its tiles
    vicrop findings gate                         # right answers and crops where only unsure answers get a crop
    vicrop findings budget --model qwen2_5_tiny  # crops against resolution, for equal tokens and equal seconds
    vicrop findings heads                        # localization heads: how many, by which criteria, fixed or not
    vicrop findings causal                       # are these heads the reason for the answer?

All options of `vicrop run` may follow. The folder --out then has MODEL-TASK-FINDING.json and .png, and the measurements
of each question: after a kill, the same command reuses them. Those that ask one question at a time say after two of
them how long the others will take; `sizes` and `kinds` answer with a progress bar each.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from vicrop.evaluation.metrics import OF_BOXES
from vicrop.evaluation.run_options import parser_of_runs, picture_of, settings_of
from vicrop.evaluation.settings import RunSettings
from vicrop.files import patient_threads
from vicrop.findings.sample import SAMPLES
from vicrop.images import allow_pixels

# finding -> its methods without --method; module and function have the name of the finding
FINDINGS = {
    "sizes": "rel_att,grad_att,pure_grad,loc_att",
    "attention": "rel_att",
    "layers": "rel_att,grad_att",
    "overhead": "rel_att,grad_att,pure_grad,loc_att,rel_att_high,grad_att_high,pure_grad_high,loc_att_high",
    "kinds": "rel_att,grad_att,pure_grad,loc_att,question_att,rel_att_zoom,gt_crop,grid_crops,random_crop,center_crop",
    "windows": "rel_att",
    "high": "rel_att,loc_att",
    "gate": "rel_att,loc_att",
    "budget": "rel_att,rel_att_high,rel_att_zoom",
    "heads": "loc_att",
    "causal": "loc_att",
}
OF_HEADS = ("heads", "causal")  # they are about localization heads themselves, not about methods
BY_RUNS = ("sizes", "kinds")  # they are made of results of `vicrop run`; all others ask one question at a time
UNGRADED = ("overhead", "heads")  # they score no answers
NO_CROPS, BY_ITSELF = "this finding needs no crops", "this finding asks with one to three by itself"
NO_REGIONS = {  # finding -> why --regions has no meaning for it
    "attention": NO_CROPS, "heads": NO_CROPS, "causal": NO_CROPS, "kinds": BY_ITSELF,
    "windows": "this finding is about the size of a single window",
}  # fmt: skip
OWN_METHODS = "those of the finding"  # what --method is by default


def parse(
    argv: Sequence[str] | None = None, prog: str = "findings", results: Path = Path("data/results")
) -> tuple[str, RunSettings, Path]:
    """(finding, its run, the folder --out) of a command line.

    Args:
        prog: the command's name in messages; results: where results are written without --save_path; findings are
            written to a folder in it.
    """
    parser = parser_of_runs(prog, __doc__, OWN_METHODS)
    samples = ", ".join(f"{finding} {count}" for finding, count in SAMPLES.items())
    parser.add_argument("finding", choices=FINDINGS, help="what to measure, on all questions or, without --limit and "
                        f"--ids, on so many drawn ones at most: {samples}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=results / "findings", help="folder of the findings")
    typed = parser.parse_args(argv)
    if typed.method == OWN_METHODS:
        typed.method = FINDINGS[typed.finding]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(
            "a finding needs a single process; for `sizes`, run.py can make the results with several ones before"
        )
    try:
        picture_of(typed)
        refuse_useless(typed.finding, typed)
        if NO_REGIONS.get(typed.finding) == BY_ITSELF:
            typed.regions = 1  # so --region_share is about those that it asks with
        run = settings_of(typed, results)
        refuse_box_metric(typed.finding, run)
        return typed.finding, run, typed.out
    except (ValueError, OSError) as error:
        parser.error(str(error))


def refuse_useless(finding: str, typed: argparse.Namespace) -> None:
    """ValueError, naming the option, if an option of a run makes no sense for a finding."""
    by_layer, singly = finding in ("attention", "layers", *OF_HEADS), finding not in BY_RUNS
    one_by_one = f"{finding} asks one question at a time and keeps no maps"
    rules = [
        ("image", typed.image, "findings are about the questions of a task"),
        ("total_chunks", typed.total_chunks > 1, "a finding needs all its questions, answered by one process"),
        ("layer", by_layer and typed.layer is not None, "this finding is about all layers"),
        ("method", finding in OF_HEADS and typed.method != FINDINGS[finding], "this finding is about attention heads"),
        ("batch_size", singly and typed.batch_size, one_by_one),
        ("crop_below", typed.crop_below is not None, "a finding is about the crops of all questions"),
        ("regions", finding in NO_REGIONS and (typed.regions or 1) > 1, NO_REGIONS.get(finding)),
        ("ocr_tokens", finding == "heads" and typed.ocr_tokens, "this finding is about phrases"),
        ("save_maps", singly and typed.save_maps, one_by_one),
    ]
    for option, given, why in rules:
        if given:
            raise ValueError(f"--{option} must be left out: {why}")


def refuse_box_metric(finding: str, run: RunSettings) -> None:
    """ValueError if a finding that scores answers is to do it by a metric of the crop's box."""
    if run.grader in OF_BOXES and finding not in (*BY_RUNS, *UNGRADED):
        raise ValueError(f"{finding} scores answers, and {run.grader} judges the box of a crop: --metric must name "
                         "another metric, such as exact")  # fmt: skip


def main(argv: Sequence[str] | None = None, **how: Any) -> None:
    """The command; `how`: the keyword arguments of `parse`."""
    patient_threads()
    finding, run, out = parse(argv, **how)
    from vicrop.checkpoints import quiet_libraries
    from vicrop.failures import RECOVERABLE
    from vicrop.files import write_atomically
    from vicrop.findings.measure import file_of
    from vicrop.findings.measure import settings_of as made_with
    from vicrop.findings.table import figure, show
    from vicrop.plots import save_figure

    quiet_libraries()
    allow_pixels(run.how.max_image_pixels)
    try:
        table = getattr(import_module(f"vicrop.findings.{finding}"), finding)(run, out)
    except RECOVERABLE as error:
        sys.exit(f"findings: {error}")
    show(table)
    written = [file_of(run, out, finding, ".json")]
    write_atomically(written[0], asdict(table) | {"settings": table.settings or made_with(run, out)})
    for name, each in {finding: table, **{f"{finding}_{name}": more for name, more in table.more.items()}}.items():
        picture = file_of(run, out, name, ".png")
        if each.rows:
            save_figure(figure(each, f"{run.model.name}, {run.task}: {each.title}"), picture)
            written.append(picture)
    written += [path for path in [file_of(run, out, finding, ".md")] if path.exists()]
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
