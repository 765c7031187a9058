"""Multiply-adds of a computation, by torch's own counter, without computing anything (meta tensors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(run: Callable[[], Any]) -> int:
    """Multiply-adds of the matrix products and convolutions in ``run()``; a backward pass inside is counted too."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two operations


def on_meta(network: nn.Module, *inputs: Any, **named: Any) -> Callable[[], Any]:
    """A call of ``network`` on shapes alone: weights and inputs stand on the meta device, hooks still fire."""
    state = {n: t.to("meta") for n, t in [*network.named_parameters(), *network.named_buffers()]}
    meta = [i.to("meta") if isinstance(i, torch.Tensor) else i for i in inputs]
    kwargs = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    return lambda: torch.func.functional_call(network, state, tuple(meta), kwargs)
