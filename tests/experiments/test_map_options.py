# SPDX-License-Identifier: Apache-2.0
"""The options of scoring, measured one after the other on a trained model."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from anomalib_intra import InTra, InTraPostProcessor, TextureDemo
from anomalib_intra.experiments.map_options import map_options
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.metrics import PaperEvaluator

from ..conftest import tiny_engine, tiny_intra

OF_THE_MAP = {"colour_weight": 0.5, "deviation": "scaled", "score_share": 0.05}
OPTIONS = ({}, OF_THE_MAP, {"second_pass": True}, {"window_shift": 1})


@pytest.fixture(scope="module")
def checkpoint(few_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    engine = tiny_engine(tmp_path_factory.mktemp("options"), max_epochs=1)
    engine.fit(tiny_intra(windows_per_image=64), datamodule=TextureDemo(few_root, num_workers=0))
    return Path(engine.best_model_path)


def test_rows_are_tests_with_these_options_and_images_are_reconstructed_once(
    checkpoint: Path, few: TextureDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconstructed = []
    reconstruct = InpaintingTransformer.reconstruct

    def count(self: InpaintingTransformer, images: torch.Tensor, *args: object) -> torch.Tensor:
        reconstructed.append((self.window_shift, len(images)))
        return reconstruct(self, images, *args)

    with monkeypatch.context() as patch:
        patch.setattr(InpaintingTransformer, "reconstruct", count)
        table = map_options(checkpoint, few, OPTIONS, tmp_path / "out")
    images = [sum(number for shift, number in reconstructed if shift == s) for s in (0, 1)]
    every = len(few.train_data) + len(few.val_data) + len(few.test_data)
    assert images[1] == every
    assert every < images[0] <= every + len(few.val_data) + len(few.test_data)  # and some again in the second pass

    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/map-options.csv"), table, check_exact=False)
    assert table["options"].tolist() == [
        "as trained", "colour_weight=0.5, deviation=scaled, score_share=0.05", "second_pass=True", "window_shift=1"
    ]  # fmt: skip
    assert len(table["pixel_AUROC"].unique()) == len(OPTIONS)
    for chosen, (_, row) in zip(OPTIONS, table.iterrows(), strict=True):
        of_the_map = {name: value for name, value in chosen.items() if name in OF_THE_MAP}
        model = InTra.load_from_checkpoint(
            checkpoint,
            post_processor=InTraPostProcessor(**of_the_map),
            evaluator=PaperEvaluator(decisions=False, psnr_prefix=""),
            visualizer=False,
            **{name: value for name, value in chosen.items() if name not in of_the_map},
        )
        (expected,) = tiny_engine(tmp_path).test(model, datamodule=few)
        assert dict(row.drop("options")) == pytest.approx(expected, abs=1e-5)


def test_the_command(
    checkpoint: Path, few_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from anomalib_intra.cli import main

    options = json.dumps([{"deviation": "positive"}])
    arguments = ["--checkpoint", checkpoint, "--data", "TextureDemo", "--data.root", few_root, "--options", options]
    monkeypatch.setattr("sys.argv", ["anomalib-intra", "map-options", *map(str, arguments), "--output", str(tmp_path)])
    main()
    assert "deviation=positive" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "map-options.csv")["image_AUROC"].between(0, 1).all()


def test_the_papers_map_is_measured_on_a_checkpoint_with_another(
    checkpoint: Path, few: TextureDemo, tmp_path: Path
) -> None:
    model = InTra.load_from_checkpoint(checkpoint, post_processor=InTraPostProcessor(colour_weight=0.5))
    engine = tiny_engine(tmp_path)
    engine.test(model, datamodule=few)
    engine.trainer.save_checkpoint(tmp_path / "coloured.ckpt")
    options = ({}, {"colour_weight": 0.0}, {"colour_weight": 0.5})
    table = map_options(tmp_path / "coloured.ckpt", few, options, tmp_path / "coloured")
    of_the_paper = map_options(checkpoint, few, ({},), tmp_path / "papers")
    figures = table.drop(columns="options")
    assert figures.iloc[0].tolist() == figures.iloc[2].tolist() != figures.iloc[1].tolist()
    assert figures.iloc[1].tolist() == of_the_paper.drop(columns="options").iloc[0].tolist()
