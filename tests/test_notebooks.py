# SPDX-License-Identifier: Apache-2.0
"""What is stored in the notebooks is of one run from start to end; slow tests run them and compare.

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
        notebook,
        timeout=600,
        kernel_name="python3",
        # What the processes of a benchmark print is for a terminal.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
        record_timing=False,
        resources={"metadata": {"path": folder}},
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


def run(name: str, folder: Path, **expressions: str) -> dict[str, Any]:
    """Run a notebook, compare its outputs with the stored ones in kind, and give values of expressions at its end."""
    values = ", ".join(f"{key!r}: {value}" for key, value in {"python": "sys.executable", **expressions}.items())
    notebook = execute(name, folder, f"import json, sys\nprint(json.dumps({{{values}}}))")
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
        data = output.get("data", {})
        for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")):
            assert not re.search(r"(^|[\s'\"(=])(/\w|[A-Z]:\\)", text), text


def test_stored_pictures_are_small() -> None:
    assert sum((FOLDER / f"{name}.ipynb").stat().st_size for name in NAMES) < 2e6


# ---- what they find --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_and_look_beats_the_yardsticks(tmp_path: Path) -> None:
    found = run("01_train_and_look", tmp_path, table="table.to_dict()", same="same", report="report.is_file()")
    for metric in ("image_AUROC", "pixel_AUROC", "PSNR"):
        values = found["table"][metric]
        assert values.pop("OnePassInTra") > max(values.values())
    assert found["same"]
    assert found["report"]


@pytest.mark.slow
def test_your_own_images_finds_the_bad_ones_and_refuses_a_file_that_will_not_do(tmp_path: Path) -> None:
    found = run(
        "02_your_own_images",
        tmp_path,
        results="results",
        new="new.to_dict('records')",
        told="told",
        refusal="refusal",
        chosen="choices.loc[0.3].to_dict()",
        csv="(OUTPUT / 'new.csv').is_file()",
    )
    assert found["results"]["image_AUROC"] >= 0.95
    assert {image["truth"] for image in found["new"]} == {"good", "bad"}
    assert all(image["anomalous"] for image in found["new"] if image["truth"] == "bad")
    assert found["told"] == found["chosen"]["false alarms"]
    assert "scale them to 8 bits, all by one white level" in found["refusal"]
    assert found["csv"]


@pytest.mark.slow
def test_benchmark_sets_models_side_by_side_and_goes_on(tmp_path: Path) -> None:
    found = run("03_benchmark", tmp_path, rows="rows.to_dict('records')", again="again.equals(rows)", page="page")
    assert [row["error"] for row in found["rows"]] == [""] * 4
    scores = {(row["model"], row["category"].split()[-1]): row["image_AUROC"] for row in found["rows"]}
    assert scores["OnePassInTra", "weave"] > scores["flat image", "weave"]
    assert found["again"]
    assert "Missing runs" not in found["page"]


@pytest.mark.slow
def test_exports_score_like_the_model(tmp_path: Path) -> None:
    found = run(
        "04_export_and_deploy",
        tmp_path,
        parity="parity.to_dict()",
        together="batch_difference",
        table="table.to_dict()",
        expected="explained[1].shape",
        files="[file.name for file in exported]",
    )
    for differences in found["parity"].values():
        assert set(differences) == {"Engine.predict", "torch", "ONNX Runtime", "OpenVINO"}
        assert max(differences.values()) < 1e-5
    assert found["together"] < 1e-5
    scores = found["table"]["ONNX Runtime"]
    assert scores.pop("good") < min(scores.values())
    assert found["expected"] == [1, 3, 128, 128]
    assert found["files"] == ["model.onnx", "model.bin", "model.xml", "model.pt"]


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        store(name)
