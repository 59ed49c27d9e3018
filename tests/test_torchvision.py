"""What needs torchvision (`make test-torchvision`): Qwen's own utilities, and processors that need it."""

import functools
import sys
import threading
import warnings
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from builders import build_qwen2_5, photo
from families import saved
from test_families import CROP, ROWS, Stock, stock_inputs
from test_models import relative_error

pytest.importorskip("torchvision")

from vicrop import load_model, vicrop_qa  # noqa: E402 (only where there is torchvision)
from vicrop.attribution import attention  # noqa: E402
from vicrop.qwen_input import encode_base64, prepare_qwen2_5_input  # noqa: E402
from vicrop.session import ImageSession, layer_numbers  # noqa: E402


# ----------------------------------------------------------------------------------------------- chat messages of Qwen
@pytest.fixture(scope="module")
def qwen():
    return build_qwen2_5()[1]


@pytest.fixture
def served(tmp_path):
    """The address of a folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def asked_about(image, **limits):
    content = [{"type": "image", "image": image, **limits}, {"type": "text", "text": "why?"}]
    return [{"role": "user", "content": content}]


def both_ways(monkeypatch, messages, processor, **limits):
    """What a model is given by qwen_vl_utils, and without them."""
    import qwen_vl_utils

    calls, fetch = [], qwen_vl_utils.fetch_image
    monkeypatch.setattr(qwen_vl_utils, "fetch_image", lambda *given, **how: calls.append(1) or fetch(*given, **how))
    with_them = prepare_qwen2_5_input(messages, processor, **limits)
    assert calls
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "qwen_vl_utils", None)
        return with_them, prepare_qwen2_5_input(messages, processor, **limits)


@pytest.mark.parametrize("size", [(112, 84), (5, 9), (300, 41), (900, 700)])
@pytest.mark.parametrize("how", ["PIL", "file", "base64", "address"])
def test_qwens_own_utilities_give_what_is_given_without_them(qwen, tmp_path, served, monkeypatch, how, size):
    image = photo(*size)
    image.save(tmp_path / "image.png")
    messages = asked_about({"PIL": image, "file": f"file://{tmp_path}/image.png", "address": f"{served}/image.png",
                            "base64": "data:image/png;base64," + encode_base64(image)}[how])  # fmt: skip
    for limits in ({}, {"min_pixels": 56 * 56, "max_pixels": 20 * 28 * 28}):
        one, other = both_ways(monkeypatch, messages, qwen, **limits)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_picture_on_its_side_and_a_transparent_one_are_as_seen_in_both_ways(qwen, tmp_path, monkeypatch):
    exif = photo(120, 60).getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo(120, 60).save(tmp_path / "turned.jpg", exif=exif)
    clear = photo(70, 90).convert("RGBA")
    clear.putalpha(90)
    clear.save(tmp_path / "clear.png")
    for name in ("turned.jpg", "clear.png"):
        one, other = both_ways(monkeypatch, asked_about(str(tmp_path / name)), qwen)
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        _, high, wide = one["image_grid_thw"][0].tolist()
        assert high > wide


def test_limits_in_a_message_count(qwen):
    inputs = prepare_qwen2_5_input(asked_about(photo(300, 200), resized_height=56, resized_width=84), qwen)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]


# -------------------------------------------------------------------------------------------------- from saved folders
NEED_TORCHVISION = ["pixtral", "mistral3", "smolvlm"]


@pytest.fixture(scope="module", params=[*NEED_TORCHVISION, "qwen3_vl", "internvl", "llava_onevision"])
def loaded(request, tmp_path_factory):
    """(folder, model, stock processor) of a checkpoint, as `load_model` loads them."""
    folder = saved(request.param, tmp_path_factory.mktemp("weights"))
    return folder, *load_model(str(folder), device="cpu")


def test_a_saved_folder_answers(loaded):
    folder, model, processor = loaded
    assert type(processor.image_processor).__module__.partition("image_processing_")[2][:3] != "pil"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is known of it
        original, with_crop, box = vicrop_qa(str(folder), "rel_att", photo(150, 90), "why?", model, processor)
    assert original
    assert box[0] < box[2]


@pytest.mark.parametrize("size", [(90, 70), (60, 150)])
def test_with_its_own_processor_it_gives_what_the_stock_model_gives(loaded, size):
    _, model, processor = loaded
    session, question = ImageSession([photo(*size)], model, processor), "what number is on the red sign?"
    prompt, layers, (layout,) = session.adapter.prompt(question), layer_numbers(model, "mean"), session.layouts
    stock = Stock(model, processor, session.images, question)
    assert torch.equal(session.adapter.tokenize(prompt, [layout]), stock.inputs["input_ids"][0])
    assert torch.equal(session.prepared["pixel_values"], stock.inputs["pixel_values"])
    (found,) = attention(session, prompt, layers)
    assert relative_error(found.numpy(), stock.rows(layout).numpy()) <= ROWS
    for images, crops in ((session.images, None), ([*session.images, CROP], [CROP])):
        inputs = stock_inputs(processor, images, question)
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 20}
        with torch.no_grad():
            written = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
        wanted = processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        assert session.answer(prompt, crops=crops) == [wanted]
