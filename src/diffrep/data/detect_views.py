"""How a picture with objects is brought before a detector, in training and in the test.

Training is detectron2's large-scale jitter: mirrored, resized by a random factor of the frame, cropped and padded to
it; boxes are taken anew from the masks that are left. Pictures go through torchvision.transforms.v2. Masks are read at
the pixels of the crop alone: enlarging ninety masks of a picture twice only to cut most of it away would take
hundreds of megabytes.
Deviation: masks take the nearest pixel, where detectron2 fills scaled polygons.
Letters: H W a picture, S the side of the frame, n objects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.data.coco import Objects, scoring_library, tight_boxes
from diffrep.data.dense import DenseSet
from diffrep.errors import UserError

Target = dict[str, Tensor]  # boxes (n, 4) float32, labels (n,) int64 0..K-1, masks (n, S, S) bool


class DetectViews(Config):
    """What is done to pictures and objects; the defaults are ViTDet's on COCO."""

    size: int = Field(1024, ge=1)  # pixels of the frame's side: of training crops, and of the padded test picture
    scale: tuple[float, float] = (0.1, 2.0)  # in training the picture fits a frame so many times as large, drawn evenly
    flip: float = Field(0.5, ge=0, le=1)  # share of training pictures that are mirrored
    pad: int = Field(128, ge=0, le=255)  # grey beside a small training picture; in the test it is the student's mean

    @model_validator(mode="after")
    def _fits(self) -> DetectViews:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale = {self.scale}: two factors above 0, the smaller one first")
        return self


def fitted(height: int, width: int, side: float) -> tuple[int, int]:
    """(h, w) of a picture whose long side becomes ``side``, its shape kept."""
    factor = side / max(height, width)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8 -> (3, h, w) uint8, bilinear, smoothed where it shrinks (as Pillow)."""
    _torchvision_compat.install()
    from torchvision.transforms.v2 import functional

    return functional.resize(image, list(size), antialias=True)


def test_view(image: Tensor, size: int, padding: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What the test shows: (3, S, S) float32 in [0, 1], and the (h, w) of the picture at its top left.

    Args:
        image: (3, H, W) uint8.
        padding: (3,) in [0, 1], the colour beyond it.
    """
    small = resized(image, fitted(image.shape[1], image.shape[2], size)).float() / 255
    framed = padding.view(3, 1, 1).expand(3, size, size).clone()
    framed[:, : small.shape[1], : small.shape[2]] = small
    return framed, (small.shape[1], small.shape[2])


class DetectTraining:
    """Training views: image (3, S, S) uint8 and a :data:`Target`, which may have no object."""

    def __init__(self, config: DetectViews, images: DenseSet) -> None:
        scoring_library()  # asked now, not after the last step
        self.config = config

    def __call__(self, image: Tensor, truth: Objects, rng: torch.Generator) -> tuple[Tensor, Target]:
        _same_size(image, truth)
        config, (height, width) = self.config, truth.size
        mirrored = _uniform(rng) < config.flip
        low, high = config.scale
        size = fitted(height, width, config.size * (low + (high - low) * _uniform(rng)))
        share = _uniform(rng)  # one for both sides, as the official crop has it
        top, left = (round(max(0, side - config.size) * share) for side in size)
        return self._image(image, size, top, left, mirrored), self._target(truth, size, top, left, mirrored)

    def _image(self, image: Tensor, size: tuple[int, int], top: int, left: int, mirrored: bool) -> Tensor:
        side = self.config.size
        image = resized(image.flip(-1) if mirrored else image, size)[:, top : top + side, left : left + side]
        right, below = side - image.shape[2], side - image.shape[1]
        return F.pad(image, (0, right, 0, below), value=self.config.pad)

    def _target(self, truth: Objects, size: tuple[int, int], top: int, left: int, mirrored: bool) -> Target:
        chosen = truth.learnable.nonzero()[:, 0]
        rows = _source(truth.size[0], size[0], top, self.config.size)
        columns = _source(truth.size[1], size[1], left, self.config.size)
        columns = truth.size[1] - 1 - columns if mirrored else columns
        masks = truth.masks(chosen.tolist())[:, rows[:, None], columns]
        left_over = masks.any(2).any(1)
        masks = masks[left_over]
        boxes, labels = tight_boxes(masks).float(), truth.labels[chosen][left_over]
        masks = F.pad(masks, (0, self.config.size - len(columns), 0, self.config.size - len(rows)))
        return {"boxes": boxes, "labels": labels, "masks": masks}

    def collate(self, targets: list[Any]) -> list[Target]:
        return targets


def _source(old: int, new: int, start: int, most: int) -> Tensor:
    """Which of ``old`` pixels lies nearest to each of ``new`` ones from ``start`` on, at most ``most``.

    In float32, so that it is the pixel that transforms.v2 takes ("nearest exact").
    """
    wanted = torch.arange(start, min(new, start + most), dtype=torch.float32)
    return ((wanted + 0.5) * (torch.tensor(old, dtype=torch.float32) / new)).long().clamp(max=old - 1)


def _same_size(image: Tensor, truth: Objects) -> None:
    if tuple(image.shape[1:]) != truth.size:
        sizes = f"{image.shape[1]}x{image.shape[2]}, its annotations say {truth.size[0]}x{truth.size[1]}"
        raise UserError(f"picture {truth.picture} is {sizes}")


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))
