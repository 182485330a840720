# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from start to end, and what is stored in them is what such a run gives.

``python -m tests.test_notebooks`` runs all of them, or those whose names are given, and stores their outputs.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]


def execute(name: str, folder: Path, last: str = "") -> NotebookNode:
    """Run a notebook as stored, and a last cell if there is one, in a kernel of its own that starts in a folder."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if last:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    return NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    ).execute()


def store(name: str) -> None:
    """Run a notebook and write it back with its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(name, Path(folder))
    for output in outputs(notebook):
        data = output.get("data", {})
        if "image/jpeg" in data:  # PIL gives both; a PNG of a texture is five times as large
            data.pop("image/png", None)
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def run(name: str, folder: Path, found: str) -> dict[str, Any]:
    """Run a notebook, compare its outputs with the stored ones in kind, and give what it found."""
    notebook = execute(name, folder, f"import json, sys\nprint(json.dumps({{'python': sys.executable, **{found}}}))")
    last = notebook.cells.pop()
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert [kinds(cell) for cell in notebook.cells] == [kinds(cell) for cell in stored.cells]
    results = json.loads(last.outputs[0].text)
    assert results.pop("python") == sys.executable
    return results


def kinds(cell: NotebookNode) -> list[set[str]]:
    """What a reader sees of each output, whatever its numbers."""
    return [set(output.get("data", {output.get("name"): ""})) - {"image/png"} for output in cell.get("outputs", [])]


# ---- what is stored --------------------------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def stored(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def test_stored_outputs_are_of_one_run_from_start_to_end(stored: NotebookNode) -> None:
    nbformat.validate(stored)
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output.output_type for output in outputs(stored)} <= {"stream", "display_data", "execute_result"}


def test_stored_outputs_have_neither_warnings_nor_paths_of_a_machine(stored: NotebookNode) -> None:
    for output in outputs(stored):
        assert output.get("name") != "stderr"
        texts = [output.get("text", ""), *(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html"))]
        for text in texts:
            assert not re.search(r"(^|[\s'\"(=])(/\w|[A-Z]:\\)", text), text


def test_stored_pictures_are_small() -> None:
    assert sum((FOLDER / f"{name}.ipynb").stat().st_size for name in NAMES) < 2e6


# ---- what they find --------------------------------------------------------------------------------------------------


def test_train_and_look_beats_the_yardsticks(tmp_path: Path) -> None:
    found = run("01_train_and_look", tmp_path, "{'table': table.to_dict(), 'same': same, 'report': str(report)}")
    for metric in ("image_AUROC", "pixel_AUROC", "PSNR"):
        values = found["table"][metric]
        assert values.pop("InTra") > max(values.values())
    assert found["same"]
    assert Path(found["report"]).is_file()


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        store(name)
