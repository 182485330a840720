# SPDX-License-Identifier: Apache-2.0
"""What makes the model fast moves neither its reconstructions nor its figures, and keeps within its memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from anomalib_intra import TextureDemo
from anomalib_intra.benchmark.machine import peak_memory_mib
from anomalib_intra.experiments.compiler import why_not_compiled
from anomalib_intra.intra.torch_model import InpaintingTransformer

from ..conftest import tiny_engine, tiny_intra


def test_bf16_moves_reconstructions_by_rounding_only() -> None:
    torch.manual_seed(0)
    model = InpaintingTransformer((64, 96), window_size=3, embed_dim=64, depth=4, num_heads=4).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        exact = model.reconstruct(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.reconstruct(images)
    # bf16 has 8 bits of precision; errors of 4 blocks add up.
    assert (rounded.float() - exact).abs().max() < 0.02 * exact.abs().max()
    assert not torch.equal(rounded.float(), exact)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("torch_threads", [1, 3], indirect=True)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_bf16_casts_the_weights_once_for_all_batches_of_windows(mode) -> None:
    model = InpaintingTransformer((64, 96), window_size=3, embed_dim=64, depth=4, num_heads=4).eval()
    images = torch.rand(2, 3, 64, 96)
    first_of_the_mlp = list(model.blocks[0].mlp.fc1.weight.shape)
    with (
        mode(),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),  # as Lightning does
        torch.profiler.profile(
            record_shapes=True,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        ) as profiler,
    ):
        model.reconstruct(images, 6)  # in 8 or 24 batches
    events = [event for event in profiler.events() if event.name == "aten::_to_copy"]
    assert sum(event.input_shapes[0] == first_of_the_mlp for event in events) == 4  # one in each block


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_bf16_sees_weights_that_have_changed(mode) -> None:
    model = InpaintingTransformer((64, 96), window_size=3, embed_dim=64, depth=4, num_heads=4).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        with mode():
            before = model.reconstruct(images)
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight.mul_(100)
        with mode():
            assert not torch.equal(model.reconstruct(images), before)


def test_bf16_moves_auroc_by_less_than_a_tenth_of_a_point(demo: TextureDemo, tmp_path: Path) -> None:
    seed_everything(0)
    model = tiny_intra(windows_per_image=60)
    tiny_engine(tmp_path, max_epochs=4).fit(model, datamodule=demo)
    figures = {}
    for precision in ("32-true", "bf16-mixed"):
        (figures[precision],) = tiny_engine(tmp_path, precision=precision).test(model, datamodule=demo)
    assert figures["32-true"]["image_AUROC"] > 0.7  # it has learned enough for the figure to be able to move
    for name in ("image_AUROC", "pixel_AUROC"):
        assert figures["bf16-mixed"][name] == pytest.approx(figures["32-true"][name], abs=1e-3), name


@pytest.mark.slow
def test_compiled_blocks_reconstruct_and_train_as_plain_ones_do(demo: TextureDemo, tmp_path: Path) -> None:
    assert why_not_compiled(torch.device("cpu")) is None
    models = {}
    for compiled in (False, True):
        seed_everything(0)
        models[compiled] = tiny_intra(compile_blocks=compiled, readout="token")
        engine = tiny_engine(tmp_path, max_epochs=1)
        engine.fit(models[compiled], datamodule=demo)
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        plain, fused = (models[compiled].model.reconstruct(images) for compiled in (False, True))
    assert models[True].model.blocks[1]._compiled_call_impl is not None
    assert (plain - fused).abs().max() < 1e-4  # 14 steps of Adam apart
    models[True].load_state_dict(models[False].state_dict())
    with torch.inference_mode():
        assert (plain - models[True].model.reconstruct(images)).abs().max() < 1e-5
    assert engine.export(models[True], "onnx", export_root=tmp_path).is_file()


def test_without_a_compiler_all_goes_on_with_a_warning(demo: TextureDemo, tmp_path: Path, monkeypatch, caplog) -> None:
    def no_compiler(_: object) -> object:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = tiny_intra(compile_blocks=True)
    with caplog.at_level("WARNING"):
        tiny_engine(tmp_path, max_epochs=1).fit(model, datamodule=demo)
    said = "torch.compile does not work here (RuntimeError: Failed to find C compiler.): going on without it."
    assert said in caplog.messages
    assert model.is_calibrated
    assert model.model.blocks[1]._compiled_call_impl is None


_LARGE = """
import torch
from anomalib_intra.experiments.compiler import why_not_compiled
from anomalib_intra.benchmark.machine import peak_memory_mib
from anomalib_intra.intra.torch_model import InpaintingTransformer
model = InpaintingTransformer((512, 512)).eval()
with torch.inference_mode():
    model.reconstruct(torch.rand(1, 3, 512, 512))
print(peak_memory_mib(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.skipif(peak_memory_mib(torch.device("cpu")) is None, reason="peak memory is not known here")
def test_the_papers_model_reconstructs_512_x_512_pixels_in_4_gib() -> None:
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True)
    print(f"\nPeak memory of the process: {float(done.stdout):.0f} MiB")
    assert float(done.stdout) < 4 * 2**10
