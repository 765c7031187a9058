"""A training step's attention in bfloat16 on a CPU: by its formula, as our loop takes it, against torch's fused one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import line, rivals
from diffrep.training import devices

SHAPE = (64, 4, 65, 32)  # of ADDP on CIFAR-10: images, heads, tokens, width of a head


def measure() -> list[dict[str, Any]]:
    """Forward and backward pass; both give the same to bfloat16's rounding (tests/training/test_attention.py)."""
    step: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    q, k, v = (torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def passed() -> None:
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    def ours() -> None:
        with devices.attention(step):
            passed()

    mine, theirs = rivals(ours, passed, repeats=10)
    unit = f"CPU s, {SHAPE[0]} x {SHAPE[1]} heads, {SHAPE[2]} tokens, bfloat16"
    return [line("attention of a training step", "torch's fused attention", mine, theirs, unit=unit)]
