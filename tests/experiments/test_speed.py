# SPDX-License-Identifier: Apache-2.0
"""The speed command: what it counts, and that it runs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from anomalib_intra import InTra, cli
from anomalib_intra.benchmark.machine import forget_peak_memory, peak_memory_mib
from anomalib_intra.experiments.ceiling import Ceiling
from anomalib_intra.experiments.speed import _flops_of_a_window, speed
from anomalib_intra.intra.torch_model import InpaintingTransformer

TINY = {"patch_size": 8, "window_size": 3, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_batch_size": 8}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.ceiling._SECONDS_OF_A_TURN", 0.01)
    monkeypatch.setattr("anomalib_intra.experiments.speed._SECONDS_OF_THE_CEILING", 0.02)


def test_a_window_of_the_papers_model_costs_5_gflop() -> None:
    tokens, d, f = 49, 512, 256
    block = 2 * (d * 2 * d + 2 * d * f) + 2 * d * d + 2 * d * 4 * d  # q and k, v and output, MLP
    attention = tokens * (f + d)  # q k^T and the weighted values
    by_hand = 2 * tokens * (13 * (block + attention) + 768 * d) + 2 * d * 768
    by_hand += 2 * tokens * 13 * tokens * (d - f)  # queries and keys are padded to the dimension of the values
    assert _flops_of_a_window(InpaintingTransformer()) == pytest.approx(by_hand, rel=1e-4)


def test_work_that_is_saved_counts_as_done() -> None:
    whole, saved = (InpaintingTransformer(depth=2, readout=readout) for readout in ("mean", "token"))
    assert _flops_of_a_window(whole) == _flops_of_a_window(saved)


def processor(bf16: float) -> type[Ceiling]:
    """Give the ceiling of a processor whose products in bf16 are so many times as fast as those in float32."""

    class OfThisProcessor(Ceiling):
        def __init__(self, intra: InTra, dtype: torch.dtype) -> None:
            super().__init__(intra, torch.float32)
            self.as_fast = bf16 if dtype == torch.bfloat16 else 1.0

        def rate(self, seconds: float) -> float:
            return self.as_fast * super().rate(seconds)

    return OfThisProcessor


def test_bf16_is_left_out_where_it_is_emulated(monkeypatch, capsys) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.Ceiling", processor(bf16=0.1))
    table = speed(TINY, [32], [1], 1, "cpu")
    assert table["what"][table["precision"] == "bf16"].tolist() == ["matrix products"]
    assert (table["precision"] == "float32").sum() == 5
    assert "slower in bf16 than in float32" in capsys.readouterr().err


def test_the_ceiling_counts_the_operations_of_a_product_and_their_seconds(monkeypatch) -> None:
    asked = []

    now = 0.0

    def slow_product(x: torch.Tensor, weight: torch.Tensor) -> None:
        nonlocal now
        asked.append(2 * x.shape[0] * weight.numel())
        now += 0.01 if weight.shape == (128, 32) else 0.02

    monkeypatch.setattr("anomalib_intra.experiments.ceiling.linear", slow_product)
    monkeypatch.setattr("anomalib_intra.benchmark.machine.time", SimpleNamespace(perf_counter=lambda: now))
    ceiling = Ceiling(InTra(**TINY, visualizer=False), torch.float32)
    asked.clear()
    rate = ceiling.rate(0.1)
    # The MLP's first layer, and the largest number of windows: 64 windows of nine tokens.
    assert set(asked) == {2 * 64 * 9 * 128 * 32}
    assert rate == pytest.approx(asked[0] / 0.01)


def test_peak_memory_is_that_since_it_was_forgotten() -> None:
    cpu = torch.device("cpu")
    block = torch.ones(64 * 2**20)
    with_block = peak_memory_mib(cpu)
    del block
    forget_peak_memory(cpu)
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("only Linux forgets")
    assert with_block - peak_memory_mib(cpu) > 200


def test_whole_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.Ceiling", processor(bf16=2.0))
    config = tmp_path / "speed.yaml"
    config.write_text(json.dumps({"model": TINY, "image_sizes": [32, 48], "batch_sizes": [1, 2], "training_steps": 2}))
    arguments = ["speed", "--config", str(config), "--output", str(tmp_path / "out" / "speed.json")]
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", *arguments])
    cli.main()
    rows = pd.DataFrame(json.loads((tmp_path / "out" / "speed.json").read_text()))
    assert rows.groupby("what").size().to_dict() == {
        "matrix products": 2, "reconstruct": 8, "window by window": 2,
        "training step": 2, "training step, windows sampled before": 2,
    }  # fmt: skip
    measured = rows[rows["what"] != "matrix products"]
    assert (measured["share_of_ceiling"] > 0).all()
    share = measured["gflop_per_s"] / measured["ceiling_gflop_per_s"]
    assert share.to_numpy() == pytest.approx(measured["share_of_ceiling"].to_numpy())
    for _, of_a_precision in measured.groupby("precision"):
        share = of_a_precision.set_index("what")["share_of_ceiling"]
        ratio = share["reconstruct"] / share["window by window"]
        assert ratio.to_numpy() == pytest.approx(of_a_precision["times_the_loop"].dropna().to_numpy())
    reconstruct = rows[rows["what"] == "reconstruct"]
    windows = (reconstruct["image_size"] / 8) ** 2
    assert (1000 * windows / reconstruct["windows_per_s"]).to_numpy() == pytest.approx(
        reconstruct["ms_per_image"].to_numpy()
    )
    assert "Measured on" in capsys.readouterr().out
