# SPDX-License-Identifier: Apache-2.0
"""anomalib's Engine with new models and checkpoints: what tests of commands and exports leave out."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer

from anomalib_intra import TextureDemo

from .conftest import Run, tiny_engine

KINDS = ["trained_intra", "trained_one_pass", "trained_patch_svdd", "trained_riad", "trained_cutpaste"]


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def test_a_new_model_predicts_and_is_exported_from_a_checkpoint(
    trained: Run, few: TextureDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)  # the inferencer leaves a cache folder behind
    arguments = {**trained.model.hparams, "visualizer": False}

    def scores(batches: list) -> torch.Tensor:
        return torch.cat([batch.pred_score for batch in batches])

    old = deepcopy(trained.model)
    old.visualizer = None
    expected = scores(tiny_engine(tmp_path / "old", logger=False).predict(old, datamodule=few))
    assert expected.std() > 0
    engine = tiny_engine(tmp_path / "new", logger=False)
    batches = engine.predict(type(old)(**arguments), datamodule=few, ckpt_path=trained.checkpoint)
    assert torch.equal(scores(batches), expected)

    path = engine.export(
        type(old)(**arguments), "openvino", export_root=tmp_path, datamodule=few, ckpt_path=trained.checkpoint
    )
    assert (tmp_path / "weights/openvino/model.xml") == path
    inferencer = OpenVINOInferencer(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    files = [Path(file) for batch in batches for file in batch.image_path]
    got = np.concatenate([inferencer.predict(file).pred_score.reshape(-1) for file in files[::8]])
    np.testing.assert_allclose(got, expected[::8], rtol=0, atol=1e-5)
