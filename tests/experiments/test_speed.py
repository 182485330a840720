# SPDX-License-Identifier: Apache-2.0
"""The speed command: what it counts, and that it runs."""

import json
import sys
from contextlib import nullcontext
from functools import partial
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from anomalib_intra import InTra, OnePassInTra, OnePassTransformer, cli
from anomalib_intra.benchmark.machine import forget_peak_memory, peak_memory_mib
from anomalib_intra.experiments.speed import speed
from anomalib_intra.experiments.speed.ceiling import Ceiling, Product
from anomalib_intra.experiments.speed.command import workload_of
from anomalib_intra.experiments.speed.of_intra import flops_of_a_window
from anomalib_intra.experiments.speed.of_one_pass import flops_of_an_image, plain
from anomalib_intra.experiments.speed.training import time_training
from anomalib_intra.intra.torch_model import InpaintingTransformer
from anomalib_intra.one_pass.optimizer import Muon

TINY = {"patch_size": 8, "window_size": 3, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_batch_size": 8}
TINY_ONE_PASS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "images_per_step": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.ceiling._SECONDS_OF_A_TURN", 0.01)
    monkeypatch.setattr("anomalib_intra.experiments.speed.command._SECONDS_OF_THE_CEILING", 0.02)


def test_a_window_of_the_papers_model_costs_5_gflop() -> None:
    tokens, d, f = 49, 512, 256
    block = 2 * (d * 2 * d + 2 * d * f) + 2 * d * d + 2 * d * 4 * d  # q and k, v and output, MLP
    attention = tokens * (f + d)  # q k^T and the weighted values
    by_hand = 2 * tokens * (13 * (block + attention) + 768 * d) + 2 * d * 768
    by_hand += 2 * tokens * 13 * tokens * (d - f)  # queries and keys are padded to the dimension of the values
    assert flops_of_a_window(InpaintingTransformer()) == pytest.approx(by_hand, rel=1e-4)


def test_work_that_is_saved_counts_as_done() -> None:
    whole, saved = (InpaintingTransformer(depth=2, readout=readout) for readout in ("mean", "token"))
    assert flops_of_a_window(whole) == flops_of_a_window(saved)


def processor(bf16: float) -> type[Ceiling]:
    """Give the ceiling of a processor whose products in bf16 are so many times as fast as those in float32."""

    class OfThisProcessor(Ceiling):
        def __init__(self, products: set[Product], device: torch.device, dtype: torch.dtype) -> None:
            super().__init__(products, device, torch.float32)
            self.as_fast = bf16 if dtype == torch.bfloat16 else 1.0

        def rate(self, seconds: float) -> float:
            return self.as_fast * super().rate(seconds)

    return OfThisProcessor


def test_bf16_is_left_out_where_it_is_emulated(monkeypatch, capsys) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.command.Ceiling", processor(bf16=0.1))
    table = speed(partial(InTra, **TINY), [32], [1], 1, "cpu")
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

    monkeypatch.setattr("anomalib_intra.experiments.speed.ceiling.linear", slow_product)
    monkeypatch.setattr("anomalib_intra.benchmark.machine.time", SimpleNamespace(perf_counter=lambda: now))
    products = workload_of(InTra(**TINY, visualizer=False)).products
    ceiling = Ceiling(products, torch.device("cpu"), torch.float32)
    asked.clear()
    rate = ceiling.rate(0.1)
    # The MLP's first layer, and the largest number of windows: 64 windows of nine tokens.
    assert set(asked) == {2 * 64 * 9 * 128 * 32}
    assert rate == pytest.approx(asked[0] / 0.01)


def test_an_image_of_the_one_pass_model_costs_what_its_layers_and_its_attention_do() -> None:
    model = OnePassTransformer((64, 96), embed_dim=32, depth=2, num_heads=4)
    d, patch, blocks, tokens = 32, 192, 2 * 3, 8 * 12
    content = tokens * (patch * d + 8 * d * d + 2 * 2 * d * d) + blocks * 2 * 2 * d * d
    block = tokens * (2 * d * d + 8 * d * d + 2 * d * (9 * 16 + blocks))  # attention to nine blocks, and to all pooled
    texture = 16 * 9 * 9 * 32 + (4 + 1) * 9 * 32 * 32 + 32 * 32  # at 16, 4 and 1 places of a patch
    head = tokens * (texture + 3 * d * 256 + 256 * 64 + 9 * 64 * 64 + 9 * 64 * (1 + 64))
    each_radius = 2 * block + tokens * d * patch + head
    assert flops_of_an_image(model, (1,)) == 2 * (content + each_radius)
    assert flops_of_an_image(model, (0, 1, 2)) == 2 * (content + 3 * each_radius)


def test_a_pixel_of_a_larger_image_costs_little_more(monkeypatch) -> None:
    monkeypatch.setattr(
        "anomalib_intra.one_pass.torch_model.check_range", lambda _: None
    )  # nothing is there to look at
    of_a_pixel = {}
    for side in (256, 512, 1024):
        with torch.device("meta"):
            of_a_pixel[side] = flops_of_an_image(OnePassTransformer((side, side)), (0, 1, 2)) / side**2
    assert of_a_pixel[512] < 1.2 * of_a_pixel[256]
    assert of_a_pixel[1024] < 1.8 * of_a_pixel[256]


def test_plain_attention_is_the_same_attention() -> None:
    model = OnePassTransformer((64, 64), embed_dim=32, depth=2, num_heads=4)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(model)(images).painted, model(images).painted, rtol=1e-4, atol=1e-5)
    assert not any(block.attention.plainly for block in model.blocks)


def test_the_work_of_the_one_pass_model_is_images() -> None:
    work = workload_of(OnePassInTra((64, 64), **TINY_ONE_PASS))
    images = torch.rand(2, 3, 64, 64)
    task = work.reconstruct(images)
    assert (task.samples, task.flops) == (2, 2 * work.flops_of_an_image)
    assert task.run().painted.shape == (2, 3, 3, 64, 64)
    assert {product.tokens for product in work.products} == {2 * 64, 3 * 64}
    assert (32, 128) in {product[1:] for product in work.products}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (InTra((64, 64), **TINY, visualizer=False), torch.optim.Adam),
        (OnePassInTra((64, 64), **TINY_ONE_PASS), Muon),
    ],
)
def test_a_training_step_is_the_models_own(model: InTra | OnePassInTra, kind: type, monkeypatch) -> None:
    sizes, kinds = [], set()
    loss_of, step = model.loss_of, kind.step
    monkeypatch.setattr(model, "loss_of", lambda batch: (sizes.append(len(batch)), loss_of(batch))[1])
    monkeypatch.setattr(kind, "step", lambda self: (kinds.add(type(self)), step(self))[1])
    before = [weight.detach().clone() for weight in model.parameters()]
    assert time_training(model, 2, torch.device("cpu"), nullcontext) > 0
    assert sizes == [model.sampling.per_step] * 3
    assert kinds == {kind}
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="only Linux forgets")
def test_peak_memory_is_that_since_it_was_forgotten() -> None:
    cpu = torch.device("cpu")
    forget_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    with mmap(-1, 256 * 2**20) as block:  # a tensor may be kept for the next one, and memory not fall
        block[::PAGESIZE] = bytes(len(block) // PAGESIZE)
    with_block = peak_memory_mib(cpu)
    assert with_block - before > 200
    forget_peak_memory(cpu)
    assert with_block - peak_memory_mib(cpu) > 200


def test_whole_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.command.Ceiling", processor(bf16=2.0))
    config = tmp_path / "speed.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"class_path": "InTra", "init_args": TINY},
                "image_sizes": [32, 48],
                "batch_sizes": [1, 2],
                "training_steps": 2,
            }
        )
    )
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


def test_the_command_knows_the_one_pass_model_by_its_own_defaults(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("anomalib_intra.experiments.speed.command.Ceiling", processor(bf16=2.0))
    tiny = [word for name, value in TINY_ONE_PASS.items() for word in (f"--model.{name}", str(value))]
    sizes = ["--image_sizes", "[64]", "--batch_sizes", "[1,2]", "--training_steps", "1"]
    words = [
        "anomalib-intra",
        "speed",
        "--model",
        "OnePassInTra",
        *tiny,
        *sizes,
        "--output",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    rows = pd.DataFrame(json.loads((tmp_path / "out.json").read_text()))
    assert rows.groupby("what").size().to_dict() == {
        "matrix products": 2, "plain attention": 2, "reconstruct": 4,
        "training step": 2, "training step, images sampled before": 2,
    }  # fmt: skip
    measured = rows[rows["what"] != "matrix products"]
    assert (measured[["share_of_ceiling", "images_per_s"]] > 0).all(axis=None)
    images = rows[rows["what"] == "reconstruct"]
    assert (1000 / images["images_per_s"]).to_numpy() == pytest.approx(images["ms_per_image"].to_numpy())
    flops = workload_of(OnePassInTra((64, 64), **TINY_ONE_PASS)).flops_of_an_image  # patches of 8, not InTra's of 16
    assert (images["gflop_per_s"] * 1e9 / images["images_per_s"]).to_numpy() == pytest.approx(flops)
    assert images["times_plain"].notna().all()


def test_other_models_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["anomalib-intra", "speed", "--model", "anomalib_intra.PatchSVDD"])
    with pytest.raises(SystemExit) as refusal:
        cli.main()
    assert refusal.value.code == 2
    assert "InTra and OnePassInTra can be measured, not that of PatchSVDD" in capsys.readouterr().err
