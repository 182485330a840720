# SPDX-License-Identifier: Apache-2.0
"""The density of normal features (sec. 2.3): one Gaussian with full covariance, and how far a feature is from it."""

from typing import NamedTuple

import torch
from torch import nn

# Of features that are all equal, for which no covariance could be inverted.
_SMALLEST_VARIANCE = 1e-12


class Moments(NamedTuple):
    """Sums over features, in float64, to which more can be added without keeping the features.

    Args:
        number (torch.Tensor): How many, a scalar.
        total (torch.Tensor): Their sum, shape ``(D,)``.
        products (torch.Tensor): Sum of their products, shape ``(D, D)``.
    """

    number: torch.Tensor
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """Sum up features.

        Args:
            features (torch.Tensor): Features of shape ``(N, D)``.

        Returns:
            Moments: On their device, or on the CPU where that has no float64.
        """
        features = (features.cpu() if features.device.type == "mps" else features).double()
        return cls(features.new_tensor(float(len(features))), features.sum(dim=0), features.T @ features)

    def plus(self, other: "Moments") -> "Moments":
        """Add the sums over other features.

        Args:
            other (Moments): Their sums.

        Returns:
            Moments: The sums over both.
        """
        return Moments(*(one + two for one, two in zip(self, other, strict=True)))


class Gaussian(nn.Module):
    """A Gaussian with full covariance, shrunk towards a multiple of the identity.

    The covariance of D features from fewer than D images cannot be inverted. It is shrunk by the share of Chen et al.
    (oracle approximating shrinkage, IEEE TSP 2010), which minimises the expected error for Gaussian features and
    depends on nothing but moments. (anomalib's ``MultiVariateGaussian`` adds 0.01 to every variance, whatever their
    size, and computes in float32.)

    Args:
        dim (int): Dimension D of a feature.

    Attributes:
        mean (torch.Tensor): Mean of the normal features, shape ``(D,)``; NaN until it is fitted.
        whitening (torch.Tensor): Inverse of the covariance's Cholesky factor, shape ``(D, D)``.

    Example:
        >>> gaussian = Gaussian(2)
        >>> gaussian.fit(Moments.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])))
        >>> gaussian(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).round(decimals=4)
        tensor([0., 1.])
    """

    mean: torch.Tensor
    whitening: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((dim,), torch.nan))
        self.register_buffer("whitening", torch.eye(dim))

    @property
    def is_fitted(self) -> bool:
        """Whether there are a mean and a covariance."""
        return not bool(self.mean.isnan().any())

    def forget(self) -> None:
        """Forget mean and covariance: they belong to weights that are about to change."""
        self.mean.fill_(torch.nan)

    def fit(self, moments: Moments) -> None:
        """Compute mean and covariance, in float64.

        Args:
            moments (Moments): Sums over normal features.
        """
        mean = moments.total / moments.number
        covariance = shrunk(moments.products / moments.number - torch.outer(mean, mean), moments.number)
        factor = torch.linalg.cholesky(covariance)
        self.mean.copy_(mean)
        self.whitening.copy_(torch.linalg.solve_triangular(factor, torch.eye(len(mean)).to(factor), upper=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give half the squared Mahalanobis distance: the negative log density, but for its constant.

        Args:
            features (torch.Tensor): Features of shape ``(N, D)``.

        Returns:
            torch.Tensor: Distances of at least 0, shape ``(N,)``.
        """
        return self._whiten(features).square().sum(dim=1) / 2

    def gradient(self, features: torch.Tensor) -> torch.Tensor:
        """Give the gradient of that distance.

        Args:
            features (torch.Tensor): Features of shape ``(N, D)``.

        Returns:
            torch.Tensor: Gradients of shape ``(N, D)``.
        """
        return self._whiten(features) @ self.whitening

    def _whiten(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) @ self.whitening.T


def shrunk(covariance: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Shrink a covariance towards the mean variance times the identity (Chen et al., eq. 23, without its 2 / D).

    Args:
        covariance (torch.Tensor): Covariance of D features, shape ``(D, D)``.
        count (torch.Tensor): How many samples it is from, a scalar.

    Returns:
        torch.Tensor: A positive definite covariance of the same trace, shape ``(D, D)``.

    Example:
        >>> shrunk(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor(9.0))
        tensor([[3.2000, 0.0000],
                [0.0000, 0.8000]])
    """
    dim = len(covariance)
    variance = covariance.trace() / dim
    mean_square = covariance.square().mean()
    excess = (count + 1) * (mean_square - variance**2 / dim)
    # Without excess it is a multiple of the identity already.
    share = torch.where(excess > 0, (mean_square + variance**2) / excess, 1.0).clamp(max=1)
    identity = torch.eye(dim).to(covariance)
    return (1 - share) * covariance + share * variance.clamp(min=_SMALLEST_VARIANCE) * identity
