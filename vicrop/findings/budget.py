"""Right answers for what they cost: is a crop better than to spend the tokens on resolution?"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vicrop.attention import replaced
from vicrop.crop import adapter_of
from vicrop.evaluation.settings import RunSettings
from vicrop.findings.measure import NO_CROP, TaskModel, graded, images_of, measured
from vicrop.findings.overhead import where_it_runs
from vicrop.findings.table import Table, difference, estimate, in_words
from vicrop.session import ImageBatch

BASE_TOKENS = 256  # of an image, at most, at the base: the published 256 * 28 * 28 pixels of Qwen2.5-VL
RESOLUTIONS, WITH_CROP = (0.5, 1, 2, 4, 8, 16), (0.5, 1, 2, 4)  # times the base's pixels: no crop, and methods
RIGHT, TOKENS, SECONDS = "% right", "visual tokens", "seconds"


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """A list to which each image that a model encodes adds its tokens: whole images, crops, tiles and views."""
    found, encode = [], ImageBatch.encode

    def counting(batch, inputs, layouts):
        found.extend(layout.num_tokens for layout in layouts)
        return encode(batch, inputs, layouts)

    with replaced(ImageBatch, "encode", counting):
        yield found


def base_pixels(task_model: TaskModel) -> int:
    """The pixels of an image, at most, that the model is usually asked with: --max_pixels, or its processor's own.

    Where that one allows many, as many as BASE_TOKENS take.
    """
    given, settings = task_model.loaded.options["max_pixels"], task_model.loaded.processor.image_processor
    side = settings.patch_size * settings.merge_size  # of a token, in pixels
    return given or min(settings.size["longest_edge"], BASE_TOKENS * side**2)


def costs_of(task_model: TaskModel, record: dict) -> dict[str, Any]:
    """{"score", "ways": {"METHOD at PIXELS": {RIGHT, TOKENS, SECONDS}}} of a record."""
    base, ways = base_pixels(task_model), {}
    for way in (NO_CROP, *task_model.methods):
        methods = {name: method for name, method in task_model.methods.items() if name == way}
        for factor in WITH_CROP if methods else RESOLUTIONS:
            pixels, began = int(factor * base), time.perf_counter()
            with counted_tokens() as tokens:
                batch = task_model.ask(record, max_pixels=pixels)
                originals = batch.original_answers(methods)
                answers = [batch.results(method, originals)[0].crop_answer for method in methods.values()]
            took = time.perf_counter() - began
            score = task_model.grade((answers or [originals[0].text])[0], record)
            ways[f"{way} at {pixels}"] = {RIGHT: score, TOKENS: sum(tokens), SECONDS: took}
    return {"score": ways[f"{NO_CROP} at {base}"][RIGHT], "ways": ways}


def budget(run: RunSettings, out: Path) -> Table:
    """Right answers against visual tokens and against seconds: no crop at growing resolution, methods at smaller ones.

    One question at a time; the time runs from opening the image's file to the text of the last answer.
    """
    title = "right answers for what they cost"
    if "max_pixels" not in adapter_of(*run.model.checkpoint).options:
        why = (f"no option changes the resolution in which {run.model.name} sees an image (it has no --max_pixels): "
               "a budget of tokens has no meaning for it")  # fmt: skip
        return Table(title, "way", RIGHT, {}, [why])
    where = where_it_runs(run)
    records = graded(measured(run, out, "budget", costs_of, warm_up=True, where=where))
    images = images_of(records)

    def values(way: str, what: str) -> list[float]:
        return [record["ways"][way][what] for record in records]

    rows = {
        way: {what: estimate(values(way, what), images) for what in (RIGHT, TOKENS, SECONDS)}
        for way in records[0]["ways"]
    }
    notes = [f"a way at so many pixels of an image, at most; one question at a time on {where}", *records.notes]
    plain = [way for way in rows if way.startswith(NO_CROP)]
    for way in (way for way in rows if way not in plain):
        for cost in (TOKENS, SECONDS):
            equal = next((each for each in plain if rows[each][cost]["mean"] >= rows[way][cost]["mean"]), None)
            gain = equal and in_words(difference(values(way, RIGHT), values(equal, RIGHT), images))
            against = (
                f"{gain} points over {equal}, which takes as many" if equal else "no resolution here takes as many"
            )
            notes.append(f"{way}: {rows[way][cost]['mean']:.4g} {cost}: {against}")
    return Table(title, "way", "see columns", rows, notes, (RIGHT,), 2, against=(TOKENS, SECONDS))
