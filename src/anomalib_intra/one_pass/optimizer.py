# SPDX-License-Identifier: Apache-2.0
"""How the one-pass model learns: Muon for matrices between tokens, AdamW for all other weights, and the schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

#: a x + b x^3 + c x^5 brings a singular value nearer to 1; so many times.
_COEFFICIENTS, _TIMES = (3.4445, -4.7750, 2.0315), 5
#: By so much an orthogonal update is scaled that its entries are as large as those of AdamW's.
_SIZE_OF_ADAMW = 0.2
#: Share of a training in which the learning rate rises.
_WARMUP = 0.01


class Muon(Optimizer):
    """Changes a matrix as much in one direction as in another: by the momentum of its gradient, made orthogonal.

    With an image a step, few directions make up most of the gradient of a matrix. AdamW goes along these, Muon (Jordan
    et al., 2024) along all: the model learns in half of the time what it did by AdamW. What is no matrix between tokens
    (biases, norms, positions, and what reads or paints pixels) is AdamW's, in the same optimizer.

    The optimizers of this name in torch and timm always compute in bfloat16, which takes longer than all else in a step
    on a CPU without instructions for it. This one computes in ``dtype``.

    Args:
        groups (Iterable[dict]): Groups of parameters. ``matrices`` is True for those that are to change by Muon.
        lr (float): Learning rate, of the same size for both.
        momentum (float): Momentum of Muon.
        betas (tuple[float, float]): Decay of AdamW's means.
        weight_decay (float): Weight decay of both.
        dtype (torch.dtype): What Muon computes in; float32 or bfloat16.

    Example:
        >>> linear = torch.nn.Linear(8, 4)
        >>> optimizer = Muon([{"params": [linear.weight], "matrices": True}, {"params": [linear.bias]}], lr=1e-3)
        >>> linear(torch.rand(2, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "matrices": False}
        super().__init__(groups, defaults)
        self.dtype = dtype

    def __getstate__(self) -> dict[str, Any]:
        """Let copies compute as this one does."""
        return {**super().__getstate__(), "dtype": self.dtype}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the weights by their gradients.

        Args:
            closure (Callable | None): Computes the gradients first.

        Returns:
            Any: What the closure returns, the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            (self._by_muon if group["matrices"] else self._by_adamw)(weights, group)
        return loss

    def _by_muon(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            state = self.state[weight]
            gradient = torch.as_tensor(weight.grad)
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
            mean = state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
            ahead = torch.lerp(gradient, mean, group["momentum"])  # Nesterov's momentum
            update = orthogonal(ahead.to(self.dtype)).to(weight.dtype)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * _SIZE_OF_ADAMW * max(weight.shape) ** 0.5)

    def _by_adamw(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a matrix near 1, by Newton and Schulz's iteration.

    Args:
        matrix (torch.Tensor): Matrix of shape ``(m, n)``.

    Returns:
        torch.Tensor: Matrix of the same shape and the same singular vectors, with singular values of 0.7 to 1.2; those
        that were below a thousandth of the norm stay smaller.

    Example:
        >>> values = torch.linalg.svdvals(orthogonal(torch.diag(torch.tensor([5.0, 1.0, 0.2]))))
        >>> bool(((values > 0.6) & (values < 1.3)).all())
        True
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_TIMES):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def one_cycle(progress: float) -> float:
    """The learning rate of a training as a share of its peak: up in a straight line, then down as a cosine.

    Args:
        progress (float): Share of the training that is done, in [0, 1].

    Returns:
        float: Share of the peak, in (0, 1].

    Example:
        >>> [round(one_cycle(progress), 3) for progress in (0.005, 0.01, 0.505, 1.0)]
        [0.5, 1.0, 0.505, 0.01]
    """
    if progress < _WARMUP:
        return max(progress / _WARMUP, 0.01)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP))) / 2
