# SPDX-License-Identifier: Apache-2.0
"""How the paper chooses the image size from validation losses (sec. 4.1)."""

from collections.abc import Mapping
from itertools import pairwise

from pandas import Series

#: Epochs on either side of an epoch over which its validation loss is averaged.
REACH = 5
#: By how much the next larger size must lower the validation loss to be worth its price.
SIGNIFICANT = 1e-4


def averaged(losses: Series) -> Series:
    """Average a validation loss over each epoch and the five before and after it.

    At both ends of the training the window is cut off, so the first and the last epoch are means of six losses, and
    no mean is of fewer. The last epochs, which are usually the best, take part in this way.

    Args:
        losses (Series): Validation loss of every epoch in order, at least 11 of them.

    Returns:
        Series: The centred moving mean of every epoch.

    Raises:
        ValueError: If there are fewer epochs than one whole window has.

    Example:
        >>> averaged(Series([float(loss) for loss in range(20)])).iloc[[0, 1, 10, 19]].tolist()
        [2.5, 3.0, 10.0, 16.5]
    """
    window = 2 * REACH + 1
    if len(losses) < window:
        msg = (
            f"The validation loss is averaged over {window} epochs (+-{REACH}), but there are {len(losses)}: train for "
            f"{window} epochs or more; the paper takes 200."
        )
        raise ValueError(msg)
    return losses.rolling(window, center=True, min_periods=REACH + 1).mean()


def choose(best: Mapping[int, float]) -> int:
    """Choose the smallest size that the next larger one does not beat by 1e-4 or more.

    The sizes are gone through from the smallest one on. At each, only the next larger size is looked at: where that
    lowers the best loss by less than 1e-4, or raises it, the size is chosen and no larger one is looked at any more,
    not even if it were better again. Where it lowers the loss by 1e-4 or more, the search goes on from there; the
    largest size is chosen if every step was worth it. For 256, 320 and 512 with losses a, b and c:

    - 256, if a - b < 1e-4;
    - 320, if a - b >= 1e-4 and b - c < 1e-4;
    - 512, if a - b >= 1e-4 and b - c >= 1e-4.

    Args:
        best (Mapping[int, float]): Best averaged validation loss of every size in pixels, at least one.

    Returns:
        int: The size.

    Example:
        >>> choose({256: 0.0120, 320: 0.0110, 512: 0.01095})
        320
    """
    sizes = sorted(best)
    for size, larger in pairwise(sizes):
        if best[size] - best[larger] < SIGNIFICANT:
            return size
    return sizes[-1]
