"""Small real models with random weights, built from configs: nothing is downloaded."""

import os
import shutil

import pytest
from builders import BUILDERS, build_llava
from outsiders import saved_in

from vicrop import outside

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")


@pytest.fixture(scope="session")
def browser():
    """A browser for all pages: Playwright can only be at work once in a process."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        assert not os.environ.get("CI"), "the pages' tests need a browser: apt-get install chromium"
        pytest.skip(f"no browser: one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def croppers(tmp_path_factory):
    """The options that name small models for external croppers: --clip FOLDER, ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "POINTS", 2)  # masks are as large as an image
        yield saved_in(tmp_path_factory.mktemp("croppers"))


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
