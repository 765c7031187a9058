"""Regions read off maps where torchvision's operators do not load: ours against torchvision's own Python fallback.

The fallback is taken as written, before torch.compile makes a kernel of it (a minute at the first call, and a C++
compiler). Memory is the most that tensors of a pass take at once, counted, not measured. Both have to agree.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import line, rivals
from diffrep import _torchvision_compat
from diffrep.counting import peak_bytes
from diffrep.randomness import stream

CASES = {  # regions, channels, side of the map, samples per cell and side (0: one per pixel)
    "box head": (64, 256, 64, 2),
    "adaptive": (8, 16, 24, 0),
}
CELLS, RIVAL = (7, 7), "torchvision's Python fallback"


def measure() -> list[dict[str, Any]]:
    """Time of a pass forward and backward, and its memory, for each case."""
    _torchvision_compat.install_detection()
    theirs = inspect.unwrap(importlib.import_module("torchvision.ops.roi_align")._roi_align)
    return [row for name, case in CASES.items() for row in _compared(name, case, theirs)]


def _compared(name: str, case: tuple[int, int, int, int], theirs: Callable[..., Tensor]) -> list[dict[str, Any]]:
    regions, channels, side, samples = case
    maps, boxes = _inputs(regions, channels, side)

    def ours() -> Tensor:
        return _torchvision_compat.roi_align(maps, boxes, CELLS, 1.0, samples, True)

    def built_in() -> Tensor:
        return theirs(maps, boxes, 1.0, *CELLS, samples, True)

    torch.testing.assert_close(ours(), built_in(), rtol=0, atol=1e-4)
    both = [lambda run=run: run().sum().backward() for run in (ours, built_in)]
    what, size = f"roi_align, {name}", f"{regions} regions x {channels} channels"
    seconds, bytes_ = rivals(*both), [peak_bytes(run) / 2**20 for run in both]
    return [
        line(what, RIVAL, *seconds, unit=f"CPU s, {size}, forward and backward"),
        line(f"{what}, memory", RIVAL, *bytes_, unit=f"MiB, {size}, forward and backward"),
    ]


def _inputs(regions: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    rng = stream(0, "bench/roi_align")
    maps = torch.randn(1, channels, side, side, generator=rng).requires_grad_()
    corners = torch.rand(regions, 2, 2, generator=rng) * (side - 8)
    low = corners.amin(1)
    return maps, torch.cat([torch.zeros(regions, 1), low, corners.amax(1) + 4], 1)
