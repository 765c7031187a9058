"""Augmentation on whole batches, on the batch's device, from a list of views that can be counted.

Because an augmentation is "view number v of this image" and not a fresh draw, a teacher's answer to (index, view) can
be stored and replayed exactly. Letters: B images, C channels, H and W pixels, R the largest shift in pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.errors import UserError

_VALID = 'valid: "none", "flip", "shift:R", "crop_flip:R" with R = 1, 2, ... pixels'


@dataclass(frozen=True)
class Augmentation:
    """A numbered list of views of an image; view 0 is the untouched image.

    Shifts are numbered 0, 1, -1, 2, -2, ... per axis (columns fastest); the flipped views follow the unflipped ones.
    """

    text: str  # as written in the recipe
    reach: int  # R, pixels; 0 = no shift
    has_flip: bool  # whether the mirrored views exist

    @property
    def num_views(self) -> int:
        return self._num_shifts * (2 if self.has_flip else 1)

    @property
    def _num_shifts(self) -> int:
        return (2 * self.reach + 1) ** 2

    def apply(self, images: Tensor, view: Tensor) -> Tensor:
        """Show every image in its own view.

        Args:
            images: (B, C, H, W), any dtype; pixels that a shift brings in from outside are 0.
            view: (B,) int64 in [0, num_views), on the same device.

        Returns:
            (B, C, H, W), same dtype and device; row b depends on ``images[b]`` and ``view[b]`` only.

        Raises:
            UserError: a shift as wide as the image, which would leave nothing of it.
        """
        if self.num_views == 1:
            return images
        height, width = images.shape[-2:]
        if self.reach >= min(height, width):
            raise UserError(f"augment {self.text!r}: images are {height}x{width}; R must be below {min(height, width)}")
        rows, columns = self._origins(view, height, width)
        padded = F.pad(images, (self.reach,) * 4)
        source = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]  # (B, H, W) positions in a padded plane
        source = source.view(len(images), 1, -1).expand(-1, images.shape[1], -1)  # (B, C, H * W)
        return padded.flatten(2).gather(2, source).view(images.shape)

    def _origins(self, view: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where each output row and column comes from in the padded image: (B, H) and (B, W) int64."""
        shift, flipped = view % self._num_shifts, view >= self._num_shifts
        side = 2 * self.reach + 1
        rows = torch.arange(height, device=view.device) - _signed(shift // side)[:, None] + self.reach
        columns = torch.arange(width, device=view.device).expand(len(view), -1)
        columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        return rows, columns - _signed(shift % side)[:, None] + self.reach


def _signed(number: Tensor) -> Tensor:
    """0, 1, 2, 3, 4, ... -> 0, 1, -1, 2, -2, ..."""
    return torch.where(number % 2 == 1, (number + 1) // 2, -(number // 2))


def augmentation(text: str) -> Augmentation:
    """Read "none", "flip", "shift:R" or "crop_flip:R".

    shift:R translates by up to R pixels, zero-filled; crop_flip:R also mirrors (pad by R, crop back, flip).

    Raises:
        UserError: any other text.
    """
    if text in ("none", "flip"):
        return Augmentation(text, 0, text == "flip")
    found = re.fullmatch(r"(shift|crop_flip):([1-9]\d{0,4})", text)
    if not found:
        raise UserError(f"augment {text!r} is unknown; {_VALID}")
    return Augmentation(text, int(found[2]), found[1] == "crop_flip")
