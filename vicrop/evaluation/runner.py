"""A run over a dataset, batch by batch. It survives kills and restarts, and any number of processes share it."""

import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from vicrop.adapter import decoder_of
from vicrop.attention import counted
from vicrop.checkpoints import default_device
from vicrop.dataset import pick
from vicrop.evaluation.batching import answer_batch, batch_size_of, in_batches, prefetched
from vicrop.evaluation.own_metrics import kept
from vicrop.evaluation.progress import Progress
from vicrop.evaluation.provenance import common_settings, is_restart, method_settings, run_id, whereabouts
from vicrop.evaluation.result_files import result_path, say
from vicrop.evaluation.results import Results, with_outputs
from vicrop.evaluation.sessions import Sessions
from vicrop.evaluation.settings import RunSettings
from vicrop.evaluation.tasks import notes_on_labels, questions_of, refuse_no_images
from vicrop.files import in_repository
from vicrop.loaded import LoadedModel, load_chosen
from vicrop.tables import METHODS

SHOWN_ERRORS = 20  # so many are printed at the end of a run


def run_task(run: RunSettings) -> None:
    """Answer the questions of a task that have no answer yet, and write the result files that are then complete.

    Raises:
        SystemExit: the run was told to stop (finished records are kept), or no record at all could be answered.
    """
    # `accelerate launch` starts one process per GPU (or as many as it is told on the CPU); else there is only this one.
    # Processes wait for each other until the model is loaded, and a download may take hours.
    on_cpu = torch.device(run.model.device or default_device()).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(hours=6))
    if not state.is_local_main_process:
        warnings.simplefilter("ignore")  # the first process of a machine gives the same warnings
    records = questions_of(run)
    refuse_no_images(run)
    wanted = pick(records, run.ids, run.limit)
    mine = wanted[run.chunk_id :: run.total_chunks]
    for sentence in notes_on_labels(run, mine) if state.is_main_process else ():
        say(sentence)
    common, scoring = common_settings(run, state.device), kept(run.metrics, run.save_path)
    results = {
        method: Results(result_path(run.save_path, run.model.name, run.task, method),
                        common | method_settings(run, method), scoring)
        for method in run.how.names
    }  # fmt: skip
    name, to_clear = share_beginning(run, results)
    done = {method: {} if method in to_clear else done_before(result, mine, run) for method, result in results.items()}
    share, loaded = share_and_model(run, mine, done, state)
    # Old results are deleted only after everything is loaded and checked, so that new ones will replace them.
    for method in to_clear if state.is_main_process else ():
        results[method].clear()
    state.wait_for_everyone()
    for result in results.values():
        result.note(job=name)
    stopped: list[int] = []
    if loaded is not None:
        bar = Progress(results, done, mine, run.grader, f"{run.model.name} {run.task}", state)
        with stopping() as stopped, bar:
            answer_records(run, share, loaded, results, done, bar, stopped)
    elif not state.is_main_process:
        return  # it had nothing to do: the first process reports how the run ended
    end_of_run(run, results, wanted, records, stopped, state, was_complete=loaded is None)


def end_of_run(
    run: RunSettings, results: dict[str, Results], wanted: Sequence[dict], records: Sequence[dict],
    stopped: Sequence[int], state: PartialState, was_complete: bool,
) -> None:  # fmt: skip
    """Merge and report what is finished; SystemExit if the run was told to stop, or nothing could be answered.

    Args:
        was_complete: nothing was left to do, and so no model was loaded.
    """
    fine = [conclude(result, wanted, records, state, was_complete) for result in results.values()]
    if run.save_maps and state.is_main_process:
        for method in (method for method in results if "map" in METHODS[method]):
            say_what_has_no_map(results[method], wanted)
    if stopped:
        name = signal.Signals(stopped[0]).name
        without = ", without --overwrite," if run.overwrite else ""
        print(f"stopped by {name}: the same command{without} goes on from here", file=sys.stderr)
        sys.exit(128 + stopped[0])
    if not any(fine) and state.num_processes == 1:  # with several, others may still be answering
        sys.exit("run.py: no record could be answered")


# ------------------------------------------------------------------------------------------------- before it begins
def share_beginning(run: RunSettings, results: dict[str, Results]) -> tuple[str, list[str]]:
    """(the id of this command, [methods whose old results are deleted]), as the first process tells all others.

    --overwrite deletes old results, except those that this same command began before a launcher or a scheduler
    restarted it.
    """
    name, again = run_id(run), is_restart()
    to_clear = [method for method, each in results.items() if run.overwrite and not (again and each.started_by(name))]
    name, to_clear = broadcast_object_list([name, to_clear])
    return name, to_clear


def done_before(result: Results, mine: Sequence[dict], run: RunSettings) -> dict:
    """The finished records of a result; ValueError if new ones would join records made with unknown settings."""
    done = result.done(run.retry_errors)
    if result.of_unknown_settings() and any(record["id"] not in done for record in mine):
        raise ValueError(f"{result.path} has no .meta.json that tells how its records were made, so no new ones are "
                         "added: use --overwrite or another folder")  # fmt: skip
    return done


def share_and_model(
    run: RunSettings, mine: Sequence[dict], done: dict, state: PartialState
) -> tuple[list[dict], LoadedModel | None]:
    """(the open records that this process answers, the LoadedModel; None if there are none).

    Processes wait for each other here, and not later. The first one decides which records are open, because another
    one may look later and find more of them done; and it loads the model first, which may start a download.
    """
    ids = [[record["id"] for record in mine if any(record["id"] not in finished for finished in done.values())]]
    open_ids = set(broadcast_object_list(ids)[0])
    todo = [record for record in mine if record["id"] in open_ids]
    todo.sort(key=lambda record: str(record.get("image_path")))  # questions about an image share a session
    with state.split_between_processes(todo) as share, state.local_main_process_first():
        own = cast(list[dict], share)
        return own, load_chosen(run.model, run.how, state.device) if own else None


# ------------------------------------------------------------------------------------------------------------- answers
def answer_records(
    run: RunSettings, records: Sequence[dict], loaded: LoadedModel, results: dict[str, Results], done: dict[str, dict],
    bar: Progress, stopped: Sequence[int],
) -> None:  # fmt: skip
    """Answer records, batch by batch, and append them to the results of each method as they are finished.

    Args:
        done: {method: {id: finished record}}, which need no answer.
        bar: updated after each batch; stopped: work ends after the current batch as soon as this is not empty.
    """
    sessions = Sessions(loaded, in_repository(run.image_path))

    def open_methods(record):
        return tuple(method for method in results if record["id"] not in done[method])

    size = run.batch_size or batch_size_of(loaded.model)
    for method, result in results.items():
        layers = list(loaded.methods[method].layers(loaded.model))
        result.note(**whereabouts(loaded.model, size, list(results)), layers=layers)
    began = time.perf_counter()
    with counted(decoder_of(loaded.model)) as passes:
        for batch, session in prefetched(sessions.of, in_batches(records, open_methods, size)):
            todo = {method: loaded.methods[method] for method in open_methods(batch[0])}
            for method, found in answer_batch(batch, session, sessions.of_one, todo, run.how.crop_below).items():
                for record, fields in zip(batch, found, strict=True):
                    att_map = fields.pop("map", None)
                    results[method].append(with_outputs(record, fields), att_map if run.save_maps else None)
                spent = {"seconds": round(time.perf_counter() - began, 3), "forwards": len(passes)}
                results[method].note(**spent, **sessions.note_how_read())
            bar.update()
            if stopped:
                return


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list to which the first Ctrl-C or SIGTERM adds its signal number; a second signal acts as usual."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers: in any other one signals act as usual
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


# ------------------------------------------------------------------------------------------------------ when it ends
def conclude(
    result: Results, wanted: Sequence[dict], records: Sequence[dict], state: PartialState, was_complete: bool
) -> bool:
    """Merge and report what is finished; False if all wanted records are done and every one of them is an error."""
    missing, errors = result.merge(wanted, records)
    if missing:
        if state.is_main_process:
            print(f"{result.path}: {missing} of {len(wanted)} records to come, "
                  "from other processes, or from the same command when it is run again")  # fmt: skip
        return True
    answered = f"{len(wanted) - len(errors)} of {len(wanted)} are answered"
    note = f", complete before: {answered}, and nothing was loaded" if was_complete else ""
    print(f"{result.path}: {len(wanted)} records{note}")
    if errors:
        named = "".join(f"\n  {key}: {error}" for key, error in list(errors.items())[:SHOWN_ERRORS])
        more = f"\n  and {len(errors) - SHOWN_ERRORS} more: see `error` there" if len(errors) > SHOWN_ERRORS else ""
        print(f"{len(errors)} records could not be answered and count as wrong (--retry_errors tries them again):"
              f"{named}{more}", file=sys.stderr)  # fmt: skip
    return len(errors) < len(wanted)


def say_what_has_no_map(result: Results, wanted: Sequence[dict]) -> None:
    """Print how many wanted records of a finished result have no map: a run without --save_maps answered them."""
    if not result.path.exists():
        return
    finished, maps = result.done(), result.saved_maps()
    open_ones = [record["id"] for record in wanted if record["id"] in finished.keys() - maps.keys()]
    count = sum(not {"error", "gated"} & finished[key].keys() for key in open_ones)
    if count:
        print(f"{result.path}: {count} records were answered without --save_maps; tools.report makes their maps again")
