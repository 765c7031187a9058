"""Scores of masks: intersections and unions of whole sets in exact counts, then shares of them.

Source: mmseg 0.30's `eval_metrics` (`pre_eval_to_metrics`); the score of the ADE20k challenge is its organisers'.
A class that neither prediction nor truth has is NaN and left out of means.
Letters: K classes; H and W pixels of a mask.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from diffrep.data.dense import IGNORED, DenseSet
from diffrep.data.segment_views import SegmentViews, fitted
from diffrep.evaluation import panels
from diffrep.models.segmenter import View, predict

BACKGROUND = "background"  # the class whose name says that it is no part


def confusion(found: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """How often each class was taken for each, (K + 1, K + 1) int64: row = truth, column = prediction.

    The last row and column are of values that are no class: readers let none into a truth, and a prediction there
    counts as wrong, as officially.

    Args:
        found: predicted classes, of any shape.
        truth: of the same shape, values of uint8; what is ``IGNORED`` counts nowhere.
    """
    side = num_classes + 1
    column, row = found.flatten().clamp(max=num_classes), truth.flatten()
    # One row for each value a mask can have: what is no class is sorted out in the table, not pixel by pixel.
    pairs = torch.add(column.to(torch.int32), row.to(torch.int32), alpha=side)
    counts = torch.bincount(pairs, minlength=256 * side).view(256, side)
    return torch.cat([counts[:num_classes], counts[num_classes:IGNORED].sum(0, keepdim=True)])


@dataclass(frozen=True)
class Areas:
    """Pixels per class, (K,) float64 each, on the CPU."""

    intersection: Tensor
    found: Tensor
    truth: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> Areas:
        """From :func:`confusion`, summed over any number of masks."""
        exact = counts.cpu().to(torch.float64)
        return cls(exact.diagonal()[:-1], exact.sum(0)[:-1], exact.sum(1)[:-1])

    @property
    def union(self) -> Tensor:
        return self.found + self.truth - self.intersection

    @property
    def iou(self) -> Tensor:
        return self.intersection / self.union

    @property
    def accuracy(self) -> Tensor:
        """Of each class: the share of its pixels that were found; also its recall."""
        return self.intersection / self.truth

    @property
    def precision(self) -> Tensor:
        return self.intersection / self.found

    @property
    def dice(self) -> Tensor:
        """Twice the intersection over both areas: the F1 score of pixels."""
        return 2 * self.intersection / (self.found + self.truth)

    @property
    def pixel_accuracy(self) -> Tensor:
        """The share of all pixels with a truth that are right."""
        return self.intersection.sum() / self.truth.sum()


class Segments(Protocol):
    """What is scored: a network from images to logits on a backbone, and how its recipe looks at test images."""

    network: nn.Module
    backbone: Any
    config: Any


def segmentation_scores(
    method: Segments, images: DenseSet, device: torch.device, samples: Path | None = None, count: int = 0
) -> dict[str, Any]:
    """mIoU and its kin over a split, in percent; the ``count`` worst pictures are drawn into ``samples``.

    Every prediction is judged at the size of its mask.
    """
    look, num_classes = _Look(method, images, device), len(images.classes)
    total = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64, device=device)
    worst: list[tuple[float, int]] = []  # a heap of (minus the mean IoU of one picture, minus its position)
    for k in range(len(images)):
        counts = confusion(*look(k), num_classes)
        total += counts
        heapq.heappush(worst, (-_own_miou(counts), -k))
        if len(worst) > count:
            heapq.heappop(worst)
    if samples is not None and worst:
        panels.write_panels(samples, sorted((-s, -k) for s, k in worst), look.drawn, "mIoU %", images.image_name)
    return summary(Areas.of(total), images.classes)


def _own_miou(counts: Tensor) -> float:
    """Of one picture, in percent; one without any known pixel is not worth showing."""
    own = _percent(Areas.of(counts).iou.nanmean())
    return 100.0 if own is None else own


def summary(areas: Areas, classes: Sequence[str]) -> dict[str, Any]:
    """All scores by name, in percent to three digits; None where nothing could be judged.

    miou_parts: without a class named background. challenge_score: ADE20k's, the mean of pixel accuracy and mIoU.
    """
    iou, pixels = areas.iou, areas.pixel_accuracy
    parts = [k for k, name in enumerate(classes) if name != BACKGROUND]
    of_parts = {"miou_parts": _percent(iou[parts].nanmean())} if 0 < len(parts) < len(classes) else {}
    return {
        "miou": _percent(iou.nanmean()),
        **of_parts,
        "pixel_accuracy": _percent(pixels),
        "mean_accuracy": _percent(areas.accuracy.nanmean()),
        "mean_dice": _percent(areas.dice.nanmean()),
        "challenge_score": _percent((pixels + iou.nanmean()) / 2),
        "classes": {name: _percent(iou[k]) for k, name in enumerate(classes)},
    }


def _percent(share: Tensor) -> float | None:
    value = 100 * float(share)
    return None if math.isnan(value) else round(value, 3)


class _Look:
    """The network's answer to picture k, beside the truth."""

    def __init__(self, method: Segments, images: DenseSet, device: torch.device) -> None:
        self.network, self.images, self.device = method.network, images, device
        self.views: SegmentViews = method.config.views
        strides = set(method.backbone.strides)
        self.patch = strides.pop() if len(strides) == 1 else 1  # maps of one size are those of a plain ViT

    def __call__(self, k: int) -> tuple[Tensor, Tensor]:
        """(H, W) classes, found and true, on the device."""
        image, truth = self.images[k]
        views = views_of(self.views, image.shape[1], image.shape[2])
        found = predict(self.network, image.to(self.device), truth.shape, views, self.images.mirrored, self.patch)
        return found, truth.to(self.device)

    def drawn(self, k: int) -> Image.Image:
        found, truth = self(k)
        return panels.masks(self.images[k][0], truth.cpu(), found.cpu(), self.images.classes)


def views_of(views: SegmentViews, height: int, width: int) -> list[View]:
    """How a photograph of this size is shown. Where windows slide its short side is no shorter than one."""
    slides = (views.window, views.stride) if views.test == "slide" else None
    found = []
    for ratio in views.test_ratios:
        size = fitted(height, width, views.base, ratio)
        if slides and min(size) < views.window:
            size = fitted(height, width, (max(height, width) * views.window, views.window))
        found += [View(size, flip, slides) for flip in ((False, True) if views.test_flip else (False,))]
    return found
