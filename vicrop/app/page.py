"""The page of the app (gradio): two tabs, a queue in which one question is answered at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default

from vicrop.app.work import LONGEST, OFFERED, OneModel, find_phrase, look
from vicrop.failures import recoverable_message
from vicrop.files import ROOT, read_rows
from vicrop.heads import head_name
from vicrop.localization.viz import SHOWN_HEADS
from vicrop.tables import MODELS, REGION_SHARE

QUEUE = 16  # questions that may wait
MOST_REGIONS = 4  # crops that can be asked for
KEPT = 3600  # seconds for which an uploaded picture stays on the disk
EXAMPLES = 3  # of each of those:
KNOWN_TO = {"_tiny": "demo", "_streets": "streets"}  # how the embedded models' names end -> the pictures of their world
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_name": False}
BUTTONS: list[Any] = ["fullscreen", "download"]  # not gradio's share, which sends the picture to another server
# Fonts of the reader's own computer: gradio's usual ones come from another server.
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
WHAT = """# Where does the model look?
The model answers from the whole picture. Then the picture is cropped **where it looked**, and it answers again from the
picture and the crop. Nothing is trained."""


def examples(names: Sequence[str]) -> list[list[str]]:
    """[[picture, question, model]] of small signs to read, for the embedded models among those to choose from.

    There are none where there are no pictures: they are in the clone only.
    """
    found = []
    for ending, folder in KNOWN_TO.items():
        name = next((name for name in names if name.endswith(ending)), None)
        small = {record["image_path"]: record["question"] for record in reversed(rows_of(folder, "data.json"))
                 if record["size"] == "small" and record.get("category", "reading") == "reading"}  # fmt: skip
        found += [[*each, name] for each in list(reversed(small.items()))[:EXAMPLES]] if name else []
    return found


def phrases(names: Sequence[str]) -> list[list[str]]:
    """[[picture, phrase, model]] of what can be found in the same pictures."""
    told = {record["image_path"]: record["prompt"] for folder in KNOWN_TO.values()
            for record in reversed(rows_of(folder, "grounding.jsonl"))}  # fmt: skip
    return [[picture, told[picture], name] for picture, _, name in examples(names) if picture in told]


def rows_of(folder: str, name: str) -> list[dict]:
    """The records of a file of data/, their pictures as paths; none where it is not there."""
    path = ROOT / "data" / folder / name
    images, records = path.parent / "images", read_rows(path) if path.is_file() else []
    return [record | {"image_path": str(images / Path(record["image_path"]).name)} for record in records]


def said(work: Callable[[], list[Any]], path: str | None) -> list[Any]:
    """What `work` gives; an error of the user's, or too little memory, is shown as a sentence."""
    try:
        return work()
    except Exception as error:
        sentence = recoverable_message(error)
    if path:
        sentence = sentence.replace(path, Path(path).name)  # where the server keeps it is nobody's business
    raise gr.Error(sentence, print_exception=False)


def crop_sliders() -> list[gr.Slider]:
    """Whether, where and how often to crop: the gate, how many crops, and the share that a further one needs."""
    crop_below = gr.Slider(
        0,
        1,
        1,
        step=0.05,
        label="crop only below this confidence",
        elem_id="crop-below",
        info="1: always crop. 0.9: only where the first answer is less sure than 90 %.",
    )
    regions = gr.Slider(
        1,
        MOST_REGIONS,
        1,
        step=1,
        label="crops, at most",
        elem_id="regions",
        info="One for each place that stands out, all in one prompt.",
    )
    share = gr.Slider(
        0,
        1,
        REGION_SHARE,
        step=0.05,
        label="a further crop only with this share",
        elem_id="region-share",
        info="Of what the first crop holds of the map.",
    )
    return [crop_below, regions, share]


def ask_tab(models: OneModel, names: Sequence[str]) -> None:
    """The tab of questions."""

    def ask(path: str | None, question: str, name: str, method: str, crop_below: float, regions: float,
            share: float) -> list[Any]:  # fmt: skip
        def work() -> list[Any]:
            seen = look(models, name, method, path, question, crop_below, int(regions), share)
            sure = [f"{100 * seen.confidence[which]:.0f} %" for which in ("original", "crop")]
            boxes = [f"box {', '.join(map(str, box))}" for box in seen.bboxes]
            facts = "; ".join([f"{seen.seconds:.1f} s", *(boxes or ["no crop: sure enough"])])
            return [seen.picture, seen.crops, seen.original_answer, seen.crop_answer, " and ".join(sure), facts]

        return said(work, path)

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            path = upload()
            question = gr.Textbox(label="question", max_length=LONGEST, elem_id="question")
            with gr.Row():
                name = model_choice(names)
                method = gr.Dropdown(OFFERED, value=OFFERED[0], label="method", min_width=120)
            how = crop_sliders()
            button = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Column(scale=3, min_width=280):
            picture = drawing("where it looked, and the boxes (x1, y1, x2, y2)", "picture")
            with gr.Row():
                with gr.Column(min_width=200):
                    before = gr.Textbox(label="answer without crop", elem_id="before")
                    after = gr.Textbox(label="answer with crop", elem_id="after")
                    sure = gr.Textbox(label="confidence in each", elem_id="sure")
                    facts = gr.Textbox(label="seconds and boxes", elem_id="facts")
                crops = gallery("the crop, or the crops", "crop", height=310, min_width=200)
    if found := examples(names):
        gr.Examples(found, [path, question, name], label="The embedded models know such pictures, and nothing else")
    for event in (button.click, question.submit):
        event(ask, [path, question, name, method, *how],
              [picture, crops, before, after, sure, facts], **ONE_AT_A_TIME)  # fmt: skip


def heads_tab(models: OneModel, names: Sequence[str]) -> None:
    """The tab of localization heads."""

    def find(path: str | None, phrase: str, name: str) -> list[Any]:
        def work() -> list[Any]:
            heads = find_phrase(models, name, path, phrase)
            box = "box " + ", ".join(f"{side:.0f}" for side in heads.found.box) if heads.found.box else "no box"
            facts = [f"heads {', '.join(map(head_name, heads.found.heads[:SHOWN_HEADS]))}", box, heads.found.note]
            return [heads.picture, heads.maps, "; ".join(filter(None, [*facts, f"{heads.seconds:.1f} s"]))]

        return said(work, path)

    gr.Markdown("A few attention heads of a model find what a phrase is about. Their maps make a mask and a box.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            path = upload()
            phrase = gr.Textbox(label="phrase", max_length=LONGEST, elem_id="phrase")
            name = model_choice(names)
            button = gr.Button("Find it", variant="primary", elem_id="find")
        with gr.Column(scale=3, min_width=280):
            picture = drawing("mask and box", "mask")
            facts = gr.Textbox(label="heads, box, seconds", elem_id="heads-facts")
            maps = gallery("the map of each head", "heads")
    if found := phrases(names):
        gr.Examples(found, [path, phrase, name], label="Pictures that the embedded models know")
    for event in (button.click, phrase.submit):
        event(find, [path, phrase, name], [picture, maps, facts], **ONE_AT_A_TIME)


def upload() -> gr.Image:
    """Where a picture is chosen; it stays the file that it is."""
    return gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="picture", height=300)


def drawing(label: str, name: str, **options: Any) -> gr.Image:
    """Where a picture is shown."""
    return gr.Image(label=label, elem_id=name, interactive=False, buttons=BUTTONS, **options)


def gallery(label: str, name: str, **options: Any) -> gr.Gallery:
    """Where several pictures are shown."""
    shown: dict[str, Any] = {"interactive": False, "columns": 2, "object_fit": "contain", "buttons": BUTTONS}
    return gr.Gallery(label=label, elem_id=name, **shown | options)


def model_choice(names: Sequence[str]) -> gr.Dropdown:
    """The list of models; the first one is chosen."""
    ids = {name: MODELS[name]["id"] for name in names}
    labels = [(name if "/embedded/" in where else f"{name} ({where})", name) for name, where in ids.items()]
    return gr.Dropdown(labels, value=names[0], label="model", min_width=120)


def blocks(models: OneModel, names: Sequence[str]) -> gr.Blocks:
    """The whole page, with its queue."""
    with gr.Blocks(title="Where does the model look?", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(WHAT)
        with gr.Tab("Ask"):
            ask_tab(models, names)
        with gr.Tab("Localization heads"):
            heads_tab(models, names)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def serve(models: OneModel, names: Sequence[str], host: str, port: int, upload_mb: int, wait: bool = True) -> gr.Blocks:
    """Serve the page until it is stopped, or in the background without `wait`.

    Args:
        names: the models to choose from; upload_mb: of a picture's file, at most.
    Raises:
        OSError: it cannot listen there.
    """
    page = blocks(models, names)
    page.launch(
        server_name=host, server_port=port, share=False, max_file_size=f"{upload_mb}mb", prevent_thread_lock=not wait,
        theme=Default(**FONTS), footer_links=[], ssr_mode=False, show_error=True, quiet=not wait,
    )  # fmt: skip
    return page
