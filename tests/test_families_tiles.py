"""Families of tiles and resamplers give what their stock models give.

It is compared as `vicrop check` does it: rows, gradients, pixels, logits with and without a crop, answers.
"""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from builders import photo
from families_tiles import BROKEN, NEEDS, TILES
from PIL import Image
from test_families import SIZES

from vicrop import verify
from vicrop.attribution import edge_mask
from vicrop.methods import family_methods
from vicrop.probe import seeing_only_themselves
from vicrop.session import ImageSession
from vicrop.tables import GENERAL_PROMPT

ERRORS = set(verify.BOUNDS)


def lacking(name):
    """The package without which a family cannot be built here, if there is one."""
    needed = {"timm": ("torchvision", "timm"), "torchvision": ("torchvision",)}.get(NEEDS.get(name), ())
    return next((package for package in needed if importlib.util.find_spec(package) is None), None)


def marked(names):
    """Names of families for parametrize; those that cannot be built here, or fail by themselves, are skipped."""
    reasons = {name: f"needs {lacking(name)}" for name in names if lacking(name)}
    reasons |= {name: f"its stock model fails in transformers {version}" for name, version in BROKEN.items()
                if transformers.__version__.startswith(version)}  # fmt: skip
    return [pytest.param(name, marks=pytest.mark.skipif(name in reasons, reason=reasons.get(name, "")))
            for name in names]  # fmt: skip


@pytest.fixture(scope="module", params=marked(TILES))
def family(request):
    """(name, model, processor)"""
    return request.param, *TILES[request.param]()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_it_gives_what_its_stock_model_gives(family, size):
    name, model, processor = family
    assert model.config.model_type == name
    session = ImageSession([photo(*size)], model, processor)
    found = verify.verify_picture(session)
    assert found.differs == []
    assert found.errors.keys() == ERRORS
    assert not misplaced(session)


def seen(session, pixels):
    """(tokens, dim) of a picture (H, W, 3), each position of the vision side seeing itself alone."""
    adapter = session.adapter
    inputs = adapter.placed(adapter.preprocess([Image.fromarray(pixels)]))
    with torch.no_grad(), seeing_only_themselves(session.model):
        return adapter.encode_images(inputs, 1)[0].pooled.flatten(0, -2)


def misplaced(session, most=4):
    """Cells whose middle, made another, changes none of the map's tokens as much as their own."""
    (image,), (layout,) = session.images, session.layouts
    pixels, (x1, y1, x2, y2), (h, w) = np.asarray(image), layout.region, layout.grid
    plain, wrong = seen(session, pixels), []
    for place in np.linspace(0, h * w - 1, most).round().astype(int):
        row, column = divmod(int(place), w)
        box = [round(start + (end - start) * (number + part) / count) for start, end, number, count in
               ((y1, y2, row, h), (x1, x2, column, w)) for part in (0.2, 0.8)]  # fmt: skip
        if min(box) < 0 or box[1] > pixels.shape[0] or box[3] > pixels.shape[1]:
            continue  # padding is no part of a picture
        other = pixels.copy()
        other[box[0] : max(box[1], box[0] + 1), box[2] : max(box[3], box[2] + 1)] ^= 128
        change = (seen(session, other) - plain).norm(dim=-1)[torch.from_numpy(layout.index.ravel().copy())]
        if int(change.argmax()) != place:
            wrong.append((row, column, int(change.argmax())))
    return wrong


def test_pure_grad_is_made_of_pictures_or_refused(family):
    name, model, processor = family
    session = ImageSession([photo()], model, processor)
    prompt, general = session.adapter.prompt("why?"), session.adapter.prompt(GENERAL_PROMPT)
    pure_grad = family_methods("any")[2].bind(model)
    (layout,) = session.layouts
    if session.adapter.canvas(session.prepared["pixel_values"], session.prepared, layout).shape[1] != 3:
        with pytest.raises(ValueError, match=f"pure_grad needs to know how {name} models cut an image"):
            pure_grad.maps(session, prompt, general)
        return
    (found,) = pure_grad.maps(session, prompt, general)
    assert found.shape == layout.grid
    assert np.isfinite(found).all()
    height, width = edge_mask(session).shape
    assert height % layout.grid[0] == 0 or not session.adapter.whole_cells
