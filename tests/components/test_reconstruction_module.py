# SPDX-License-Identifier: Apache-2.0
"""A run that collapses to a flat reconstruction is called out."""

import logging
from pathlib import Path

import pytest

from anomalib_intra import TextureDemo

from ..conftest import tiny_engine, tiny_intra


@pytest.mark.parametrize("learning_rate", [0.0, 3e-3])
def test_a_run_that_learned_nothing_says_so(demo: TextureDemo, tmp_path: Path, caplog, learning_rate: float) -> None:
    model = tiny_intra(learning_rate=learning_rate, windows_per_image=64)
    with caplog.at_level(logging.WARNING, logger="anomalib_intra"):
        tiny_engine(tmp_path, max_epochs=3).fit(model, datamodule=demo)
    called_out = any("learned next to nothing" in message for message in caplog.messages)
    assert called_out == (learning_rate == 0.0), model._explained.compute()
