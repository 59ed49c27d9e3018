"""Small real models with random weights, built from configs: nothing is downloaded."""

import pytest
from builders import BUILDERS, build_llava


@pytest.fixture(scope="session")
def llava():
    return build_llava()


@pytest.fixture(scope="session")
def squashing_llava():
    return build_llava(center_crop=False, side=48, patch=8)


@pytest.fixture(scope="session", params=BUILDERS)
def shaped(request):
    """(name, model, processor) of each shape of each kind of model."""
    return request.param, *BUILDERS[request.param]()
