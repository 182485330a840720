# SPDX-License-Identifier: Apache-2.0
"""Whether torch.compile works on a device, which needs a compiler there."""

import torch


def why_not_compiled(device: torch.device) -> str | None:
    """Try torch.compile on a function of one line.

    Args:
        device (torch.device): A device.

    Returns:
        str | None: Why it does not work there, in one line; None where it does.
    """
    try:
        torch.compile(_one_line)(torch.ones(8, device=device))
    except Exception as error:  # whatever torch, Triton or the system's compiler raise
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return None


def _one_line(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + 1
