"""ViCrop over a dataset or one picture: look, find the box, crop, answer again.

python run.py --model llava_tiny --task demo --method rel_att
python run.py --model llava_tiny --image photo.jpg --question "what number is on the red sign?"
"""

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import utils
from attention import GEOMETRIES, MapFunction
from info import GENERAL_PROMPT, METHODS, MODELS, TASKS
from records import ROOT, Results, check_record, in_repository, load_task


# ------------------------------------------------------------------------------------------------------- one question
@dataclass
class Finding:
    """What a method found: both answers, the crop's box (xyxy pixels), and its map with the region that it covers."""

    original_answer: str
    crop_answer: str
    bbox: tuple
    att_map: np.ndarray | None
    region: tuple


def vicrop(look, functions, question, short_question=None, record=None, layer=None, **look_options):
    """Both answers of each method about the image of a look; the look and the original answer are shared.

    Args:
        look: a module's Look of one image.
        functions: {method: what `choose` gives for it}.
        question: asked with the model's template. short_question: asked in its place for the map only (V*).
        record: the data record, for boxes that come from it (gt_crop, random_crop).
        layer: see attention.MapFunction; for the methods that read layers.
        look_options: the look's own keywords, given again to the looks at tiles.
    Returns:
        {method: Finding}
    """
    if not question or not question.strip():
        raise ValueError("the question is empty")
    image, prompt, general = look.images[0], look.prompt(question), look.prompt(GENERAL_PROMPT)
    map_prompt = look.prompt(short_question) if short_question else prompt
    # The rows that the maps of this prompt need cost nothing during the answer's own first forward pass.
    reading = [
        function for function in functions.values() if isinstance(function, MapFunction) and function.reads_layers
    ]
    original = look.answer(prompt, layers=reading[0].layers(look.model, layer) if reading else ())[0]
    findings = {}
    for method, function in functions.items():
        att_map, region = None, (0, 0, *image.size)
        if not isinstance(function, MapFunction):
            bbox = function(record or {}, image.size, look.bbox_size)
        else:
            if METHODS[method]["tiles"]:
                rest = (map_prompt, general, look.model, look.processor)
                att_map = utils.high_res(function, image, *rest, layer=layer, **look_options)
            else:
                att_map, region = function.of(look, map_prompt, general, layer)[0], look.regions[0]
            bbox = utils.bbox_in_region(att_map, region, image.size, look.bbox_size)
        findings[method] = Finding(original, look.answer(prompt, crops=[image.crop(bbox)])[0], bbox, att_map, region)
    return findings


def choose(module, methods, model, layer=None):
    """{method: the module's MapFunction for it, or the function of utils that gives its box without a map}.

    Raises:
        ValueError: an unknown method; a layer that the model does not have, or for a method that reads none.
    """
    functions = {}
    for method in methods:
        row = METHODS[known(method, METHODS, "method")]
        functions[method] = getattr(module, row["map"]) if "map" in row else getattr(utils, row["box"])
        if isinstance(functions[method], MapFunction):
            functions[method].layers(model, layer)
    return functions


def vicrop_qa(model_name, method_name, image_path, question, model, processor, short_question=None, **options):
    """One question about one picture, for notebooks.

    Args:
        model_name, method_name: names of info.MODELS and info.METHODS.
        image_path: path or PIL image.
        question: the bare question; the model's template is put around it.
        model, processor: as loaded by `load_model` or by transformers, in any dtype, with any attention implementation.
        short_question: asked in place of the question for the map only.
        options: `layer=`, and keywords of the model's look (`geometry=`, ...).
    Returns:
        (original_answer, crop_answer, bbox): strings and (x1, y1, x2, y2) ints in pixels of the image.
    """
    module, layer = model_module(model_name), options.pop("layer", None)
    functions = choose(module, [method_name], model, layer)
    look = module.Look([image_path], model, processor, **options)
    found = vicrop(look, functions, question, short_question, layer=layer, **options)[method_name]
    return found.original_answer, found.crop_answer, found.bbox


# ------------------------------------------------------------------------------------------------------------- models
def known(name, table, what):
    """The name, if the table has it; else a ValueError that lists what it has."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    return name


def model_module(name):
    return importlib.import_module(MODELS[known(name, MODELS, "model")]["module"])


def load_model(name, model_id=None, device=None, dtype=None):
    """(model, processor) of a name of info.MODELS.

    Args:
        model_id: another checkpoint of the same family, hub id or folder.
        device: torch device; the first GPU if there is one.
        dtype: torch dtype; bfloat16 on a GPU, float32 on a CPU.
    """
    module = model_module(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = model_id or MODELS[name]["id"]
    if (ROOT / source).is_dir():
        source = ROOT / source
    model = module.MODEL_CLASS.from_pretrained(source, dtype=dtype).to(device).eval()
    return model, module.PROCESSOR_CLASS.from_pretrained(source)


# ---------------------------------------------------------------------------------------------------------- a dataset
def settings(args, method):
    """What must be equal for records to stand in one result file."""
    return {
        "model": args.model, "model_id": args.model_id or MODELS[args.model]["id"], "task": args.task, "method": method,
        "question_path": str(args.question_path), "layer": args.layer, "dtype": args.dtype, **look_options(args),
    }  # fmt: skip


def look_options(args):
    return {"geometry": args.geometry, "image_fit": args.image_fit}


def run_task(args):
    """Answer what is still open of a task; returns (records tried, those that could not be answered)."""
    state = PartialState()  # one process per GPU under `accelerate launch`; a single one otherwise
    task = TASKS[args.task]
    args.question_path = args.question_path or task["question_path"]
    image_folder = in_repository(args.image_path or task["image_path"])
    records = load_task(args.question_path)[: args.limit]
    results = {}
    for method in args.method:
        path = Path(args.save_path) / f"{args.model}-{args.task}-{method}.json"
        results[method] = Results(path, settings(args, method), args.overwrite)
    done = {method: result.done() for method, result in results.items()}
    mine = records[args.chunk_id :: args.total_chunks]
    open_records = [r for r in mine if any(r["id"] not in finished for finished in done.values())]
    open_records = sorted(open_records, key=lambda record: str(record.get("image_path")))  # questions share a look
    with state.split_between_processes(open_records) as share:
        failed = answer_records(args, share, results, done, image_folder, state) if share else []
        tried = len(share)
    for result in results.values():
        missing = result.merge(records)
        if state.is_main_process:
            print(f"{result.path}: {f'{missing} records still open' if missing else f'{len(records)} records'}")
    return tried, failed


def answer_records(args, records, results, done, image_folder, state):
    """Answer records and append them as they are finished; returns those that failed, each kept with its `error`."""
    device = args.device or state.device
    module, (model, processor) = (
        model_module(args.model),
        load_model(args.model, args.model_id, device, DTYPES[args.dtype]),
    )
    functions = choose(module, results, model, args.layer)
    look, seen, failed = None, None, []
    for record in tqdm(
        records, desc=f"{args.model} {args.task} {','.join(results)}", disable=not state.is_local_main_process
    ):
        methods = {method: functions[method] for method in results if record["id"] not in done[method]}
        try:
            path = check_record(record, image_folder)
            if path != seen:
                look = seen = None  # frees the old look before the new one is made
                look, seen = module.Look([path], model, processor, **look_options(args)), path
            found = vicrop(
                look,
                methods,
                record["question"],
                record.get("short_question"),
                record,
                args.layer,
                **look_options(args),
            )
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            failed.append(record | {"error": str(error)})
            for method in methods:
                results[method].append(
                    record | {"original_answer": "", "crop_answer": "", "bbox": None, "error": str(error)}
                )
            continue
        for method, finding in found.items():
            answers = {"original_answer": finding.original_answer, "crop_answer": finding.crop_answer}
            results[method].append(record | answers | {"bbox": [int(side) for side in finding.bbox]})
    return failed


# -------------------------------------------------------------------------------------------------------- one picture
def run_picture(args):
    """Print both answers about one picture and write what each method looked at; returns as run_task does."""
    from pictures import draw_finding  # matplotlib is slow to import, and a dataset run draws nothing

    if not args.question or not args.question.strip():
        raise ValueError("--image needs a --question that is not empty")
    image = utils.load_image(args.image)
    model, processor = load_model(args.model, args.model_id, args.device, DTYPES[args.dtype])
    module = model_module(args.model)
    functions = choose(module, args.method, model, args.layer)
    look = module.Look([image], model, processor, **look_options(args))
    found = vicrop(look, functions, args.question, layer=args.layer, **look_options(args))
    Path(args.save_path).mkdir(parents=True, exist_ok=True)
    for method, finding in found.items():
        path = Path(args.save_path) / f"{Path(args.image).stem}-{args.model}-{method}.png"
        draw_finding(image, args.question, method, finding, path)
        print(f"{method}: box {finding.bbox}, drawn in {path}")
        print(f"  without crop: {finding.original_answer}\n  with crop:    {finding.crop_answer}")
    return 1, []


# ------------------------------------------------------------------------------------------------------- command line
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def method_list(text):
    return [known(name, METHODS, "method") for name in text.split(",")]


def layer_option(text):
    return text if text == "mean" else int(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="llava_tiny")
    add("--task", choices=TASKS, default="demo")
    add("--method", default="rel_att", help=f"one or several, comma-separated: {', '.join(METHODS)}")
    add("--model_id", help="another checkpoint of the same family: hub id or folder")
    add("--image", help="ask about one picture instead of a task")
    add("--question", help="what to ask about --image")
    add("--question_path", help="data.json to use instead of the task's own")
    add("--image_path", help="folder of the images to use instead of the task's own")
    add("--save_path", help="folder for results (data/results) or, with --image, for the pictures (the current folder)")
    add("--layer", type=layer_option, help='layer to read, zero-based, or "mean"')
    add(
        "--geometry",
        choices=GEOMETRIES,
        default="exact",
        help="which pixels the map covers; upstream: as the published code",
    )
    add(
        "--image_fit",
        choices=("processor", "pad"),
        default="processor",
        help="pad: show LLaVA the whole image in a square",
    )
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="torch device; default: the GPU of this process, else the CPU")
    add("--total_chunks", type=int, default=1, help="cut the task into so many parts ...")
    add("--chunk_id", type=int, default=0, help="... and do this one (from 0)")
    add("--limit", type=int, help="only the first N records")
    add("--overwrite", action="store_true", help="forget earlier results of the same name")
    args = parser.parse_args(argv)
    try:
        args.method = method_list(args.method)
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= args.chunk_id < args.total_chunks:
        parser.error(f"--chunk_id {args.chunk_id} is not between 0 and --total_chunks {args.total_chunks} - 1")
    args.save_path = args.save_path or ("." if args.image else ROOT / "data" / "results")
    return args


def main(argv=None):
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tried, failed = run_picture(args) if args.image else run_task(args)
    except (ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
    if failed:
        named = "; ".join(f"{record['id']}: {record['error']}" for record in failed[:5])
        more = "; ..." if len(failed) > 5 else ""
        print(f"{len(failed)} records could not be answered and count as wrong ({named}{more})", file=sys.stderr)
        sys.exit(int(len(failed) == tried))


if __name__ == "__main__":
    main()
