# SPDX-License-Identifier: Apache-2.0
"""Names of pictures."""

from pathlib import Path

from lightning.pytorch import Trainer

from anomalib_intra.report.picture_paths import PicturePaths


def test_names_are_those_of_anomalib_where_they_can_be(tmp_path: Path) -> None:
    trainer = Trainer(logger=False, accelerator="cpu")
    paths = PicturePaths(tmp_path)
    for image, expected in (
        ("data/good/0.png", "good/0.png"),
        ("data/good/0.jpg", "good/0.jpg"),
        ("data/good/12:30.png", "good/12_30.png"),
        ("data/good/12_30.png", "good/12_30_2.png"),
        ("data/Good/0.PNG", "Good/0_2.PNG"),
        ("data/good/0.dcm", "good/0.dcm.png"),
        ("data/good/0.png", "good/0.png"),
    ):
        assert paths.of(image, trainer).relative_to(tmp_path).as_posix() == expected
