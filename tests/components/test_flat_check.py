# SPDX-License-Identifier: Apache-2.0
"""A run that collapses to a flat reconstruction is called out."""

import logging
from pathlib import Path

import pytest
import torch

from anomalib_intra import TextureDemo
from anomalib_intra.components.flat_check import FlatCheck

from ..conftest import tiny_engine, tiny_intra


def test_errors_are_those_of_all_images_together() -> None:
    torch.manual_seed(0)
    images, reconstructions = torch.rand(2, 5, 3, 8, 6).double()
    check = FlatCheck()
    for part in (slice(0, 2), slice(2, 5)):
        check.update(images[part], reconstructions[part])
    error, flat = check.compute()
    mean_colour = images.mean(dim=(0, 2, 3), keepdim=True)
    assert error == pytest.approx(float(((images - reconstructions) ** 2).mean()))
    assert flat == pytest.approx(float(((images - mean_colour) ** 2).mean()))
    check.reset()
    assert check.compute() == (0.0, 0.0)


@pytest.mark.parametrize("learning_rate", [0.0, 3e-3])
def test_a_run_that_learned_nothing_says_so(demo: TextureDemo, tmp_path: Path, caplog, learning_rate: float) -> None:
    model = tiny_intra(learning_rate=learning_rate, windows_per_image=64)
    with caplog.at_level(logging.WARNING, logger="anomalib_intra"):
        tiny_engine(tmp_path, max_epochs=3).fit(model, datamodule=demo)
    called_out = any("learned next to nothing" in message for message in caplog.messages)
    error, flat = model._flat_check.compute()
    assert called_out == (learning_rate == 0.0), (error, flat)
