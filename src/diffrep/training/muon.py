"""Muon: filters go a step of equal length in all directions of their matrix; everything else goes by SGD.

Source: Jordan 2024 (Muon, airbench). torch.optim.Muon takes matrices alone and knows neither the rescaling of filters
nor a second kind of parameter, and a run has one optimiser; its step is the same, which a test holds.
Letters: O filters of I channels and h x w pixels, seen as a matrix of O rows and I h w columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: steep at 0, and what is near 1 stays near
ITERATIONS = 3
_TINY = 1e-7  # below a norm that is 0


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum on all; what has four dimensions is first rescaled to norm sqrt(O), then goes orthogonally.

    parts: groups of parameters as torch's optimisers take them, with ``lr`` and the ``weight_decay`` of SGD.
    momentum: of SGD; filter_momentum: of filters, which have no weight decay (their norm is set at each step).
    """

    def __init__(self, parts: Iterable[dict[str, Any]], momentum: float, filter_momentum: float) -> None:
        shared = {"momentum": momentum, "filter_momentum": filter_momentum}
        super().__init__(parts, {"lr": 0.0, "weight_decay": 0.0, **shared})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        is_filter = parameter.dim() == 4
        if is_filter:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp(min=_TINY))
        else:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        momentum = group["filter_momentum" if is_filter else "momentum"]
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        ahead = gradient.add(state["momentum_buffer"].mul_(momentum).add_(gradient), alpha=momentum)
        if is_filter:
            ahead = orthogonal(ahead.flatten(1)).reshape(parameter.shape)
        parameter.add_(ahead.to(parameter.dtype), alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz: (rows, columns) = U S V^T -> about U V^T, bfloat16.

    Each iteration applies a s + b s^3 + c s^5 to the singular values, which division by the Frobenius norm has brought
    below 1; three bring those above 0.02 to between 0.68 and 1.21.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    x = x.mT if len(matrix) > matrix.shape[1] else x  # the smaller Gram matrix
    x = x / x.norm().clamp(min=_TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if len(matrix) > matrix.shape[1] else x
