"""The model `vicrop` of lmms-eval answers as run.py does. Skipped where lmms-eval is not installed."""

import json
import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
from builders import photo

from vicrop.evaluation import command as run
from vicrop.files import ROOT
from vicrop.session import ImageSession

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'vicrop[lmms-eval]'")

INSTRUCTION = "Answer the question using a single word or phrase."
QUESTIONS = 6
TASK = """
task: vicrop_demo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: "{{{{question}}}}{after}"
doc_to_target: "{{{{labels[0]}}}}"
generation_kwargs: {{max_new_tokens: 20, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
PICTURES = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open("{folder}/" + doc["image_path"])]
"""


@pytest.fixture
def installed(tmp_path):
    """The environment of a Python in which the package is installed: its entry points are those of pyproject.toml."""
    about = tmp_path / "site" / "vicrop-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vicrop\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [line for group, points in groups.items()
             for line in (f"[{group}]", *(f"{name} = {place}" for name, place in points.items()))]  # fmt: skip
    (about / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join([str(about.parent), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "method", "after"), [("llava_tiny", "rel_att", f" {INSTRUCTION}"), ("blip_tiny", "grad_att", "")]
)
def test_answers_are_those_of_run_py(tmp_path, installed, model, method, after):
    demo = ROOT / "data" / "demo"
    records = json.loads((demo / "data.json").read_text())[:QUESTIONS]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "vicrop_demo.yaml").write_text(TASK.format(data=tmp_path / "data.json", after=after))
    (tmp_path / "task" / "pictures.py").write_text(PICTURES.format(folder=demo / "images"))
    subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "vicrop", "--device", "cpu", "--tasks", "vicrop_demo",
         "--model_args", f"pretrained={model},method={method}", "--include_path", str(tmp_path / "task"),
         "--log_samples", "--output_path", str(tmp_path / "out")],
        env=installed, cwd=tmp_path, check=True,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("*_samples_vicrop_demo.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    answers = [line["filtered_resps"] for line in lines]
    run.main(["--model", model, "--method", method, "--device", "cpu", "--task", "demo", "--question_path",
              str(tmp_path / "data.json"), "--image_path", str(demo / "images"), "--save_path",
              str(tmp_path / "own")])  # fmt: skip
    own = json.loads((tmp_path / "own" / f"{model}-demo-{method}.json").read_text())
    assert answers == [record["crop_answer"] for record in own]
    assert answers != [record["original_answer"] for record in own]


# ------------------------------------------------------------------------------------------- without the whole harness
def request(number, settings=None):
    """As lmms-eval asks about a document of messages."""
    arguments = ("", lambda doc: doc["messages"], settings or {}, number, "task", "test")
    return SimpleNamespace(args=arguments)


def document(text, *images, role="user", **fields):
    content = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": text}]
    return {"messages": [{"role": role, "content": content}], **fields}


@pytest.fixture
def model():
    from vicrop.lmms_eval.model import ViCrop

    return ViCrop("llava_tiny", device="cpu", batch_size=1)


@pytest.fixture
def warnings(model, monkeypatch):
    """What the model has warned of."""
    from vicrop.lmms_eval import model as module

    said = []
    monkeypatch.setattr(module, "logger", SimpleNamespace(warning=said.append))
    return said


def answers(model, *documents, settings=None):
    model.task_dict = {"task": {"test": documents}}
    return model.generate_until([request(number, settings) for number in range(len(documents))])


def test_several_images_or_none_get_the_plain_answer_and_it_is_said(model, warnings):
    from vicrop.plain import answer_about_all, answer_without_image

    pictures = [photo(seed=1), photo(seed=2)]
    text = f"what number is on the red sign? {INSTRUCTION}"
    found = answers(model, document(text, *pictures), document(text), document(text), document(text, pictures[0]))
    sessions = [ImageSession(images, model.loaded.model, model.loaded.processor) for images in (pictures, [])]
    prompts = [session.adapter.prompt("what number is on the red sign?") for session in sessions]
    assert found[0] == answer_about_all(sessions[0], prompts[0])
    assert found[1] == found[2] == answer_without_image(sessions[1], prompts[1])
    assert warnings == ["a document with several images or none gets the plain answer, without a crop",
                        "3 of 4 documents had several images or none: plain answers"]  # fmt: skip


def test_a_question_is_asked_as_the_task_words_it(model):
    roles = "<image>\nUSER: {}\nASSISTANT:"
    for text in (f"what? {INSTRUCTION}", f"what?\n{INSTRUCTION}", "what?\nAnswer with a letter.", INSTRUCTION, "what?"):
        question, options = model.as_asked(text)
        adapter = ImageSession([], model.loaded.model, model.loaded.processor, **options).adapter
        assert adapter.prompt(question) == roles.format(text)
        ends = text.endswith(INSTRUCTION) and text != INSTRUCTION
        assert adapter.prompt("else").endswith(f"{INSTRUCTION}\nASSISTANT:") == ends


def test_what_a_task_says_of_answers_is_followed(model, warnings, monkeypatch):
    monkeypatch.setattr(model, "answer", lambda text, images, doc, most: f"{most} tokens\n\nand more")
    picture = document("what number is on the red sign?", photo())
    assert answers(model, picture) == ["20 tokens\n\nand more"]
    assert answers(model, picture, settings={"max_new_tokens": 5, "until": ["\n\n"]}) == ["5 tokens"]
    answers(model, picture, picture, settings={"do_sample": True})
    assert len(warnings) == 1
    assert "answers are greedy" in warnings[0]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "1 videos"),
        (document("a", role="assistant")["messages"], "one message of the user, and is assistant"),
        (document("", photo())["messages"], "the question is empty"),
        (document("what?", "gone.png")["messages"], "no image file at gone.png"),
    ],
)
def test_what_cannot_be_asked_names_the_document(model, messages, says):
    with pytest.raises(ValueError, match=f"task, document 0: .*{says}"):
        answers(model, {"messages": messages})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methd": "rel_att"}, "unknown option '--methd': did you mean --method?"),
        ({"method": "rel_at"}, "unknown method 'rel_at': did you mean rel_att?"),
        ({"method": "rel_att,grad_att"}, "must be one method"),
        ({"pretrained": "lava"}, "unknown model 'lava': did you mean llava?"),
    ],
)
def test_wrong_model_args_are_a_sentence(options, says, capsys):
    from vicrop.lmms_eval.model import ViCrop

    with pytest.raises((SystemExit, ValueError)) as stopped:
        ViCrop(**{"device": "cpu", **options})
    assert says in capsys.readouterr().err + str(stopped.value)
