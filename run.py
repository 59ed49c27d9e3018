"""ViCrop over a dataset or one picture: look, find the box, crop, answer again.

python run.py --model llava_tiny --task demo --method rel_att
python run.py --model llava_tiny --image photo.jpg --question "what number is on the red sign?"
"""

import argparse
import hashlib
import importlib
import inspect
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

# Threads that spin while they wait for each other crawl on cores that do other work as well. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import utils
from info import GENERAL_PROMPT, METHODS, MODELS, OPTIONS, TASKS
from maps import MapFunction
from records import ROOT, Results, check_record, in_repository, load_task


# ------------------------------------------------------------------------------------------------------- one question
@dataclass
class Finding:
    """What a method found: both answers, the crop's box (xyxy pixels), and its map with the region that it covers.

    `fields` are what the model's records carry besides.
    """

    original_answer: str
    crop_answer: str
    bbox: tuple
    att_map: np.ndarray | None
    region: tuple
    fields: dict = field(default_factory=dict)


class Case:
    """Questions about the images of a look, asked together; the original answers and all methods share the look.

    Args:
        look: a look.Look.
        questions: asked with the model's template.
        of: for each the number of its image.
        short_questions: for each None, or what is asked in its place for the map only (V*).
        records: their data records, for boxes that come from them (gt_crop, random_crop).
        layer: see maps.MapFunction; for the methods that read layers.
    """

    def __init__(self, look, questions, of=(0,), short_questions=(None,), records=({},), layer=None):
        for question in questions:
            if not question or not question.strip():
                raise ValueError("the question is empty")
        self.look, self.of, self.records, self.layer = look, list(of), records, layer
        self.prompts, self.general = [look.prompt(question) for question in questions], look.prompt(GENERAL_PROMPT)
        self.map_prompts = [
            look.prompt(short) if short else prompt for short, prompt in zip(short_questions, self.prompts, strict=True)
        ]

    def original_answers(self, functions):
        """The answers without a crop; rows that maps of the same prompts will need are read off their first pass."""
        layers = ()
        for method, function in functions.items():
            if getattr(function, "reads_prefill", False) and not METHODS[method]["tiles"]:
                layers = function.layers(self.look.model, self.layer)
        return self.look.answer(self.prompts, layers=layers if self.map_prompts == self.prompts else (), of=self.of)

    def find(self, method, function):
        """[(box, map or None, region of the map)] of a method, its function as given by `choose`."""
        look, images = self.look, [self.look.images[number] for number in self.of]
        wholes = [(0, 0, *image.size) for image in images]
        if not isinstance(function, MapFunction):
            boxes = [
                function(record, image.size, look.bbox_size) for record, image in zip(self.records, images, strict=True)
            ]
            return [(box, None, whole) for box, whole in zip(boxes, wholes, strict=True)]
        if METHODS[method]["tiles"]:
            maps = [function.of_tiles(look, prompt, self.general, self.layer, number)
                    for prompt, number in zip(self.map_prompts, self.of, strict=True)]  # fmt: skip
            regions = wholes
        else:
            maps = function.of(look, self.map_prompts, self.general, self.layer, of=self.of)
            regions = [look.regions[number] for number in self.of]
        return [
            (utils.bbox_in_region(att_map, region, image.size, look.bbox_size), att_map, region)
            for att_map, region, image in zip(maps, regions, images, strict=True)
        ]

    def findings(self, method, function, original_answers):
        """[Finding], one per question."""
        found = self.find(method, function)
        crops = [self.look.images[number].crop(box) for number, (box, *_) in zip(self.of, found, strict=True)]
        answers = self.look.answer(self.prompts, crops=crops, of=self.of)
        fields = self.look.record_fields(self.of, crops)
        return [
            Finding(original, answer, *each, more)
            for original, answer, each, more in zip(original_answers, answers, found, fields, strict=True)
        ]


def choose(module, methods, model, layer=None, **options):
    """{method: the module's MapFunction for it, or the function of utils that gives its box without a map}.

    Raises:
        ValueError: an unknown method; a model or an option that the module's look cannot have; a layer that the model
            does not have, or for a method that reads none.
    """
    look_class(module).check(model, **options)
    functions = {}
    for method in methods:
        row = METHODS[known(method, METHODS, "method")]
        functions[method] = getattr(module, row["map"]) if "map" in row else getattr(utils, row["box"])
    maps = [function for function in functions.values() if isinstance(function, MapFunction)]
    for function in maps:
        function.layers(model, layer)
    if layer is not None and not maps:
        raise ValueError(f"layer={layer!r} has no meaning here: {', '.join(functions)} reads no layer")
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
    functions = choose(module, [method_name], model, layer, **options)
    look = look_class(module)([image_path], model, processor, **options)
    case = Case(look, [question], short_questions=[short_question], layer=layer)
    (found,) = case.findings(method_name, functions[method_name], case.original_answers(functions))
    return found.original_answer, found.crop_answer, found.bbox


# ------------------------------------------------------------------------------------------------------------- models
def known(name, table, what):
    """The name, if the table has it; else a ValueError that lists what it has."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    return name


def model_module(name):
    return importlib.import_module(MODELS[known(name, MODELS, "model")]["module"])


def look_class(module):
    """The look.Look that a model's methods share."""
    return module.rel_att.look_class


def place(args, state=None):
    """(device, dtype, device_map) for `load_model`; bfloat16 on a GPU, float32 on a CPU unless told otherwise."""
    return args.device or (state.device if state else None), DTYPES[args.dtype], args.device_map


def load_model(name, model_id=None, device=None, dtype=None, device_map=None):
    """(model, processor) of a name of info.MODELS; a checkpoint that comes quantised loads as it is.

    Args:
        model_id: another checkpoint of the same family, hub id or folder.
        device: torch device; the first GPU (CUDA, or MPS on a Mac) if there is one.
        dtype: torch dtype; bfloat16 on CUDA, float32 elsewhere.
        device_map: as transformers takes it, "auto" to spread the layers over all GPUs; in place of `device`.
    """
    module = model_module(name)
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = model_id or MODELS[name]["id"]
    if (ROOT / source).is_dir():
        source = ROOT / source
    model = module.MODEL_CLASS.from_pretrained(source, dtype=dtype, device_map=device_map or {"": device})
    return model.eval(), module.load_processor(source)


# ---------------------------------------------------------------------------------------------------------- a dataset
def settings(args, method):
    """What must be equal for records to stand in one result file."""
    data = in_repository(args.question_path)
    return {
        "model": args.model, "model_id": args.model_id or MODELS[args.model]["id"], "task": args.task, "method": method,
        "layer": args.layer, "dtype": args.dtype, **look_options(args),
        "image_path": os.path.relpath(in_repository(args.image_path).resolve(), ROOT),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else str(args.question_path),
    }  # fmt: skip


def look_options(args):
    """Keywords of the model's look: what the command line says, else the look's own defaults.

    Raises:
        ValueError: naming an option that the model's look does not have.
    """
    look = inspect.signature(look_class(model_module(args.model))).parameters
    for name in OPTIONS:
        if getattr(args, name) is not None and name not in look:
            own = ", ".join(f"--{option}" for option in OPTIONS if option in look)
            raise ValueError(f"--{name} has no meaning for {args.model}, which has {own}")
    given = {name: getattr(args, name) for name in OPTIONS if name in look}
    return {name: look[name].default if value is None else value for name, value in given.items()}


def run_task(args):
    """Answer what is still open of a task; returns {id: error} of the records that could not be answered."""
    state = PartialState()  # one process per GPU under `accelerate launch`; a single one otherwise
    if not args.image_path:  # other questions than the task's own have their images beside them
        own = not args.question_path
        args.image_path = TASKS[args.task]["image_path"] if own else Path(args.question_path).parent / "images"
    args.question_path = args.question_path or TASKS[args.task]["question_path"]
    records = load_task(args.question_path)
    if not in_repository(args.image_path).is_dir():
        raise FileNotFoundError(f"no image folder at {args.image_path}: --image_path names it")
    paths = {method: Path(args.save_path) / f"{args.model}-{args.task}-{method}.json" for method in args.method}
    results = {method: Results(path, settings(args, method)) for method, path in paths.items()}
    if args.overwrite:
        if state.is_main_process:
            for result in results.values():
                result.clear()
        state.wait_for_everyone()  # the only time that processes wait for each other
    done = {method: result.done(args.retry_errors) for method, result in results.items()}
    wanted = records[: args.limit]
    mine = wanted[args.chunk_id :: args.total_chunks]
    open_records = [record for record in mine if any(record["id"] not in finished for finished in done.values())]
    open_records = sorted(open_records, key=lambda record: str(record.get("image_path")))  # questions share a look
    with state.split_between_processes(open_records) as share:
        if share:
            answer_records(args, share, results, done, state)
    failed = {}
    for result in results.values():
        missing, errors = result.merge(wanted, records)
        failed |= errors
        if state.is_main_process:
            print(f"{result.path}: {f'{missing} records to come' if missing else f'{len(wanted)} records'}")
    return failed if state.is_main_process else {}


def answer_records(args, records, results, done, state):
    """Answer records, batch by batch, and append them to the results of each method as they are finished."""
    module, (model, processor) = model_module(args.model), load_model(args.model, args.model_id, *place(args, state))
    folder, options = in_repository(args.image_path), look_options(args)
    functions = choose(module, results, model, args.layer, **options)

    @lru_cache(maxsize=2)  # records come in image order, and one batch is made ahead
    def look_at(paths):
        look = look_class(module)(paths, model, processor, **options)
        look.inputs  # noqa: B018 (made here, in the loading thread)
        return look

    def look_of(batch):
        """(look at the images of a batch, each once; for each record the number of its image)."""
        paths = [check_record(record, folder) for record in batch]
        unique = tuple(dict.fromkeys(paths))
        return look_at(unique), [unique.index(path) for path in paths]

    def open_methods(record):
        return tuple(method for method in results if record["id"] not in done[method])

    size = args.batch_size or BATCH_SIZES.get(model.device.type, 1)
    quiet, began = not state.is_local_main_process, time.perf_counter()
    with tqdm(total=len(records), desc=f"{args.model} {args.task}", unit="question", disable=quiet) as bar:
        for batch, look in prefetched(look_of, in_batches(records, open_methods, size)):
            todo = {method: functions[method] for method in open_methods(batch[0])}
            for method, found in answer_batch(batch, look.result, look_of, todo, args.layer).items():
                for record, fields in zip(batch, found, strict=True):
                    results[method].append(record | fields)
            bar.update(len(batch))
    seconds = time.perf_counter() - began
    if state.is_main_process:
        print(f"{len(records)} questions in {seconds:.1f} s, {seconds / len(records):.3f} s each")


def in_batches(records, kind, size):
    """Lists of at most `size` neighbours of one kind."""
    for _, group in groupby(records, kind):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def prefetched(function, items):
    """Yields (item, future of function(item)) while the next item's is under way in a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def answer_batch(batch, look, look_of, functions, layer):
    """{method: [what it adds to each record: answers and box, or the error that took their place]}.

    A batch that fails (one image cannot be read, the memory is not enough) is asked record by record.

    Args:
        look: called for (look, numbers of the records' images) of this batch; `look_of` makes it for another one.
    """
    blank = {"original_answer": "", "crop_answer": "", "bbox": None}
    try:
        seen, of = look()
        questions, short = ([record.get(name) for record in batch] for name in ("question", "short_question"))
        case = Case(seen, questions, of, short, batch, layer)
        originals = case.original_answers(functions)
        if len(batch) > 1:
            return {method: outcomes(case, method, functions[method], originals) for method in functions}
    except FAILURES as error:
        if len(batch) == 1:
            return {method: [blank | {"error": str(error)}] for method in functions}
        alone = [answer_batch([record], partial(look_of, [record]), look_of, functions, layer) for record in batch]
        return {method: [fields for each in alone for fields in each[method]] for method in functions}
    found = {}
    for method, function in functions.items():  # of a single record, one method may fail and another not
        try:
            found[method] = outcomes(case, method, function, originals)
        except FAILURES as error:
            found[method] = [blank | {"original_answer": originals[0], "error": str(error)}]
    return found


def outcomes(case, method, function, originals):
    """What a method adds to each record of a case."""
    return [
        {
            "original_answer": found.original_answer,
            "crop_answer": found.crop_answer,
            "bbox": list(found.bbox),
            **found.fields,
        }
        for found in case.findings(method, function, originals)
    ]


# -------------------------------------------------------------------------------------------------------- one picture
def run_picture(args):
    """Print both answers about one picture and draw what each method looked at."""
    from pictures import draw_finding  # matplotlib is slow to import, and a dataset run draws nothing

    if not args.question or not args.question.strip():
        raise ValueError("--image needs a --question that is not empty")
    image, module = utils.load_image(args.image), model_module(args.model)
    model, processor = load_model(args.model, args.model_id, *place(args))
    options = look_options(args)
    functions = choose(module, args.method, model, args.layer, **options)
    look = look_class(module)([image], model, processor, **options)
    case = Case(look, [args.question], layer=args.layer)
    original = case.original_answers(functions)
    Path(args.save_path).mkdir(parents=True, exist_ok=True)
    for method, function in functions.items():
        (finding,) = case.findings(method, function, original)
        path = Path(args.save_path) / f"{Path(args.image).stem}-{args.model}-{method}.png"
        draw_finding(image, args.question, method, finding, path)
        print(f"{method}: box {finding.bbox}, drawn in {path}")
        print(f"  without crop: {finding.original_answer}\n  with crop:    {finding.crop_answer}")


# ------------------------------------------------------------------------------------------------------- command line
FAILURES = (ValueError, OSError, torch.OutOfMemoryError)  # of one record or command: a sentence, no traceback
BATCH_SIZES = {"cuda": 8}  # questions that go through the model together where nothing is said; elsewhere one
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def method_list(text):
    return [known(name.strip(), METHODS, "method") for name in text.split(",")]


def layer_option(text):
    if text != "mean" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is neither a layer number (from 0) nor "mean"')
    return text if text == "mean" else int(text)


def device_option(text):
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def add_model_options(parser):
    """The arguments that say which model looks, where and how; for `load_model`, `place` and `look_options`."""
    add = parser.add_argument
    add("--model", choices=MODELS, default="llava_tiny")
    add("--model_id", help="another checkpoint of the same family: hub id or folder")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on CUDA, float32 elsewhere")
    add("--device", type=device_option, help="torch device; default: the GPU of this process, else the CPU")
    add("--device_map", choices=("auto",), help="spread a model that is larger than one GPU over all of them")
    for name, argument in OPTIONS.items():
        add(f"--{name}", **argument)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="demo")
    add("--method", default="rel_att", help=f"one or several, comma-separated: {', '.join(METHODS)}")
    add("--image", help="ask about one picture instead of a task")
    add("--question", help="what to ask about --image")
    add("--question_path", help="data.json to use instead of the task's own")
    add("--image_path", help="folder of the images; default: the task's own, or images/ beside --question_path")
    add("--save_path", help="folder for results (data/results) or, with --image, for the pictures (the current folder)")
    add("--layer", type=layer_option, help='layer to read, zero-based, or "mean"')
    add_model_options(parser)
    add("--batch_size", type=int, help="questions that go through the model together; default: 8 on CUDA, else 1")
    add("--total_chunks", type=int, default=1, help="cut the task into so many parts ...")
    add("--chunk_id", type=int, default=0, help="... and do this one (from 0)")
    add("--limit", type=int, help="only the first N records")
    add("--retry_errors", action="store_true", help="try records again that ended in an error")
    add("--overwrite", action="store_true", help="forget earlier results of the same name")
    args = parser.parse_args(argv)
    try:
        args.method = method_list(args.method)
        look_options(args)
    except ValueError as error:
        parser.error(str(error))
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size} is not at least 1")
    if not 0 <= args.chunk_id < args.total_chunks:
        parser.error(f"--chunk_id {args.chunk_id} is not between 0 and --total_chunks {args.total_chunks} - 1")
    if args.question is not None and not args.image:
        parser.error("--question asks about one picture: --image names it")
    if args.overwrite and args.total_chunks > 1:
        parser.error("--overwrite would forget what other chunks have done: use another --save_path")
    args.save_path = args.save_path or ("." if args.image else ROOT / "data" / "results")
    return args


def main(argv=None):
    args = parse(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        failed = run_picture(args) if args.image else run_task(args)
    except FAILURES as error:
        sys.exit(f"run.py: {error}")
    if failed:
        named = "; ".join(f"{number}: {error}" for number, error in list(failed.items())[:5])
        more = "; ..." if len(failed) > 5 else ""
        print(f"{len(failed)} records could not be answered and count as wrong ({named}{more})", file=sys.stderr)
        print("--retry_errors tries them again", file=sys.stderr)


if __name__ == "__main__":
    main()
