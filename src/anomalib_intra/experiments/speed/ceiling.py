# SPDX-License-Identifier: Apache-2.0
"""The rate of torch's matrix products at a model's own shapes: what anything else on the machine is measured by."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import product
from statistics import median
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from anomalib_intra.benchmark.machine import seconds_of

#: To find the fastest product, all are measured in turns, several times for so many seconds each.
_TURNS = 5
_SECONDS_OF_A_TURN = 0.1
#: Products are repeated for so many seconds before the clock is asked, since a device is waited for then.
_SECONDS_BETWEEN_LOOKS = 0.01


class Product(NamedTuple):
    """A linear layer and the number of tokens that go through it at once."""

    tokens: int
    inputs: int
    outputs: int


class Ceiling:
    """The fastest of the matrix products of a model's linear layers, by the rate it sustains.

    Args:
        products (Iterable[Product]): The matrix products.
        device (torch.device): The device.
        dtype (torch.dtype): Precision of the products.

    Example:
        >>> ceiling = Ceiling([Product(tokens=64, inputs=32, outputs=128)], torch.device("cpu"), torch.float32)
        >>> ceiling.rate(seconds=0.1) > 1e9
        True
    """

    def __init__(self, products: Iterable[Product], device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        rates: dict[Product, list[float]] = {candidate: [] for candidate in sorted(products)}
        for _, (candidate, measured) in product(range(_TURNS), rates.items()):
            measured.append(self._rate(candidate, _SECONDS_OF_A_TURN))
        self._fastest = max(rates, key=lambda candidate: median(rates[candidate]))

    def rate(self, seconds: float) -> float:
        """Measure how fast it is now.

        Args:
            seconds (float): For how long it is measured.

        Returns:
            float: Floating-point operations a second.
        """
        return self._rate(self._fastest, seconds)

    def _rate(self, size: Product, seconds: float) -> float:
        random = partial(torch.rand, device=self._device, dtype=self._dtype)
        compute = partial(linear, random(size.tokens, size.inputs), random(size.outputs, size.inputs))
        seconds_taken = partial(seconds_of, self._device, compute)
        with torch.no_grad():
            seconds_taken()  # not counted: the first call sets up what the others use
            times = max(1, int(_SECONDS_BETWEEN_LOOKS / seconds_taken()))
            done, passed = 0, 0.0
            while passed < seconds:
                passed += seconds_taken(times)
                done += times
        return 2 * math.prod(size) * done / passed
