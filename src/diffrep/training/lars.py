"""LARS: SGD whose step in each weight matrix is as long, beside the matrix, as in every other.

Source: You et al. 2017, as MAE's linear probe uses it: what has fewer than two dimensions goes by plain momentum,
without decay. timm's `Lars` would rescale a bias too, or nothing where there is no decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TRUST = 0.001  # length of a step of rate 1, beside that of the weights


class Lars(torch.optim.Optimizer):
    """parts: groups of parameters as torch's optimisers take them; momentum: of the rescaled gradient."""

    def __init__(self, parts: Iterable[dict[str, Any]], momentum: float, weight_decay: float) -> None:
        super().__init__(parts, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if parameter.dim() > 1:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
            gradient = gradient * trust(parameter, gradient)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        parameter.add_(state["momentum_buffer"].mul_(group["momentum"]).add_(gradient), alpha=-group["lr"])


def trust(parameter: Tensor, gradient: Tensor) -> Tensor:
    """TRUST |w| / |g|; 1 where either is 0."""
    length, slope = parameter.norm(), gradient.norm()
    return torch.where((length > 0) & (slope > 0), TRUST * length / slope, torch.ones_like(length))
