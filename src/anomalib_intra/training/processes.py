# SPDX-License-Identifier: Apache-2.0
"""What the processes of one run tell each other."""

import torch
from torch import distributed
from torchmetrics.utilities.distributed import gather_all_tensors


def gathered(values: torch.Tensor) -> torch.Tensor:
    """Put together what all processes have.

    Args:
        values (torch.Tensor): Values of this process, on its device; the first dimension may differ between processes.

    Returns:
        torch.Tensor: The values of all, in the order of the processes; those of this one where it is alone.

    Example:
        >>> gathered(torch.arange(3))
        tensor([0, 1, 2])
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values))
