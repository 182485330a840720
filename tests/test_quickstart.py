# SPDX-License-Identifier: Apache-2.0
"""The quickstart as a user runs it. Takes minutes: ``python -m pytest -m slow``."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anomalib_intra import TextureDemo
from anomalib_intra.yardsticks import yardsticks

from .conftest import CONFIGS


@pytest.mark.slow
def test_quickstart_detects_and_beats_the_yardsticks(tmp_path: Path) -> None:
    anomalib = Path(sys.executable).with_name("anomalib")
    begin = time.monotonic()
    done = subprocess.run(
        [anomalib, "train", "--config", CONFIGS / "quickstart.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    minutes = (time.monotonic() - begin) / 60
    results = {name: float(value) for name, value in re.findall(r"│\s+(\w+)\s+│\s+([\d.]+)\s+│", done.stdout)}
    assert results["image_AUROC"] >= 0.95
    assert results["pixel_AUROC"] >= 0.95
    assert minutes < 5

    lazy = yardsticks(TextureDemo(tmp_path / "datasets/TextureDemo", num_workers=0), image_size=(128, 128))
    for name in ("image_AUROC", "pixel_AUROC"):
        assert results[name] > lazy[name].max()
    assert results["good_PSNR"] > lazy["PSNR"].max() + 3
    assert len(list(tmp_path.rglob("images/test/**/*.png"))) == 52
