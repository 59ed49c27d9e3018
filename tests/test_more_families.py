"""The further families give what their stock models give, with maps in the right places; or they are refused.

What `vicrop check` compares is what test_families.py does, with the same bounds and more: rows, gradients, pixels,
logits and answers, with and without a crop, and the layout by its formula against the one that is measured.
"""

import contextlib
import warnings

import pytest
from builders import photo
from families import saved
from families_rasters import NOT_CARRIED, RASTERS, WITH_TORCHVISION
from test_families import misplaced, shows_another_region
from transformers.utils import is_torchvision_available

from vicrop import guard, load_model
from vicrop.adapter import REGISTRY
from vicrop.session import ImageSession
from vicrop.verify import SIZES, own_logits, verify

FAMILIES = RASTERS | (WITH_TORCHVISION if is_torchvision_available() else {})
TWO_INPUTS = {"deepseek_vl_hybrid"}  # of pixels, so the gradient of one is not the whole


def admitted(build):
    """(model, processor) of a small model; one that no adapter knows is admitted, as if it had been checked."""
    model, processor = build()
    setattr(model, guard.ADMITTED, True)
    return model, processor


def differs(model, processor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is known of it
        return verify(model, processor)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, processor) of a small model of a family."""
    return request.param, *admitted(FAMILIES[request.param])


def test_it_gives_what_its_stock_model_gives(family):
    name, model, processor = family
    report = differs(model, processor)
    assert report.differs == []
    assert report.family == name
    if name in REGISTRY and name not in TWO_INPUTS:
        assert all("pixels" in each.errors for each in report.pictures)


def test_its_maps_lie_where_its_tokens_and_pixels_do(family):
    """The canvas of a known family, whose layout was measured above; the layout that is measured of any other."""
    name, model, processor = family
    for size in SIZES:
        if name in REGISTRY:
            assert not shows_another_region(model, processor, size)
        else:
            session = ImageSession([photo(*size)], model, processor)
            assert not misplaced(session, session.layouts[0].index)


def test_a_crop_of_the_images_own_size_is_seen_in_the_layers_too():
    """Granite's embeddings of an image's tokens are noughts: its features come in the layers."""
    model, processor = RASTERS["granite4_vision"]()
    session = ImageSession([photo(90, 90)], model, processor)
    prompt = session.adapter.prompt("why?")
    found = [own_logits(session, prompt, (photo(90, 90, seed=seed),)) for seed in (1, 2)]
    assert not found[0].equal(found[1])


@pytest.mark.parametrize("name", ["gemma4", "qwen2_5_omni_thinker"])
def test_a_saved_folder_answers_also_without_ears(name, tmp_path):
    """Gemma 4's larger checkpoints have no part that listens; their config says so, and lacks nothing."""
    model, processor = load_model(str(saved(name, tmp_path, RASTERS)), device="cpu")
    session = ImageSession([photo()], model, processor)
    assert session.answer(session.adapter.prompt("why?")) != [""]


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_what_does_not_hold_is_refused(name):
    """One that is told from its stock model, or that fails: in both cases it never answers."""
    model, processor = admitted(NOT_CARRIED[name])
    with contextlib.suppress(ValueError):  # one that its session, or its processor, refuses
        assert differs(model, processor).differs
