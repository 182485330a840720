# SPDX-License-Identifier: Apache-2.0
"""Programs of the guides run as they stand there, and say what ``Engine.predict`` says."""

import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalib_intra import OnePassInTra

from .conftest import Run, tiny_engine
from .readme import ROOT, blocks_of, commands
from .test_readme import run, small


@pytest.fixture
def parts(trained_one_pass: Run, few_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a guide speaks of: a checkpoint, and new parts. Its programs run in it."""
    shutil.copy(trained_one_pass.checkpoint, tmp_path / "model.ckpt")
    for kind in ("good", "hole"):
        shutil.copytree(few_root / "weave/test" / kind, tmp_path / "my_parts/new", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def programs(page: str) -> list[str]:
    text = (ROOT / "docs/guide" / page).read_text(encoding="utf-8")
    return [block for language, block in blocks_of(text) if language == "python"]


def test_one_image_after_the_other_is_scored_as_all_at_once(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = OnePassInTra.load_from_checkpoint("model.ckpt", visualizer=False)
    batches = tiny_engine(parts / "results").predict(model, data_path="my_parts/new")
    expected = {Path(image.image_path).name: image for batch in batches for image in batch}
    capsys.readouterr()
    (program,) = programs("long-runs.md")
    exec(program, {})
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {Path(path).name for path, *_ in said} == set(expected)
    for path, score, label in said:
        image = expected[Path(path).name]
        assert float(score) == pytest.approx(float(image.pred_score), abs=1e-6)
        assert label == str(bool(image.pred_label))


# ---- at the line -----------------------------------------------------------------------------------------------------


def test_a_line_scores_stored_frames_as_predict_does(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("nncf", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    model = OnePassInTra.load_from_checkpoint("model.ckpt")
    for kind in ("onnx", "openvino"):
        tiny_engine(parts / "export").export(model, kind, export_root="out")
    capsys.readouterr()
    line: dict = {}
    *of_the_line, check = programs("at-the-line.md")
    for program in of_the_line:
        exec(program, line)
    files = sorted((parts / "my_parts/new").iterdir())
    for order, end in (("rgb", "OFF BY 0."), ("bgr", "as predicted")):
        scores = [f"{file.name},{line['judge'](cv2.imread(str(file)), order)[0]:.6f}" for file in files]
        Path("my_parts/scores.csv").write_text("\n".join(scores), encoding="utf-8")
        capsys.readouterr()
        exec(check, line)
        said = [one for one in capsys.readouterr().out.splitlines() if "my_parts/new" in one]
        assert len(said) == len(files)
        assert all(end in one for one in said), said

    frame = cv2.imread(str(files[0]))
    of_both = [line[judge](frame, "bgr") for judge in ("judge", "judge_with_openvino")]
    assert of_both[0][:2] == pytest.approx(of_both[1][:2], abs=1e-5)
    np.testing.assert_allclose(of_both[0][2], of_both[1][2], atol=1e-5)


def test_frames_of_all_kinds_come_to_the_model_alike() -> None:
    line: dict = {}
    exec(programs("at-the-line.md")[0], line)
    model_input = line["model_input"]
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    expected = (rgb.transpose(2, 0, 1)[None] / 255).astype(np.float32)
    for got in (model_input(rgb, "rgb"), model_input(rgb[..., ::-1], "bgr")):
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, expected)
    mono, deep = rgb[..., 0], (rgb[..., 0] / 255 * 4095).round().astype(np.uint16)
    for got in (model_input(mono, "mono"), model_input(deep, "mono", white=4095)):
        np.testing.assert_array_equal(got, expected[:, :1].repeat(3, axis=1))
    for frame, order, white, said in (
        (rgb, "mono", 255, r"A mono frame has the shape \(H, W\), not \(6, 8, 3\)"),
        (mono, "bgr", 255, r"A bgr frame has the shape \(H, W, 3\), not \(6, 8\)"),
        (deep, "mono", 255, "white at 255 is not of uint16"),
        (mono, "mono", 4095, "white at 4095 is not of uint8"),
        (mono / 255, "mono", 255, "is not of float64"),
    ):
        with pytest.raises(ValueError, match=said):
            model_input(frame, order, white)


# ---- a training that follows another ---------------------------------------------------------------------------------


def test_old_and_new_model_are_tested_on_what_neither_learned_from(parts: Path, few_root: Path) -> None:
    for folder, images in {"good": "train/good", "good_test": "test/good", "bad": "test/hole"}.items():
        shutil.copytree(few_root / "weave" / images, parts / "my_parts" / folder)
    page = (ROOT / "docs/guide/own-images.md").read_text(encoding="utf-8")
    ((_, block),) = blocks_of(page[page.index("## Train again") : page.index("## Settings")])
    reports = parts / "results/OnePassInTra/my_parts"
    for words in commands(block):
        if words[0] == "anomalib-intra":
            run([*small(words), "--model.visualizer=true"])
        else:
            subprocess.run(words, check=True)
        if words[0] == "cp":  # the model of before, which a reader has
            shutil.copy("models/june.ckpt", "models/may.ckpt")
    pages = [path.read_text(encoding="utf-8") for path in reports.rglob("v0/**/report.html")]
    assert len(pages) == 3  # of the training, and of both tests
    assert all("10 images, 8 normal, 2 anomalous" in " ".join(page.split()) for page in pages)
