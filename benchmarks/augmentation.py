"""Crop and flip of a batch on the device against torchvision's per-sample pipeline."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.distillation_step import _augmented_one_by_one
from benchmarks.timing import line, rivals
from diffrep.data.transforms import augmentation


def measure() -> list[dict[str, Any]]:
    """512 images of 32 pixels, uint8 in, float32 out."""
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    ours = augmentation("crop_flip:4")

    def batched() -> None:
        ours.apply(pixels, torch.randint(0, ours.num_views, (512,))).float().div_(255)

    mine, theirs = rivals(batched, lambda: _augmented_one_by_one(pixels))
    return [line("augmentation, batched", "torchvision, per sample", mine, theirs, unit="CPU s, 512 images")]
