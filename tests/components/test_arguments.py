# SPDX-License-Identifier: Apache-2.0
"""Arguments that mean nothing are refused; those that mean the same are the same."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision.utils import save_image

from anomalib_intra import RIAD, CutPaste, InTra, MVTec, OnePassInTra, PatchSVDD, TextureDemo
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.one_pass.torch_model import OnePassTransformer

from ..conftest import TINY, tiny_engine, tiny_intra, tiny_one_pass

COUNTS = ["patch_size", "window_size", "embed_dim", "depth", "num_heads", "feature_dim"]


@pytest.mark.parametrize("name", [*COUNTS, "windows_per_image", "window_batch_size"])
@pytest.mark.parametrize("wrong", [0, -3])
def test_intra_refuses_sizes_below_one(name: str, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 1, got {wrong}"):
        tiny_intra(**{name: wrong})


@pytest.mark.parametrize("name", ["learning_rate", "alpha", "beta", "patience"])
@pytest.mark.parametrize("wrong", [-1, float("nan")])
def test_intra_refuses_weights_below_zero(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a number of at least 0"):
        tiny_intra(**{name: wrong})


@pytest.mark.parametrize("name", ["pairs_per_image", "pair_batch_size", "learning_rate", "svdd_weight"])
def test_patch_svdd_refuses_the_like(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be"):
        PatchSVDD((128, 128), **{name: -1})


@pytest.mark.parametrize("name", ["patch_size", "embed_dim", "depth", "num_heads", "block_size"])
def test_the_one_pass_model_refuses_the_like(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a whole number"):
        OnePassTransformer((64, 96), **{"embed_dim": 32, "depth": 2, "num_heads": 4, name: 0})


@pytest.mark.parametrize("kind", [InTra, OnePassInTra, PatchSVDD, RIAD, CutPaste])
@pytest.mark.parametrize("wrong", [256, "256", (256,), (256, 256, 3), ("256", "256"), None])
def test_what_is_no_size_of_images_is_refused(kind: type, wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^image_size must be height and width in pixels, such as \(256, 256\), got "):
        kind(image_size=wrong)


@pytest.mark.parametrize("wrong", [1, "012", (), (0, 0), (0.5,), None])
def test_what_are_no_radii_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"^radii must be different numbers in -1 .. 4"):
        tiny_one_pass(radii=wrong)
    assert tiny_one_pass(radii=[0, 1]).model.radii == (0, 1)


def with_bank() -> PatchSVDD:
    model = PatchSVDD((128, 128))
    model.model.bank_small = model.model.bank_big = torch.zeros(1, 64)
    return model


def test_empty_batches_are_refused() -> None:
    for model, size in (
        (InpaintingTransformer((64, 64), window_size=3, embed_dim=32, depth=1, num_heads=2), 64),
        (tiny_intra(), 64),
        (OnePassTransformer((64, 64), embed_dim=32, depth=1, num_heads=2), 64),
        (with_bank(), 128),
    ):
        with pytest.raises(ValueError, match=r"batch holds no images \(shape \(0, 3"):
            model(torch.empty(0, 3, size, size))


def test_a_share_that_is_not_heeded_is_refused(demo_root: Path) -> None:
    for kind in (MVTec, TextureDemo):
        with pytest.raises(ValueError, match=rf"{kind.__name__} holds out .*leave val_split_ratio=0.5 out"):
            kind(demo_root, val_split_ratio=0.5)
    datamodule = TextureDemo(demo_root, val_split_mode="from_test", val_split_ratio=0.25)
    datamodule.setup()
    assert len(datamodule.val_data) == 13


# ---- the same architecture -------------------------------------------------------------------------------------------


def saved(path: Path, **arguments: object) -> Path:
    model = tiny_intra(**arguments)
    trainer = Trainer(logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def load(path: Path, **arguments: object) -> InTra:
    """Load weights as Engine.test does: into a model that is there already."""
    model = tiny_intra(**arguments)
    checkpoint = torch.load(path, weights_only=True)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"feature_dim": None}, {"feature_dim": TINY["embed_dim"] // 2}),
        ({"attention": "msa", "feature_dim": 8}, {"attention": "msa"}),
        ({"image_size": [64, 64]}, {"image_size": (64, 64)}),
    ],
)
def test_equal_architectures_load_each_other(tmp_path: Path, one: dict, other: dict) -> None:
    for first, second in ((one, other), (other, one)):
        load(saved(tmp_path / "model.ckpt", **first), **second)


def test_a_checkpoint_of_before_keeps_what_an_even_number_of_blocks_meant(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.ckpt", depth=4)
    for how in (InTra.load_from_checkpoint, lambda path: load(path, depth=4)):
        assert not how(path).model.doubles_middle
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["doubles_middle"]
    torch.save(checkpoint, path)
    for how in (InTra.load_from_checkpoint, lambda path: load(path, depth=4)):
        model = how(path)
        assert model.model.doubles_middle
        again: dict = {"callbacks": {}}
        model.on_save_checkpoint(again)
        assert again["doubles_middle"]


def test_other_architectures_are_still_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"feature_dim=16 \(here 8\)"):
        load(path, feature_dim=8)
    # What an older version did not know was as the default is now.
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["hyper_parameters"]["readout"]
    torch.save(checkpoint, path)
    load(path)
    with pytest.raises(ValueError, match=r"readout='mean' \(here 'token'\)"):
        load(path, readout="token")


@pytest.mark.parametrize("file", ["text", "nothing", "half a checkpoint", "weights alone", "an exported model"])
def test_what_is_no_checkpoint_is_refused(file: str, tmp_path: Path) -> None:
    whole, path = saved(tmp_path / "model.ckpt"), tmp_path / "other.ckpt"
    save_image(torch.rand(3, 64, 64), tmp_path / "part.png")
    if file == "text":
        path.write_text("hello")
    elif file == "weights alone":
        torch.save(torch.load(whole, weights_only=True)["state_dict"], path)
    elif file == "an exported model":
        torch.save({"model": torch.nn.Linear(2, 2)}, path)
    else:
        content = whole.read_bytes()
        path.write_bytes(content[: len(content) // 2] if file == "half a checkpoint" else b"")
    for load_it in (
        InTra.load_from_checkpoint,
        lambda path: InTra.load_from_checkpoint(checkpoint_path=path),
        lambda path: tiny_engine(tmp_path).predict(tiny_intra(), data_path=tmp_path, ckpt_path=path),
    ):
        with pytest.raises(ValueError, match=r"other.ckpt is no checkpoint, or not a whole one, .*: take a .ckpt"):
            load_it(path)


def test_another_class_is_refused_as_such(tmp_path: Path) -> None:
    checkpoint = torch.load(saved(tmp_path / "model.ckpt"), weights_only=True)
    with pytest.raises(ValueError, match="of another model than OnePassInTra, one with the arguments window_size, "):
        tiny_one_pass().on_load_checkpoint(checkpoint)
    padim = {"hyper_parameters": {"backbone": "resnet18"}, "state_dict": {}}
    torch.save({**checkpoint, **padim}, tmp_path / "padim.ckpt")
    with pytest.raises(ValueError, match="of another model than OnePassInTra, one with the argument backbone: load"):
        OnePassInTra.load_from_checkpoint(tmp_path / "padim.ckpt")
    for kind in (OnePassInTra, PatchSVDD):  # which refuse this size of images before there is a model
        with pytest.raises(ValueError, match=f"of another model than {kind.__name__}, one with the arguments "):
            kind.load_from_checkpoint(tmp_path / "model.ckpt")
    # An argument that there is no more does not make another model.
    checkpoint["hyper_parameters"]["of_before"] = 1
    torch.save(checkpoint, tmp_path / "model.ckpt")
    load(tmp_path / "model.ckpt")


def test_a_loaded_model_is_what_its_checkpoint_says(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.ckpt")
    loaded = InTra.load_from_checkpoint(path, image_size=[64, 64], depth=TINY["depth"], visualizer=False)
    assert (loaded.image_size, loaded.visualizer) == ((64, 64), None)
    with pytest.raises(
        ValueError, match=r"another InTra, with image_size=\(64, 64\) \(here \(96, 96\)\), depth=3 \(here 4\)"
    ):
        InTra.load_from_checkpoint(path, depth=4, image_size=(96, 96))
