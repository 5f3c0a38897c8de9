"""The notebook runs from its first cell to its last, and shows what it printed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in shown) == 3
    printed, a, b = "".join(output.get("text", "") for output in shown), "alien monster", "raised back of hand"
    found = {f"e27: {b} is rather {a}", f"e38: {a} is rather {b}"}
    assert found <= {*printed.splitlines()}, "the audit finds both exchanged labels"


def test_the_notebook_shows_its_outputs_and_no_path_of_a_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells)
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
    assert "site-packages" not in NOTEBOOK.read_text(encoding="utf-8")
