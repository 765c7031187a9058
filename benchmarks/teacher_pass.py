"""A truncated teacher pass against the full one: multiply-adds exactly, CPU time at most that share + 5 points."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.timing import line, rivals
from diffrep.frozen.teachers import load_teacher

TAPS = ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")


def measure() -> list[dict[str, Any]]:
    """The published CIFAR-10 U-Net (untrained: cost does not depend on weights), batch 8."""
    teacher = load_teacher("random:ddpm-cifar10-32")
    images, timestep = torch.rand(8, 3, 32, 32), torch.full((8,), 100)
    full = teacher.multiply_adds()
    x = teacher.normalise(images)
    found = []
    for tap in TAPS:
        counted = teacher.multiply_adds(tap)
        ours, theirs = rivals(
            lambda tap=tap: teacher.features(images, timestep, [tap]), lambda: teacher.predict(x, timestep)
        )
        share = counted / full
        found.append(
            line(
                f"teacher pass up to {tap}",
                "the full U-Net pass",
                ours,
                theirs,
                unit="CPU s, batch 8",
                multiply_adds=counted,
                multiply_adds_full=full,
                multiply_adds_share=round(share, 4),
                cpu_share=round(ours / theirs, 4),
                holds=ours / theirs <= share + 0.05,
            )
        )
    return found
