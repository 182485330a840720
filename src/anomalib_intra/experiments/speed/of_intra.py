# SPDX-License-Identifier: Apache-2.0
"""The work of InTra: windows."""

from functools import cached_property, partial
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anomalib_intra.experiments.speed.ceiling import Product
from anomalib_intra.experiments.speed.workload import Task, Workload
from anomalib_intra.intra.lightning_model import InTra
from anomalib_intra.intra.torch_model import InpaintingTransformer

#: Windows that the plain loop inpaints, one after the other.
_WINDOWS_OF_THE_LOOP = 24
#: Windows that the products are those of, beside those of a training step: as many as reconstruction takes at a time.
_WINDOWS_AT_A_TIME = 64


class InTraWorkload(Workload):
    """The work of InTra, all of it windows; plainly, they are inpainted one by one.

    Args:
        module (InTra): The model, on a device.
    """

    unit = "windows"
    ratio = "times_the_loop"

    def __init__(self, module: InTra) -> None:
        self.module = module

    @property
    def products(self) -> set[Product]:
        """Those of its blocks."""
        shapes = {weight.shape for block in self.module.model.blocks for weight in block.parameters()}
        layers = [shape for shape in shapes if len(shape) == 2]
        return {
            Product(windows * self.module.window_size**2, inputs, outputs)
            for (outputs, inputs), windows in product(layers, {_WINDOWS_AT_A_TIME, self.module.window_batch_size})
        }

    @cached_property
    def flops_of_a_sample(self) -> int:
        """Operations of a window."""
        return flops_of_a_window(self.module.model)

    @property
    def flops_of_an_image(self) -> int:
        """Operations of a window for each patch."""
        return self._windows_of_an_image * self.flops_of_a_sample

    @property
    def _windows_of_an_image(self) -> int:
        rows, columns = self.module.model.grid
        return rows * columns

    def reconstruct(self, images: torch.Tensor) -> Task:
        """Inpaint every patch of images ``(B, 3, H, W)``."""
        windows = len(images) * self._windows_of_an_image
        run = partial(self.module.model.reconstruct, images)
        return Task("reconstruct", windows, len(images) * self.flops_of_an_image, run)

    def plainly(self) -> Task:
        """Inpaint one window after the other."""
        flops = _WINDOWS_OF_THE_LOOP * self.flops_of_a_sample
        return Task("window by window", _WINDOWS_OF_THE_LOOP, flops, partial(_loop, self.module.model))


def flops_of_a_window(model: InpaintingTransformer) -> int:
    """Count the work of the plain formulas: every token of one window through every block.

    Args:
        model (InpaintingTransformer): The transformer.

    Returns:
        int: Floating-point operations.
    """
    patches = torch.rand(1, model.window_size**2, 3 * model.patch_size**2, device=model.inpaint_embedding.device)
    # (the counter does not know the CPU's own kernel of attention)
    plainly = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), plainly:
        y = model.patch_embedding(patches)
        for block in model.blocks:
            y = block(y)
        model.to_pixels(y.mean(dim=1))
    return counter.get_total_flops()


def _loop(model: InpaintingTransformer) -> None:
    side = model.window_size
    origin = torch.ones(1, dtype=torch.long, device=model.inpaint_embedding.device)
    hidden = origin + side // 2
    for _ in range(_WINDOWS_OF_THE_LOOP):
        patches = torch.rand(1, side, side, 3 * model.patch_size**2, device=origin.device)
        model.inpaint(patches, origin, origin, hidden, hidden)
