# SPDX-License-Identifier: Apache-2.0
"""The rate of torch's matrix products at a model's own shapes: what anything else on the machine is measured by."""

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn.functional import linear

from anomalib_intra.lightning_model import InTra
from anomalib_intra.machine import wait_for

#: Seconds for which each product is repeated to find the fastest.
_SECONDS_OF_A_PRODUCT = 0.5
#: Windows that the products are those of, beside those of a training step: on a CPU, reconstruction takes 32 at a time
#: for each thread.
_WINDOWS = (32, 64)
#: Products are repeated for so many seconds before the clock is asked, since a device is waited for then.
_SECONDS_BETWEEN_LOOKS = 0.01


class Ceiling:
    """The fastest of the matrix products of a model's linear layers, by the rate it sustains.

    Args:
        intra (InTra): Model on a device.
        dtype (torch.dtype): Precision of the products.

    Example:
        >>> from anomalib_intra import InTra
        >>> ceiling = Ceiling(InTra(embed_dim=32, depth=1, num_heads=2, visualizer=False), torch.float32)
        >>> ceiling.rate(seconds=0.1) > 1e9
        True
    """

    def __init__(self, intra: InTra, dtype: torch.dtype) -> None:
        layers = {tuple(weight.shape) for block in intra.model.blocks for weight in block.parameters()}
        shapes = [shape for shape in layers if len(shape) == 2]
        self._device = intra.device
        best = 0.0
        for (outputs, inputs), windows in product(shapes, sorted({*_WINDOWS, intra.window_batch_size})):
            tokens = windows * intra.window_size**2
            x, weight = (torch.rand(rows, inputs, device=intra.device, dtype=dtype) for rows in (tokens, outputs))
            work, operations = partial(linear, x, weight), 2 * tokens * inputs * outputs
            rate = operations * self._per_second(work, _SECONDS_OF_A_PRODUCT)
            if rate > best:
                best, self._work, self._operations = rate, work, operations

    def rate(self, seconds: float) -> float:
        """Measure how fast it is now.

        Args:
            seconds (float): For how long it is measured.

        Returns:
            float: Floating-point operations a second.
        """
        return self._operations * self._per_second(self._work, seconds)

    def _per_second(self, work: Callable[[], Any], seconds: float) -> float:
        def timed(times: int) -> float:
            wait_for(self._device)
            started = time.perf_counter()
            for _ in range(times):
                work()
            wait_for(self._device)
            return time.perf_counter() - started

        with torch.no_grad():
            timed(1)  # not counted: the first call sets up what the others use
            times = max(1, int(_SECONDS_BETWEEN_LOOKS / timed(1)))
            done, passed = 0, 0.0
            while passed < seconds:
                passed += timed(times)
                done += times
        return done / passed
