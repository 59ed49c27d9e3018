"""The further families give what their stock models give, with maps in the right places.

What `vicrop check` compares is what test_families.py does, with the same bounds and more: rows, gradients, pixels,
logits and answers, with and without a crop, and the layout by its formula against the one that is measured.
"""

import warnings

import pytest
from builders import photo
from families_rasters import RASTERS, WITH_TORCHVISION
from test_families import misplaced, shows_another_region
from transformers.utils import is_torchvision_available

from vicrop import guard
from vicrop.adapter import REGISTRY
from vicrop.session import ImageSession
from vicrop.verify import SIZES, verify

FAMILIES = RASTERS | (WITH_TORCHVISION if is_torchvision_available() else {})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, processor) of a small model of a family; one that no adapter knows is admitted, as once checked."""
    model, processor = FAMILIES[request.param]()
    setattr(model, guard.ADMITTED, True)
    return request.param, model, processor


def test_it_gives_what_its_stock_model_gives(family):
    name, model, processor = family
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is known of it
        report = verify(model, processor)
    assert report.differs == []
    assert report.family == name
    for each in report.pictures:
        assert ("pixels" in each.errors) is (name in REGISTRY)


def test_its_maps_lie_where_its_tokens_and_pixels_do(family):
    """The measured layout of a family that no adapter knows by changing its pixels; the canvas of the others."""
    name, model, processor = family
    for size in SIZES:
        if name in REGISTRY:
            assert not shows_another_region(model, processor, size)
        else:
            session = ImageSession([photo(*size)], model, processor)
            assert not misplaced(session, session.layouts[0].index)
