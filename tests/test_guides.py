# SPDX-License-Identifier: Apache-2.0
"""Programs of the guides run as they stand there, and say what ``Engine.predict`` says."""

import shutil
from pathlib import Path

import pytest

from anomalib_intra import OnePassInTra

from .conftest import Run, tiny_engine
from .readme import ROOT, blocks_of


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
