"""The notebook runs from top to bottom, with any model, and is committed as it ran with the first."""

import tomllib

import nbformat
import pytest
from nbclient import NotebookClient

from vicrop.files import ROOT
from vicrop.tables import MODELS

PATH = ROOT / "quick_start.ipynb"


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def executed(notebook):
    """The notebook, run; a cell that fails is an error."""
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return notebook


def test_the_notebook_runs_and_says_what_it_said():
    committed, notebook = (nbformat.read(PATH, as_version=4) for _ in range(2))
    for now, then in zip(executed(notebook).cells, committed.cells, strict=True):
        if now.cell_type == "code":
            assert printed(now) == printed(then)
            # A text may come in one piece or in several, and is compared as a whole above.
            now, then = ([each.output_type for each in cell.outputs if "name" not in each] for cell in (now, then))
            assert now == then
    text = PATH.read_text()
    assert '"image/png"' in text
    assert '"error"' not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize("model", ["qwen2_5_tiny", MODELS["blip_tiny"]["id"]])  # by name, and by folder
def test_only_the_name_of_the_model_need_be_changed(model):
    notebook = nbformat.read(PATH, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith('MODEL = "llava_tiny"')
    first.source = f"MODEL = {model!r}"
    text = "".join(printed(cell) for cell in executed(notebook).cells if cell.cell_type == "code")
    assert "with crop:    3" in text
    assert "greedy [" in text
    assert "USER:" not in text  # that is how LLaVA is asked


def test_what_it_needs_is_in_an_extra_and_said():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["notebook"]
    assert "pip install '.[notebook]'" in nbformat.read(PATH, as_version=4).cells[0].source
