"""Judging masks: our counts against torchmetrics' MulticlassJaccardIndex alone, on masks of the two published sizes.

Ours counts each picture for itself, as the search for the worst ones needs, and gives every share from one table; the
rival gives the mIoU. Both are asked for the same number, and have to agree on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import line, rivals
from diffrep import _torchvision_compat
from diffrep.data.dense import IGNORED
from diffrep.evaluation.segmentation import Areas, confusion
from diffrep.randomness import stream

PICTURES = 32
SIZES = {"faces": (19, 512, 512), "scenes": (150, 512, 683)}  # classes, height, width


def measure() -> list[dict[str, Any]]:
    """One row for each kind of pictures."""
    found = []
    for name, (num_classes, height, width) in SIZES.items():
        truth, guess = _masks(num_classes, height, width)
        ours, theirs = _ours(guess, truth, num_classes), _theirs(guess, truth, num_classes)
        assert abs(ours - theirs) < 1e-6, f"mIoU {ours} against {theirs}"
        mine, its = rivals(lambda: _ours(guess, truth, num_classes), lambda: _theirs(guess, truth, num_classes))  # noqa: B023
        unit = f"CPU s, {PICTURES} masks of {height}x{width}"
        found.append(line(f"mIoU of {name}, {num_classes} classes", "torchmetrics", mine, its, unit=unit))
    return found


def _masks(num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(B, H, W) uint8 true, a tenth of it ignored, and int64 predicted, of which about half is right."""
    rng = stream(0, "bench/miou")
    shape = (PICTURES, height, width)
    truth = torch.randint(num_classes, shape, generator=rng)
    guess = torch.where(torch.rand(shape, generator=rng) < 0.5, truth, torch.randint(num_classes, shape, generator=rng))
    return torch.where(torch.rand(shape, generator=rng) < 0.1, IGNORED, truth).to(torch.uint8), guess


def _ours(guess: Tensor, truth: Tensor, num_classes: int) -> float:
    total = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for found, real in zip(guess, truth, strict=True):
        total += confusion(found, real, num_classes)
    return float(Areas.of(total).iou.nanmean())


def _theirs(guess: Tensor, truth: Tensor, num_classes: int) -> float:
    _torchvision_compat.install()
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED, validate_args=False)
    for found, real in zip(guess, truth, strict=True):
        metric.update(found, real)
    return float(metric.compute())
