# SPDX-License-Identifier: Apache-2.0
"""The training loss (sec. 3.1-3.2): relative positions of patches plus lambda times the spread of near ones."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from anomalib_intra.components.similarity import wide
from anomalib_intra.patch_svdd.pairs import LevelPairs, Pairs

# Keeps the gradient of the norm finite where two features are equal.
_EPSILON = 1e-12


class LossTerms(NamedTuple):
    """The loss and what it is made of: ``total = position + svdd_weight * svdd``.

    Args:
        total (torch.Tensor): The loss, a scalar in float32 or wider.
        position (torch.Tensor): Cross entropy of the position tasks, sum of both levels.
        svdd (torch.Tensor): Mean distance between the features of near patches, sum of both levels.
    """

    total: torch.Tensor
    position: torch.Tensor
    svdd: torch.Tensor


class PositionClassifier(nn.Sequential):
    """Tells from the difference of two features in which of the 8 directions the second patch lies.

    Args:
        feature_dim (int): Dimension D of a feature.
        hidden_dim (int): Width of the two hidden layers.
    """

    def __init__(self, feature_dim: int = 64, hidden_dim: int = 128) -> None:
        super().__init__(
            nn.Linear(feature_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden_dim, 8),
        )


class PatchSVDDLoss(nn.Module):
    """Position cross entropy plus lambda * SVDD' distance, summed over both levels.

    Holds the position classifiers, which are trained with the encoder and not needed afterwards.

    Args:
        svdd_weight (float): Weight lambda of the distance between the features of near patches.

    Example:
        >>> level = LevelPairs(*torch.rand(2, 4, 64), torch.tensor([0, 7, 3, 3]), *torch.rand(2, 4, 64))
        >>> terms = PatchSVDDLoss(svdd_weight=0.5)(Pairs(small=level, big=level))
        >>> torch.allclose(terms.total, terms.position + 0.5 * terms.svdd)
        True
    """

    def __init__(self, svdd_weight: float = 1e-3) -> None:
        super().__init__()
        self.svdd_weight = svdd_weight
        self.classifier_small = PositionClassifier()
        self.classifier_big = PositionClassifier()

    def forward(self, features: Pairs) -> LossTerms:
        """Compare the features of the patch pairs of a step.

        Args:
            features (Pairs): Features of the patches of both levels, ``(B, 64)`` each, and the labels ``(B,)``.

        Returns:
            LossTerms: The loss and its two terms.
        """
        small, big = features
        position = _position_loss(small, self.classifier_small) + _position_loss(big, self.classifier_big)
        svdd = _svdd_loss(small) + _svdd_loss(big)
        return LossTerms(position + self.svdd_weight * svdd, position, svdd)


def _position_loss(features: LevelPairs, classifier: nn.Module) -> torch.Tensor:
    difference = wide(features.first) - wide(features.second)
    return cross_entropy(wide(classifier(difference)), features.label)


def _svdd_loss(features: LevelPairs) -> torch.Tensor:
    difference = wide(features.near_first) - wide(features.near_second)
    return (difference.square().sum(dim=1) + _EPSILON).sqrt().mean()
