# SPDX-License-Identifier: Apache-2.0
"""What is measured of a model, and how much work it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from anomalib_intra.experiments.speed.ceiling import Product


class Task(NamedTuple):
    """Work that is timed.

    Args:
        what (str): Its name.
        samples (int): How many windows or images it is.
        flops (int): Floating-point operations of its products.
        run (Callable): Does it.
    """

    what: str
    samples: int
    flops: int
    run: Callable[[], object]


class Workload(ABC):
    """The work of a model of one image size; a class for each kind of model.

    Work is that of the plain formulas: what an implementation saves counts as done.

    Attributes:
        module (ReconstructionModule): The model, on a device.
        unit (str): What is counted.
        ratio (str): Column for how many times as fast as done plainly a reconstruction is.
    """

    module: Any
    unit: ClassVar[str]
    ratio: ClassVar[str]

    @property
    @abstractmethod
    def products(self) -> set[Product]:
        """The matrix products of its linear layers."""

    @property
    @abstractmethod
    def flops_of_a_sample(self) -> int:
        """Operations forwards for what a training step has several of."""

    @property
    @abstractmethod
    def flops_of_an_image(self) -> int:
        """Operations of the reconstruction of an image."""

    @abstractmethod
    def reconstruct(self, images: torch.Tensor) -> Task:
        """Reconstruct images ``(B, 3, H, W)``."""

    @abstractmethod
    def plainly(self) -> Task:
        """The same in the plainest way, for comparison; less of it, where that takes long."""
