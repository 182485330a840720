# SPDX-License-Identifier: Apache-2.0
"""Models ranked by synthetic defects in held-out images."""

import logging
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.data.utils import ValSplitMode
from anomalib.models import Padim
from lightning.pytorch import seed_everything
from torchvision.utils import save_image

from anomalib_intra import InTra, TextureDemo
from anomalib_intra.experiments.synthetic_defects import synthetic_defects
from anomalib_intra.experiments.synthetic_defects.command import _figures
from anomalib_intra.experiments.synthetic_defects.defects import KINDS, add_defect

from ..conftest import Run, tiny_engine


def part() -> torch.Tensor:
    """A bright disc with stripes on a dark ground, 96 x 128."""
    down, right = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    disc = ((down - 48) ** 2 + (right - 64) ** 2 < 40**2).float()
    return (0.1 + disc * (0.5 + 0.3 * torch.sin(right / 3))).expand(3, -1, -1).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_where_its_mask_is_and_can_be_seen_and_repeated(kind: str) -> None:
    image = part()
    shares = set()
    for seed in range(10):
        seed_everything(seed, verbose=False)
        changed, mask = add_defect(image, kind)
        seed_everything(seed, verbose=False)
        again, _ = add_defect(image, kind)
        assert torch.equal(changed, again)
        assert changed.shape == image.shape
        assert torch.equal(changed, changed.clamp(0, 1))
        difference = (changed - image).abs().amax(dim=0)
        assert torch.equal(difference > 0.03, mask)
        assert 2e-4 < mask.float().mean() < 0.5
        shares.add(float(mask.float().mean()))
    assert len(shares) > 5  # of many sizes
    assert torch.equal(image, part())


@pytest.mark.parametrize("kind", ["bent", "missing"])
def test_what_cannot_be_seen_is_no_defect(kind: str) -> None:
    with pytest.raises(ValueError, match=f"A defect of the kind {kind} cannot be seen in this image: it is too plain"):
        add_defect(torch.full((3, 64, 64), 0.5), kind)


def test_figures_are_means_of_those_of_each_kind(tmp_path: Path) -> None:
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1
    batches = []
    for kind in ("normal", *KINDS, "earlier"):
        if kind in KINDS:
            save_image(mask, tmp_path / f"{kind}.png")
        # Maps of a quarter of the size find all defects but scratches, which they take for the other way round.
        found = -1.0 if kind == "scratch" else float(kind in KINDS)
        batches.append(
            ImageBatch(
                image=torch.zeros(1, 3, 8, 8),
                anomaly_map=found * mask[None, None, ::2, ::2],
                pred_score=torch.tensor([found]),
                image_path=[f"images/{kind}.png"],
            )
        )
    kinds = {f"{kind}.png": kind for kind in ("normal", *KINDS)}
    figures = _figures(kinds, tmp_path, batches)
    assert figures["image_scratch"] == 0
    assert figures["pixel_scratch"] == 0
    assert {figures[f"{what}_{kind}"] for what in ("image", "pixel") for kind in KINDS if kind != "scratch"} == {1}
    assert figures["image_AUROC"] == figures["pixel_AUROC"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(("normal", "defect"), [(50.0, 51.0), (1e-7, 1.1e-7)])
def test_scores_of_any_magnitude_are_told_apart(normal: float, defect: float, tmp_path: Path) -> None:
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1
    save_image(mask, tmp_path / "stain.png")
    batches = [
        ImageBatch(
            image=torch.zeros(1, 3, 8, 8),
            anomaly_map=normal + (score - normal) * mask[None, None],
            pred_score=torch.tensor([score]),
            image_path=[f"images/{kind}.png"],
        )
        for kind, score in (("normal", normal), ("stain", defect))
    ]
    figures = _figures({"normal.png": "normal", "stain.png": "stain"}, tmp_path, batches)
    assert set(figures.values()) == {1}


def test_a_post_processor_that_clamps_ties_no_scores(few: TextureDemo, tmp_path: Path) -> None:
    padim = Padim(layers=["layer1"], n_features=8, pre_trained=False, visualizer=False)
    engine = tiny_engine(tmp_path)
    engine.fit(padim, datamodule=few)
    for name, value in padim.post_processor.named_buffers():  # as of scores far smaller: all of ours are clamped to 1
        value.fill_(1e-6 if name.endswith("max") else 0)
    engine.trainer.save_checkpoint(tmp_path / "padim.ckpt")
    table = synthetic_defects(Padim, [tmp_path / "padim.ckpt"], few, output=tmp_path / "out")
    assert table["image_AUROC"][0] != 0.5
    assert table["pixel_AUROC"][0] > 0.6


def test_images_of_several_sizes_and_plain_ones_are_no_hindrance(
    trained_intra: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "parts/good"
    folder.mkdir(parents=True)
    for number, side in enumerate((64, 80, 96, 64, 80, 96, 64, 80)):
        image = torch.full((3, side, side), 0.5) if number % 2 else torch.rand(3, side, side)
        save_image(image, folder / f"{number}.png")
    data = Folder("parts", "good", root=tmp_path / "parts", val_split_mode="from_train", val_split_ratio=0.5, seed=1)
    with caplog.at_level(logging.WARNING):
        table = synthetic_defects(InTra, [Path(trained_intra.checkpoint)], data, output=tmp_path / "out")
    assert table.notna().all(axis=None)
    assert re.search(r"good/[1357].png is left out of the kind: A defect of the kind bent cannot be seen", caplog.text)


@pytest.mark.parametrize("trained", ["trained_intra", "trained_one_pass", "trained_riad", "trained_patch_svdd"])
def test_a_trained_model_is_ranked_above_one_that_is_not(
    trained: str, few_root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(trained)
    checkpoint = torch.load(run.checkpoint, weights_only=False)
    for name, weight in checkpoint["state_dict"].items():
        if name.startswith("model.") and weight.is_floating_point():
            checkpoint["state_dict"][name] = torch.zeros_like(weight)
    torch.save(checkpoint, tmp_path / "blank.ckpt")
    both = [tmp_path / "blank.ckpt", run.checkpoint]
    data = TextureDemo(few_root, num_workers=0)
    table = synthetic_defects(type(run.model), both, data, output=tmp_path / "out")
    assert table["checkpoint"].tolist() == [str(run.checkpoint), str(tmp_path / "blank.ckpt")]
    assert table["pixel_AUROC"][0] > table["pixel_AUROC"][1] + 0.1
    assert (table.drop(columns="checkpoint") <= 1).all(axis=None)
    written = pd.read_csv(tmp_path / "out/synthetic-defects.csv")
    assert sorted(written["checkpoint"]) == sorted(table["checkpoint"])
    assert len(list((tmp_path / "out/images").glob("*.png"))) == len(data.val_data) * (1 + len(KINDS))


def test_nothing_is_chosen_by_test_images(demo_root: Path, tmp_path: Path) -> None:
    data = MVTecAD(demo_root, "weave", val_split_mode=ValSplitMode.SAME_AS_TEST, num_workers=0)
    with pytest.raises(ValueError, match=r"validation images of MVTecAD are test images.*val_split_mode=from_train"):
        synthetic_defects(InTra, [], data, output=tmp_path)


@pytest.mark.parametrize("mode", [ValSplitMode.FROM_TRAIN, ValSplitMode.SYNTHETIC])
def test_images_that_another_draw_would_hold_out_are_refused(
    mode: ValSplitMode, demo_root: Path, tmp_path: Path
) -> None:
    folders = {"name": "parts", "root": demo_root / "weave", "normal_dir": "train/good", "abnormal_dir": "test/hole"}
    data = Folder(**folders, val_split_mode=mode, num_workers=0)
    with pytest.raises(ValueError, match=r"Folder would hold out other images than in the training.*--data.seed 0"):
        synthetic_defects(InTra, [], data, output=tmp_path)
