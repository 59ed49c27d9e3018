"""ViCrop over a dataset or one picture: look, find the box, crop, answer again.

python run.py --model llava_tiny --task demo --method rel_att
python run.py --model llava_tiny --image photo.jpg --question "what number is on the red sign?"
"""

import argparse
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

# Threads that spin while they wait for each other crawl on cores that do other work as well. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import utils
from attention import counted
from batches import FAILURES, answer_batch, in_batches, prefetched, what_failed
from checkpoints import default_device, default_dtype, load_model, local_or_hub, model_module, weights_of
from dataset import check_record, load_task, pick
from files import ROOT, in_repository
from graders import first_grader, score
from heads import PER_SAMPLE, heads_of
from images import MOST_PIXELS, allow_pixels, refuse_bad_limit
from info import GENERAL_PROMPT, METHODS, MODELS, OPTIONS, TASKS, known
from localization.analyze import head_name
from records import Results, answered
from session import MAX_NEW_TOKENS, ImageSession
from vicrop import QuestionBatch, adapter_of, build_methods, method_of
from vicrop import vicrop_qa as vicrop_qa  # notebooks import it from here, too


# ---------------------------------------------------------------------------------------------------------- a dataset
def settings(args, device):
    """What must be equal, besides the method, for records to stand in one result file; batch size and versions not."""
    data = in_repository(args.question_path)
    dtype = default_dtype(device) if DTYPES[args.dtype] is None else DTYPES[args.dtype]
    return {
        "model": args.model, "model_id": checkpoint(args.model, args.model_id),
        "weights": weights_of(args.model, args.model_id, args.revision),
        "task": args.task, "dtype": str(dtype).removeprefix("torch."),
        **adapter_options(args), "prompt": model_module(args.model).PROMPT, "general_prompt": GENERAL_PROMPT,
        "decoding": f"greedy, {MAX_NEW_TOKENS} tokens",
        "image_path": os.path.relpath(in_repository(args.image_path).resolve(), ROOT),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else str(args.question_path),
    }  # fmt: skip


def checkpoint(name, model_id):
    """A hub id, or a folder as seen from the repository, however it was typed."""
    source = local_or_hub(name, model_id)
    return os.path.relpath(Path(source).resolve(), ROOT) if Path(source).is_dir() else source


def reads(args, method):
    """What can be chosen of a method's map: "layers", "heads", or nothing."""
    return method_of(model_module(args.model), method).reads


def own_settings(args, method):
    """`settings` of one method."""
    heads = args.loc_heads and ",".join(head_name(head) for head in args.loc_heads)
    chosen = {"layer": args.layer} if "layers" in reads(args, method) else {}
    chosen |= {"loc_heads": heads or PER_SAMPLE} if "heads" in reads(args, method) else {}
    return {"method": method} | chosen


def adapter_options(args):
    """Options of the model's adapter: what the command line says, else the adapter's own defaults.

    Raises:
        ValueError: naming an option that the adapter does not have.
    """
    own = adapter_of(args.model).options
    for name in OPTIONS:
        if getattr(args, name) is not None and name not in own:
            named = ", ".join(f"--{option}" for option in OPTIONS if option in own)
            raise ValueError(f"--{name} has no meaning for {args.model}, which has {named}")
    given = {name: getattr(args, name) for name in OPTIONS if name in own}
    return {name: own[name] if value is None else value for name, value in given.items()}


def run_task(args):
    """Answer what is still open of a task, and write the result files that are complete by then.

    Raises:
        SystemExit: it was told to stop (what is finished is kept), or no record at all could be answered.
    """
    # One process per GPU under `accelerate launch` (or so many on the CPU, if told), a single one otherwise.
    # They wait for each other until the model is loaded, and a download may take long.
    on_cpu = torch.device(args.device or default_device()).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=6))
    if not state.is_local_main_process:
        warnings.simplefilter("ignore")  # the first process of a machine says the same, and has a bar to draw
    records = load_task(args.question_path)
    if not in_repository(args.image_path).is_dir():
        raise FileNotFoundError(f"no image folder at {args.image_path}: --image_path names it")
    wanted = pick(records, args.ids, args.limit)
    mine = wanted[args.chunk_id :: args.total_chunks]
    paths = {method: Path(args.save_path) / f"{args.model}-{args.task}-{method}.json" for method in args.method}
    common = settings(args, torch.device(args.device or state.device))
    results = {method: Results(path, common | own_settings(args, method)) for method, path in paths.items()}
    name, anew = share_beginning(args, results)
    done = {method: {} if method in anew else done_before(result, mine, args) for method, result in results.items()}
    share, loaded = share_and_model(args, mine, done, state)
    # Old results go only when all is loaded and checked, so that others will come in their place.
    for method in anew if state.is_main_process else ():
        results[method].clear()
    state.wait_for_everyone()
    for result in results.values():
        result.note(job=name)
    stopped = []
    if share:
        bar = Progress(results, done, mine, first_grader(args.task), f"{args.model} {args.task}", state)
        with stopping() as stopped, bar:
            answer_records(args, share, loaded, results, done, bar, stopped)
    elif not state.is_main_process:
        return  # there was nothing for it to do, so others say what has become of it
    fine = [conclude(result, wanted, records, state) for result in results.values()]
    if args.save_maps and state.is_main_process:
        for method in (method for method in results if "map" in METHODS[method]):
            say_what_has_no_map(results[method], wanted)
    if stopped:
        name = signal.Signals(stopped[0]).name
        without = ", without --overwrite," if args.overwrite else ""
        print(f"stopped by {name}: the same command{without} goes on from here", file=sys.stderr)
        sys.exit(128 + stopped[0])
    if not any(fine) and state.num_processes == 1:  # one of several may only be the first to finish a retry
        sys.exit("run.py: no record could be answered")


def share_beginning(args, results):
    """(the name of this command, [methods whose old results are to go]); the first process says so to all.

    With --overwrite old results go, but not those that this very command had begun before a launcher or a scheduler
    started it again by itself.
    """
    name = job(vars(args))
    restarts = (os.environ.get(each, "0") for each in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    again = any(count != "0" for count in restarts)
    anew = [method for method, each in results.items() if args.overwrite and not (again and each.begun_by(name))]
    return broadcast_object_list([name, anew])


def job(arguments):
    """What a command is called, also after its restarts: the job that it is a part of, a hash of what it is to do."""
    if "SLURM_JOB_ID" in os.environ:
        of = f"slurm {os.environ['SLURM_JOB_ID']}"
    else:  # a launcher stays while it starts its processes again
        of = f"{socket.gethostname()} {os.getppid()}"
    return f"{of} {hashlib.sha256(repr(sorted(arguments.items())).encode()).hexdigest()[:12]}"


def done_before(result, mine, args):
    """The finished records of a result; a ValueError if others would be added to some of which nothing is known."""
    done = result.done(args.retry_errors)
    if result.of_unknown_settings() and any(record["id"] not in done for record in mine):
        raise ValueError(f"{result.path} has no .meta.json that tells how its records were made: no others are added")
    return done


def share_and_model(args, mine, done, state):
    """(the open records that this process is to answer, (model, processor, methods) or None if there are none).

    Processes wait for each other here, not once they answer: the first one says what is open, for another one may look
    later and find more done; and it loads the model first, for it may have to be downloaded.
    """
    ids = [[record["id"] for record in mine if any(record["id"] not in finished for finished in done.values())]]
    open_ids = set(broadcast_object_list(ids)[0])
    todo = [record for record in mine if record["id"] in open_ids]
    todo.sort(key=lambda record: str(record.get("image_path")))  # questions about an image share a session
    with state.split_between_processes(todo) as share, state.local_main_process_first():
        if not share:
            return share, None
        model, processor = load_model(args.model, args.model_id, *place(args, state), args.revision)
        module, options = model_module(args.model), adapter_options(args)
        methods = build_methods(module, args.method, model, args.layer, args.loc_heads, **options)
        return share, (model, processor, methods)


def conclude(result, wanted, records, state):
    """Merge what is finished, and say so; False if all wanted records are done and every one of them is an error."""
    missing, errors = result.merge(wanted, records)
    if missing:
        if state.is_main_process:
            print(f"{result.path}: {missing} of {len(wanted)} records to come, "
                  "from other processes or from the same command again")  # fmt: skip
        return True
    print(f"{result.path}: {len(wanted)} records")
    if errors:
        named = "".join(f"\n  {key}: {error}" for key, error in list(errors.items())[:SHOWN_ERRORS])
        more = f"\n  and {len(errors) - SHOWN_ERRORS} more: see `error` there" if len(errors) > SHOWN_ERRORS else ""
        print(f"{len(errors)} records could not be answered and count as wrong (--retry_errors tries them again):"
              f"{named}{more}", file=sys.stderr)  # fmt: skip
    return len(errors) < len(wanted)


def say_what_has_no_map(result, wanted):
    """Say how many wanted records of a finished result were answered by a run that did not keep the maps."""
    if not result.path.exists():
        return
    finished, maps = result.done(), result.saved_maps()
    open_ones = [record["id"] for record in wanted if record["id"] in finished.keys() - maps.keys()]
    count = sum("error" not in finished[key] for key in open_ones)
    if count:
        print(f"{result.path}: {count} records were answered without --save_maps; tools.report makes their maps again")


def answer_records(args, records, loaded, results, done, bar, stopped):
    """Answer records, batch by batch, and append them to the results of each method as they are finished.

    Args:
        loaded: model, processor and {name: Method}.
        results: {method: Results}; done: {method: ids that need no answer}.
        bar: told after each batch; stopped: ends the work after the present batch once there is something in it.
    """
    model, processor, methods = loaded
    folder, options, sessions, read = in_repository(args.image_path), adapter_options(args), deque(maxlen=2), {}

    @lru_cache(maxsize=2)  # records come in image order, and one batch is made ahead
    def session_of_images(paths):
        session = ImageSession(paths, model, processor, **options)
        session.inputs  # noqa: B018 (made here, in the loading thread)
        note_how_read(read, list(sessions))
        sessions.append(session)
        return session

    def session_of(batch):
        """(session of the images of a batch, each once; for each record the number of its image)."""
        paths = [check_record(record, folder) for record in batch]
        unique = tuple(dict.fromkeys(paths))
        return session_of_images(unique), [unique.index(path) for path in paths]

    def alone(record):
        session_of_images.cache_clear()  # the memory may be needed that a batch has left behind
        note_how_read(read, list(sessions))
        sessions.clear()
        clear_device_cache(garbage_collection=True)
        return session_of([record])

    def open_methods(record):
        return tuple(method for method in results if record["id"] not in done[method])

    size = args.batch_size or BATCH_SIZES.get(model.device.type, 1)
    for method, result in results.items():
        result.note(**whereabouts(model, size), layers=list(methods[method].layers(model)), methods=list(results))
    began = time.perf_counter()
    with counted(model.get_decoder()) as passes:
        for batch, session in prefetched(session_of, in_batches(records, open_methods, size)):
            todo = {method: methods[method] for method in open_methods(batch[0])}
            for method, found in answer_batch(batch, session, alone, todo).items():
                for record, fields in zip(batch, found, strict=True):
                    att_map = fields.pop("map", None)
                    results[method].append(answered(record, fields), att_map if args.save_maps else None)
                spent = {"seconds": round(time.perf_counter() - began, 3), "forwards": len(passes)}
                results[method].note(**spent, **note_how_read(read, list(sessions)))
            bar.update()
            if stopped:
                return


def note_how_read(read, sessions):
    """Add to {"prefix_shared", "batched"}, for NAME.meta.json, what sessions tell: each is true if it always was."""
    for session in sessions:
        for name, value in (("prefix_shared", session.store.shared), ("batched", session.batched)):
            if value is not None:
                read[name] = read.get(name, True) and value
    return read


def whereabouts(model, batch_size):
    """How a process runs, for NAME.meta.json."""
    libraries = ("torch", "transformers", "accelerate", "numpy", "pillow")
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S%z"), "device": str(model.device), "batch_size": batch_size,
        "processes": PartialState().num_processes, "commit": getattr(model.config, "_commit_hash", None),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in libraries},
        "seed": "none: decoding is greedy, and random_crop draws from the id of a record",
    }  # fmt: skip


@contextmanager
def stopping():
    """A list that gets the number of the first Ctrl-C or SIGTERM; a second one acts as it always does."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers; whoever runs this in another one has its own
        return

    def catch(number, _):
        caught.append(number)
        signal.signal(number, found[number])

    found = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


class Progress:
    """One bar per machine: how much of a job all processes have finished, the time left, and the score so far."""

    def __init__(self, results, done, wanted, grader, name, state):
        self.results, self.grader, self.shown = results, grader, state.is_local_main_process
        self.wanted = {record["id"] for record in wanted}
        self.finished = {method: {} for method in results}  # id -> (score without crop, with crop), or None
        for method, records in done.items():
            self._take(method, records.values())
        self.next_look = 0.0
        self.bar = tqdm(total=len(wanted), initial=self._count(), desc=name, unit="question", disable=not self.shown)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.update(last=True)
        self.bar.close()

    def update(self, last=False):
        """Look what has been finished since the last call, here and by other processes."""
        if not self.shown or (time.monotonic() < self.next_look and not last):
            return
        self.next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        for method, result in self.results.items():
            self._take(method, result.news())
        self.bar.set_postfix(self._scores(), refresh=False)
        self.bar.update(self._count() - self.bar.n)

    def _take(self, method, records):
        for record in records:
            if record["id"] in self.wanted:
                self.finished[method][record["id"]] = self._graded(record)

    def _graded(self, record):
        try:
            return score(record, self.grader)
        except ValueError:  # no labels, or none that can be graded: that is for get_score.py to say
            return None

    def _count(self):
        return min(len(finished) for finished in self.finished.values())

    def _scores(self):
        shown = {}
        for method, finished in self.finished.items():
            scores = [pair for pair in finished.values() if pair]
            if scores:
                without, with_crop = (sum(column) / len(scores) for column in zip(*scores, strict=True))
                shown |= {"no crop": f"{without:.1f}", method: f"{with_crop:.1f}"}
        return shown


# -------------------------------------------------------------------------------------------------------- one picture
def run_picture(args):
    """Print both answers about one picture and draw what each method looked at."""
    from pictures import finding_figure, save_figure  # matplotlib is slow to import, and a dataset run draws nothing

    if not args.question or not args.question.strip():
        raise ValueError("--image needs a --question that is not empty")
    image, module = utils.load_image(args.image), model_module(args.model)
    model, processor = load_model(args.model, args.model_id, *place(args), args.revision)
    options = adapter_options(args)
    methods = build_methods(module, args.method, model, args.layer, args.loc_heads, **options)
    batch = QuestionBatch(ImageSession([image], model, processor, **options), [args.question])
    original = batch.original_answers(methods)
    Path(args.save_path).mkdir(parents=True, exist_ok=True)
    for name, method in methods.items():
        (finding,) = batch.results(method, original)
        path = Path(args.save_path) / f"{Path(args.image).stem}-{args.model}-{name}.png"
        save_figure(finding_figure(image, args.question, name, finding), path)
        print(f"{name}: box {finding.bbox}, drawn in {path}")
        print(f"  without crop: {finding.original_answer}\n  with crop:    {finding.crop_answer}")


# ------------------------------------------------------------------------------------------------------- command line
SHOWN_ERRORS = 20  # of those at the end of a run
SECONDS_BETWEEN_LOOKS = 0.5  # at what other processes have finished
BATCH_SIZES = {"cuda": 8}  # questions that go through the model together where nothing is said; elsewhere one
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(args, state=None):
    """(device, dtype, device_map) for `load_model`; bfloat16 on a GPU, float32 on a CPU unless told otherwise."""
    return args.device or (state.device if state else None), DTYPES[args.dtype], args.device_map


def method_list(text):
    return [known(name.strip(), METHODS, "method") for name in text.split(",")]


def layer_option(text):
    if text != "mean" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is neither a layer number (from 0) nor "mean"')
    return text if text == "mean" else int(text)


def device_option(text):
    if text == "meta":
        raise argparse.ArgumentTypeError("'meta' is no device that computes anything")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def add_model_options(parser):
    """The arguments that say which model looks, where and how; for `load_model`, `place` and `adapter_options`."""
    add = parser.add_argument
    add("--model", choices=MODELS, default="llava_tiny")
    add("--model_id", help="another checkpoint of the same family: hub id or folder")
    add("--revision", help="branch, tag or commit of a checkpoint on the hub")
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
    add("--loc_heads", help='loc_att: heads to read, as in "L14H24,L14H13", a file of localization.pipeline '
        f"stage=batch_analyze, or {PER_SAMPLE}; default: those known of the model, if any")  # fmt: skip
    add_model_options(parser)
    add("--max_image_pixels", type=int, help="open images of up to so many pixels; default: 89478485, at most "
        f"{MOST_PIXELS}")  # fmt: skip
    add("--batch_size", type=int, help="questions that go through the model together; default: 8 on CUDA, else 1")
    add("--total_chunks", type=int, default=1, help="cut the task into so many parts ...")
    add("--chunk_id", type=int, default=0, help="... and do this one (from 0)")
    add("--limit", type=int, help="only the first N records")
    add("--ids", help="file with the ids of the records to ask about: one a line, or a JSON list")
    add("--save_maps", action="store_true", help="keep the importance maps, as float16 in NAME.maps.npz (tools.report)")
    add("--retry_errors", action="store_true", help="try records again that ended in an error")
    add("--overwrite", action="store_true", help="forget earlier results of the same name")
    args = parser.parse_args(argv)
    try:
        args.method = method_list(args.method)
        adapter_options(args)
        refuse_bad_limit(args.max_image_pixels)
        if args.loc_heads and not any("heads" in reads(args, method) for method in args.method):
            raise ValueError(f"--loc_heads {args.loc_heads}: {', '.join(args.method)} reads no heads, loc_att does")
        args.loc_heads = heads_of(args.model, args.model_id, args.loc_heads)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not at least 1")
    if not 0 <= args.chunk_id < args.total_chunks:
        parser.error(f"--chunk_id {args.chunk_id} is not between 0 and --total_chunks {args.total_chunks} - 1")
    if args.question is not None and not args.image:
        parser.error("--question asks about one picture: --image names it")
    of_tasks = ("ids", "limit", "save_maps", "retry_errors", "overwrite")
    given = [name for name in of_tasks if getattr(args, name)] + ["total_chunks"] * (args.total_chunks > 1)
    if args.image and given:
        parser.error(f"--{given[0]} is about the questions of a task, and --image asks about one picture")
    if args.overwrite and (args.total_chunks > 1 or args.limit or args.ids):
        parser.error("--overwrite forgets all records, also those that this run is not about: use another --save_path")
    if not args.image_path:  # other questions than the task's own have their images beside them
        own = not args.question_path
        args.image_path = TASKS[args.task]["image_path"] if own else Path(args.question_path).parent / "images"
    args.question_path = args.question_path or TASKS[args.task]["question_path"]
    args.save_path = args.save_path or ("." if args.image else ROOT / "data" / "results")
    return args


def main(argv=None):
    args = parse(argv)
    allow_pixels(args.max_image_pixels)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        (run_picture if args.image else run_task)(args)
    except FAILURES as error:
        sys.exit(f"run.py: {what_failed(error)}")


if __name__ == "__main__":
    main()
