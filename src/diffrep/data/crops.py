"""Random resized crops that can be counted: crop v of image i is a function of (i, v) alone.

Sizes and places are drawn as torchvision's RandomResizedCrop draws them. A box is never larger than the image, so
resizing it back to the image's size only ever enlarges, and antialiasing has nothing to do.
Letters: B images, C channels, H and W pixels, V crops of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.randomness import hashed_uniform

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
_ATTEMPTS = 10  # boxes tried before the largest one in the middle
_SEED = 0  # of every draw: a view belongs to the augmentation, not to a run


@dataclass(frozen=True)
class Boxes:
    """Where to look in B images: corner and size in whole pixels (B,) float64, and whether to mirror (B,) bool."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    is_flipped: Tensor


@dataclass(frozen=True)
class ResizedCrops:
    """V random crops, each resized to the whole image's size and mirrored with probability 1/2."""

    num_views: int

    def boxes(self, index: Tensor, view: Tensor, height: int, width: int, role: str = "") -> Boxes:
        """The boxes of (index, view) in images of this size; a ``role`` has boxes of its own."""

        def uniform(what: str) -> Tensor:
            return hashed_uniform(_SEED, f"resized_crop {role} {what}", index, view)

        box_height, box_width = _fallback(height, width)
        sizes = torch.tensor([box_height, box_width]).expand(len(index), 2).clone().double()
        is_open = torch.ones(len(index), dtype=torch.bool)
        for attempt in range(_ATTEMPTS):
            tried = _size(uniform(f"area {attempt}"), uniform(f"ratio {attempt}"), height, width)
            fits = is_open & ((tried >= 1) & (tried <= torch.tensor([height, width]))).all(1)
            sizes[fits], is_open = tried[fits], is_open & ~fits
            if not is_open.any():
                break
        room = torch.tensor([height, width]) - sizes
        corner = torch.stack([uniform("top"), uniform("left")], 1).mul(room + 1).floor()
        corner[is_open] = room[is_open].div(2).floor()
        return Boxes(corner[:, 0], corner[:, 1], sizes[:, 0], sizes[:, 1], uniform("flip") < 0.5)

    def show(self, images: Tensor, view: Tensor, index: Tensor, role: str = "") -> Tensor:
        """images (B, C, H, W), any dtype -> the crops, same shape, dtype and device."""
        height, width = images.shape[-2:]
        return resized(images, self.boxes(index, view, height, width, role))


def _size(area: Tensor, ratio: Tensor, height: int, width: int) -> Tensor:
    """Two uniform numbers -> (B, 2) height and width of a box: area uniform, ratio uniform in its logarithm."""
    pixels = (SCALE[0] + area * (SCALE[1] - SCALE[0])) * (height * width)
    shape = torch.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
    return torch.stack([(pixels / shape).sqrt(), (pixels * shape).sqrt()], 1).round()


def _fallback(height: int, width: int) -> tuple[int, int]:
    """The largest box of an allowed ratio."""
    if width < RATIO[0] * height:
        return round(width / RATIO[0]), width
    return height, min(width, round(height * RATIO[1]))


def resized(images: Tensor, boxes: Boxes) -> Tensor:
    """What the boxes show, bilinearly enlarged to (B, C, H, W); each row depends on its image and box only."""
    height, width = images.shape[-2:]
    rows = _positions(boxes.top, boxes.height, height)
    columns = _positions(boxes.left, boxes.width, width)
    columns = torch.where(boxes.is_flipped[:, None], columns.flip(1), columns)
    rows, columns = rows.float().to(images.device), columns.float().to(images.device)
    grid = torch.stack(
        [columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], -1
    )  # (B, H, W, 2), x before y as grid_sample wants it
    return as_stored(F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False), images.dtype)


def _positions(start: Tensor, size: Tensor, count: int) -> Tensor:
    """Centres of ``count`` output pixels inside [start, start + size), kept within it, as -1..1 over the image."""
    inside = (torch.arange(count) + 0.5) * (size / count)[:, None] - 0.5
    inside = inside.clamp(min=0).minimum(size[:, None] - 1)
    return (2 * (start[:, None] + inside) + 1) / count - 1


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Freshly computed pixels back in the images' dtype, rounded where that holds whole numbers."""
    return values.to(dtype) if dtype.is_floating_point else values.round_().to(dtype)
