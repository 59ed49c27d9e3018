"""The app: what it does without a browser, and end to end in one, on an embedded model."""

import json
import os
import re
import socket
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from vicrop import plots
from vicrop.app import command, work
from vicrop.crop import load_model, vicrop_qa
from vicrop.files import ROOT

IMAGE, QUESTION = ROOT / "data/demo/images/scene_00001.jpg", "what number is on the blue sign?"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the app needs gradio: pip install 'vicrop[app]'")


@pytest.fixture(scope="module")
def models():
    return work.OneModel("cpu")


# ---------------------------------------------------------------------------------------------------- without a browser
@pytest.mark.parametrize("method", ["rel_att", "loc_att_high", "center_crop"])
def test_the_app_answers_as_vicrop_qa_does(models, method):
    seen = work.look(models, "llava_tiny", method, str(IMAGE), f" {QUESTION} ")
    model, processor = load_model("llava_tiny", device="cpu")
    plain = vicrop_qa("llava_tiny", method, str(IMAGE), QUESTION, model, processor)
    assert (seen.original_answer, seen.crop_answer, seen.bboxes) == (*plain[:2], (tuple(plain[2]),))
    assert seen.picture.size == Image.open(IMAGE).size
    (crop,), ((x1, y1, _, _),) = seen.crops, seen.bboxes
    assert max(crop.size) == work.CROP_SIDE
    assert seen.picture.getpixel((x1, y1 + 5)) != Image.open(IMAGE).getpixel((x1, y1 + 5))  # the box is drawn


def test_a_sure_answer_is_not_cropped_where_a_gate_is_set(models):
    asked = (models, "llava_tiny", "rel_att", str(IMAGE), QUESTION)
    always, never = (work.look(*asked, crop_below=bound) for bound in (1.0, 0.0))
    assert always.bboxes == work.look(*asked).bboxes
    assert (never.bboxes, never.crops, never.crop_answer) == ((), [], always.original_answer)
    sure = always.confidence["original"]
    assert never.confidence == {"original": sure, "crop": sure}
    assert never.picture.tobytes() == Image.open(IMAGE).convert("RGB").tobytes()  # neither map nor box
    assert work.look(*asked, crop_below=sure + 0.01).bboxes == always.bboxes


def test_every_region_that_is_asked_for_has_its_box_and_its_crop(models):
    asked = (models, "llava_tiny", "rel_att", str(IMAGE), QUESTION)
    one, three = (work.look(*asked, regions=most, region_share=0) for most in (1, 3))
    assert len(three.bboxes) == len(three.crops) == 3
    assert three.bboxes[:1] == one.bboxes
    for x1, y1, _, _ in three.bboxes[1:]:
        assert three.picture.getpixel((x1, y1 + 5)) != one.picture.getpixel((x1, y1 + 5))


@pytest.mark.parametrize("phrase", ["the blue sign", "the black sign"])
def test_a_phrase_is_grounded_as_by_vicrop_ground(models, tmp_path, phrase):
    heads = work.find_phrase(models, "llava_tiny", str(IMAGE), phrase)
    arguments = ["-m", "vicrop", "ground", str(IMAGE), phrase, "--out", str(tmp_path)]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("llava_tiny/*_bbox.json")
    plain = json.loads(path.read_text())
    assert heads.found.box == pytest.approx(plain["bbox"], abs=0.02)
    assert [name for _, name in heads.maps] == [*plain["heads"], f"{len(plain['heads'])} heads together"]


def test_one_model_is_in_memory_at_a_time():
    models = work.OneModel("cpu")
    with models.held("llava_tiny") as loaded:
        first = weakref.ref(loaded.model)
    with models.held("llava_tiny") as again:
        assert again is loaded
    del loaded, again
    with models.held("qwen2_5_tiny") as other:
        assert first() is None
        assert other.model.config.model_type == "qwen2_5_vl"
    assert models.name == "qwen2_5_tiny"


def test_a_model_that_cannot_be_loaded_leaves_none_behind(models, monkeypatch):
    def broken(*_):
        raise ValueError("no such weights")

    monkeypatch.setattr(work, "load_chosen", broken)
    own = work.OneModel("cpu")
    with pytest.raises(ValueError, match="no such weights"), own.held("llava_tiny"):
        pass
    assert own.name is None


@pytest.mark.parametrize(
    ("path", "question", "says"),
    [
        (None, QUESTION, "choose a picture first"),
        (str(IMAGE), "  ", "the question must have 1 to 1000 letters, got 0"),
        (str(IMAGE), "x" * 1001, "got 1001"),
        ("gone.jpg", QUESTION, "no image file at gone.jpg"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(models, path, question, says):
    with pytest.raises((ValueError, OSError), match=says):
        work.look(models, "llava_tiny", "rel_att", path, question)


def test_the_map_hides_less_than_half_of_the_picture():
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    drawn = np.asarray(plots.heat_over(image, np.array([[0.0, 0.5, 1.0]]), (-10, 0, 50, 20))).astype(int)
    assert (drawn[:, :10] == (0, 0, 255)).all()  # the smallest value hides nothing
    assert 100 < drawn[0, 35, 2] < 255  # more than half of the blue is left
    assert drawn[0, 20, 2] > drawn[0, 35, 2]


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"^vicrop app needs gradio: pip install 'vicrop\[app\]'$"):
        command.main([])


@pytest.mark.parametrize(
    "arguments", [["--models", "gpt"], ["--port", "0"], ["--max_upload_mb", "0"], ["--max_image_pixels", "0"]]
)
def test_options_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "Traceback" not in capsys.readouterr().err


def test_only_this_computer_reaches_it_by_default():
    given = command.parser_of("vicrop app").parse_args([])
    assert given.host == "127.0.0.1"
    kinds = ("llava", "blip", "qwen2_5")
    assert given.models.split(",") == [f"{kind}_{world}" for world in ("tiny", "streets") for kind in kinds]


@needs_gradio
def test_examples_are_pictures_of_the_world_that_their_model_knows():
    from vicrop.app.page import examples, phrases

    for found in (examples, phrases):
        rows = found(["llava", "llava_streets", "llava_tiny"])
        wanted = [("demo", "llava_tiny")] * 3 + [("streets", "llava_streets")] * 3
        assert [(Path(path).parent.parent.name, name) for path, _, name in rows] == wanted
        assert all(Path(path).is_file() and text for path, text, _ in found(["llava_streets"]))
        assert found(["llava"]) == []


# -------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def address():
    """Where the app is served, by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "vicrop", "app", "--port", port, "--device", "cpu", "--max_upload_mb", "1",
               "--max_image_pixels", "1000000"]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for line in server.stdout:
        if f"127.0.0.1:{port}" in line:
            break
    else:
        pytest.fail("the app ended before it listened")
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


@pytest.fixture
def page(browser, address):
    """The app, opened; at the end: nothing was fetched from anywhere else."""
    found = browser.new_page(viewport={"width": 1300, "height": 900})
    fetched = []
    found.on("request", lambda request: fetched.append(request.url))
    found.goto(address)
    found.wait_for_selector("#ask")
    yield found
    found.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in fetched), fetched


def shown(page, name):
    return page.locator(f"#{name} textarea, #{name} input").first


@needs_gradio
def test_a_picture_is_uploaded_and_asked_about(page):
    page.locator("input[type=file]").first.set_input_files(str(IMAGE))
    expect(page.locator("#ask")).to_be_enabled()
    page.wait_for_selector("img[src*=scene_00001]")
    shown(page, "question").fill(QUESTION)
    page.click("#ask")
    expect(shown(page, "before")).to_have_value("2", timeout=120_000)
    expect(shown(page, "after")).to_have_value("3")
    expect(page.locator("#picture img")).to_be_visible()
    expect(page.locator("#crop img").first).to_be_visible()
    assert " s; box 453, 119, 565, 231" in shown(page, "facts").input_value()
    assert shown(page, "sure").input_value().count(" %") == 2
    page.locator("#crop-below input[type=number]").fill("0")
    page.locator("#crop-below input[type=number]").press("Enter")
    page.click("#ask")
    expect(shown(page, "facts")).to_have_value(re.compile("no crop: sure enough"), timeout=120_000)
    expect(shown(page, "after")).to_have_value("2")


@needs_gradio
def test_an_example_is_picked_and_its_phrase_found(page):
    page.get_by_role("tab", name="Localization heads").click()
    page.locator("tbody tr:visible").first.click()
    expect(shown(page, "phrase")).to_have_value("the blue sign")
    page.click("#find")
    expect(page.locator("#mask img")).to_be_visible(timeout=120_000)
    assert shown(page, "heads-facts").input_value().startswith("heads L2H6, L2H1, L2H2; box 382, 64, 594, 255")
    expect(page.locator("#heads img").first).to_be_visible()


@needs_gradio
def test_what_is_wrong_is_said_and_the_next_question_is_answered(page, tmp_path):
    page.click("#ask")
    expect(page.get_by_text("choose a picture first").or_(page.get_by_text("letters, got 0")).first).to_be_visible()
    Image.new("RGB", (1001, 1000)).save(tmp_path / "large.png")
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.png"))
    page.wait_for_selector("img[src*=large]")
    shown(page, "question").fill("what?")
    page.click("#ask")
    expect(page.get_by_text("large.png is refused: it has 1001000 pixels").first).to_be_visible(timeout=60_000)
    page.locator("tbody tr:visible").first.click()
    expect(shown(page, "question")).to_have_value(QUESTION)
    page.click("#ask")
    expect(shown(page, "after")).to_have_value("3", timeout=120_000)


@needs_gradio
def test_a_file_that_is_too_large_is_not_taken(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # 1.5 MB
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "noise.png"))
    expect(page.get_by_text("maximum allowed size").first).to_be_visible(timeout=30_000)
