# SPDX-License-Identifier: Apache-2.0
"""bf16 moves neither reconstructions nor figures, and large images keep within their memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything

from anomalib_intra import TextureDemo
from anomalib_intra.benchmark.machine import peak_memory_mib
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


_LARGE = """
import torch
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
