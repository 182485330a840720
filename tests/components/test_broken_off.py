# SPDX-License-Identifier: Apache-2.0
"""A test or a validation that was broken off leaves nothing behind, and what a test computed can be loaded over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder
from lightning.pytorch import Callback, Trainer

from anomalib_intra import InTra, TextureDemo

from ..conftest import (
    Run,
    tiny_cutpaste,
    tiny_engine,
    tiny_intra,
    tiny_one_pass,
    tiny_patch_svdd,
    tiny_riad,
)


class BreaksOff(Callback):
    """Fails in the second batch, before the epoch ends."""

    is_on = True

    def on_test_batch_start(self, trainer: Trainer, model: InTra, batch: object, batch_idx: int, *_: object) -> None:
        if self.is_on and batch_idx == 1:
            raise OSError("the cable was pulled")

    on_validation_batch_start = on_test_batch_start


def test_metrics_of_a_test_are_of_its_own_images(few: TextureDemo, trained_intra: Run, tmp_path: Path) -> None:
    few.eval_batch_size = 2
    breaks = BreaksOff()
    model = InTra.load_from_checkpoint(trained_intra.checkpoint, visualizer=False)
    engine = tiny_engine(tmp_path, callbacks=[breaks], logger=False)
    with pytest.raises(OSError, match="cable"):
        engine.test(model, datamodule=few)
    breaks.is_on = False
    (after,) = engine.test(model, datamodule=few)
    undisturbed = InTra.load_from_checkpoint(trained_intra.checkpoint, visualizer=False)
    assert after == tiny_engine(tmp_path / "other", logger=False).test(undisturbed, datamodule=few)[0]


def test_thresholds_of_a_validation_are_of_its_own_images(few_root: Path, trained_intra: Run, tmp_path: Path) -> None:
    """Those of the first one are of the test images, with anomalies; then come good ones alone."""
    whole = TextureDemo(few_root, num_workers=0)
    breaks = BreaksOff()
    model, undisturbed = (InTra.load_from_checkpoint(trained_intra.checkpoint, visualizer=False) for _ in range(2))
    engine = tiny_engine(tmp_path, callbacks=[breaks], logger=False)
    broken = Folder(
        "broken", "train/good", few_root / "weave", abnormal_dir="test/hole", normal_test_dir="test/good",
        val_split_mode="same_as_test", num_workers=0, eval_batch_size=9,
    )  # fmt: skip
    with pytest.raises(OSError, match="cable"):
        engine.validate(model, datamodule=broken)
    breaks.is_on = False
    engine.validate(model, datamodule=whole)
    tiny_engine(tmp_path / "other", logger=False).validate(undisturbed, datamodule=whole)
    for name in ("image_threshold", "pixel_threshold"):
        expected = getattr(undisturbed.post_processor, name)
        assert expected.isfinite()
        assert torch.equal(getattr(model.post_processor, name), expected)


@pytest.mark.parametrize("make", [tiny_intra, tiny_one_pass, tiny_patch_svdd, tiny_riad, tiny_cutpaste])
def test_a_model_that_a_test_has_calibrated_can_load_a_checkpoint(
    make: Callable, few: TextureDemo, tmp_path: Path
) -> None:
    """Lightning tests in inference mode, whose tensors nothing can be written into afterwards."""
    model = make(visualizer=False)
    engine = tiny_engine(tmp_path, max_epochs=1, limit_train_batches=1, logger=False)
    engine.test(model, datamodule=few)
    assert model.is_calibrated
    assert not [name for name, value in model.state_dict().items() if value.is_inference()]
    model.load_state_dict(model.state_dict())
