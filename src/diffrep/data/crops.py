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

LEAST_AREA = 0.08  # share of the image's area; the largest is 1
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
    least_area: float = LEAST_AREA
    is_bicubic: bool = False  # else bilinear

    def boxes(self, index: Tensor, view: Tensor, height: int, width: int, role: str = "") -> Boxes:
        """The boxes of (index, view) in images of this size; a ``role`` has boxes of its own."""

        def uniform(what: str) -> Tensor:
            return hashed_uniform(_SEED, f"resized_crop {role} {what}", index, view)

        box_height, box_width = _fallback(height, width)
        sizes = torch.tensor([box_height, box_width]).expand(len(index), 2).clone().double()
        is_open = torch.ones(len(index), dtype=torch.bool)
        for attempt in range(_ATTEMPTS):
            tried = _size(self._area(uniform(f"area {attempt}")), uniform(f"ratio {attempt}"), height, width)
            fits = is_open & ((tried >= 1) & (tried <= torch.tensor([height, width]))).all(1)
            sizes[fits], is_open = tried[fits], is_open & ~fits
            if not is_open.any():
                break
        room = torch.tensor([height, width]) - sizes
        corner = torch.stack([uniform("top"), uniform("left")], 1).mul(room + 1).floor()
        corner[is_open] = room[is_open].div(2).floor()
        return Boxes(corner[:, 0], corner[:, 1], sizes[:, 0], sizes[:, 1], uniform("flip") < 0.5)

    def _area(self, uniform: Tensor) -> Tensor:
        return self.least_area + uniform * (1 - self.least_area)

    def show(self, images: Tensor, view: Tensor, index: Tensor, role: str = "") -> Tensor:
        """images (B, C, H, W), any dtype -> the crops, same shape, dtype and device."""
        height, width = images.shape[-2:]
        enlarge = resized_cubic if self.is_bicubic else resized
        return enlarge(images, self.boxes(index, view, height, width, role))


def _size(area: Tensor, ratio: Tensor, height: int, width: int) -> Tensor:
    """Shares of the area and uniform numbers -> (B, 2) height and width of a box; log-ratios are uniform."""
    pixels = area * (height * width)
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


_SLOPE = -0.5  # of the cubic kernel in Pillow and in torchvision's antialiased resize; grid_sample's is -0.75


def resized_cubic(images: Tensor, boxes: Boxes) -> Tensor:
    """What the boxes show, bicubically enlarged to (B, C, H, W), as Pillow does it.

    Columns before rows, whole numbers rounded and kept in 0..255 after each; nothing outside a box is looked at.
    """
    columns, weights = _taps(boxes.left, boxes.width, images.shape[3])
    columns = torch.where(boxes.is_flipped[:, None, None], columns.flip(1), columns)
    weights = torch.where(boxes.is_flipped[:, None, None], weights.flip(1), weights)
    wide = _in_range(_combined(images.float(), columns, weights, 3), images.dtype)
    tall = _combined(wide, *_taps(boxes.top, boxes.height, images.shape[2]), 2)
    return _in_range(tall, images.dtype).to(images.dtype)


def _taps(start: Tensor, size: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of ``count`` output pixels along an axis, (B, count, 4) each: which four pixels it mixes, and their shares."""
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) * (size / count)[:, None] - 0.5
    place = centre.floor()[:, :, None] + torch.arange(-1, 3)
    share = _cubic((place - centre[:, :, None]).abs())
    share = share.where((place >= 0) & (place < size[:, None, None]), 0)
    place = place.clamp(min=0).minimum(size[:, None, None] - 1) + start[:, None, None]
    return place.long(), share / share.sum(-1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """Keys's kernel, at distances 0 to 2 in pixels."""
    near = ((_SLOPE + 2) * distance - (_SLOPE + 3)) * distance**2 + 1
    far = _SLOPE * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


def _combined(images: Tensor, place: Tensor, share: Tensor, axis: int) -> Tensor:
    """Along ``axis`` of (B, C, H, W), the weighted sum of four pixels each; no other row of the batch is looked at."""
    place, share = place.to(images.device), share.float().to(images.device)
    mixed = torch.zeros_like(images)
    for tap in range(place.shape[2]):
        where, weight = (t[:, None, None, :, tap] if axis == 3 else t[:, None, :, None, tap] for t in (place, share))
        mixed += weight * images.gather(axis, where.expand(images.shape))
    return mixed


def _in_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype.is_floating_point else values.add_(0.5).floor_().clamp_(0, 255)  # halves up


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Freshly computed pixels back in the images' dtype, rounded where that holds whole numbers."""
    return values.to(dtype) if dtype.is_floating_point else values.round_().to(dtype)
