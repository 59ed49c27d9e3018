"""The notebook runs from top to bottom, and is committed as it ran."""

import nbformat
from nbclient import NotebookClient

from vicrop.files import ROOT


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_notebook_runs_and_says_what_it_said():
    path = ROOT / "quick_start.ipynb"
    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    for now, then in zip(notebook.cells, committed.cells, strict=True):
        if now.cell_type == "code":
            assert printed(now) == printed(then)
            # A text may come in one piece or in several, and is compared as a whole above.
            now, then = ([each.output_type for each in cell.outputs if "name" not in each] for cell in (now, then))
            assert now == then
    text = path.read_text()
    assert '"image/png"' in text
    assert '"error"' not in text
    assert str(ROOT) not in text
