"""Augmentation on whole batches, on the batch's device, from a list of views that can be counted.

Because an augmentation is "view number v of this image" and not a fresh draw, a teacher's answer to (index, view) can
be stored and replayed exactly. What looks random (crops, mixtures) is drawn by hashing (index, view). Which view a step
shows is the feed's draw; of an alternating flip it is a function of (seed, index, epoch).
Letters: B images, C channels, H and W pixels, N images of the set, R the largest shift in pixels, V views.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.data.crops import LEAST_AREA, ResizedCrops
from diffrep.data.mixing import Mixing
from diffrep.errors import UserError
from diffrep.randomness import hashed_uniform

MAX_VIEWS = 1_000_000  # V of one part
_VALID = (
    'valid: "none", "flip", "alternate_flip", "shift:R", "crop_flip:R", "alternate_flip:R" or '
    '"resized_crop:V[:AREA][:bicubic]", '
    'alone or joined by + with "mixup:V" or "cutmix:V", as in "crop_flip:4+cutmix:10"; R = 1, 2, ... pixels, '
    "V = 1, 2, ... 1000000 views, 0 < AREA < 1, the smallest share that a crop shows, as in 0.2"
)


@dataclass(frozen=True)
class Shifts:
    """Shifts numbered 0, 1, -1, 2, -2, ... per axis (columns fastest); the mirrored views follow the others."""

    text: str  # as written in the recipe
    reach: int  # R, pixels; 0 = no shift
    has_flip: bool  # whether the mirrored views exist
    alternates: bool = False  # mirrored every other epoch; what a shift brings in is then reflected, not 0

    @property
    def num_views(self) -> int:
        return self._num_shifts * (2 if self.has_flip else 1)

    @property
    def _num_shifts(self) -> int:
        return (2 * self.reach + 1) ** 2

    def show(self, images: Tensor, view: Tensor) -> Tensor:
        """images (B, C, H, W), any dtype -> the same, shifted; pixels from outside are 0, or reflected.

        Raises:
            UserError: a shift as wide as the image, which would leave nothing of it.
        """
        if self.num_views == 1:
            return images
        height, width = images.shape[-2:]
        if self.reach >= min(height, width):
            raise UserError(f"augment {self.text!r}: images are {height}x{width}; R must be below {min(height, width)}")
        rows, columns = self._origins(view.to(images.device), height, width)
        if self.alternates:
            rows, columns, shown = _reflected(rows, height), _reflected(columns, width), images
        else:
            rows, columns, shown = rows + self.reach, columns + self.reach, F.pad(images, (self.reach,) * 4)
        source = rows[:, :, None] * shown.shape[-1] + columns[:, None, :]  # (B, H, W) positions in a plane
        source = source.view(len(images), 1, -1).expand(-1, images.shape[1], -1)  # (B, C, H * W)
        return shown.flatten(2).gather(2, source).view(images.shape)

    def _origins(self, view: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where each output row and column comes from, maybe outside the image: (B, H) and (B, W) int64."""
        shift, flipped = view % self._num_shifts, view >= self._num_shifts
        side = 2 * self.reach + 1
        rows = torch.arange(height, device=view.device) - _signed(shift // side)[:, None]
        columns = torch.arange(width, device=view.device).expand(len(view), -1)
        columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        return rows, columns - _signed(shift % side)[:, None]

    def chosen(self, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
        """The view of an alternating flip: one coin per image, turned over at each epoch, and a shift of that epoch.

        Args:
            index, epoch: (B,) int64; ``epoch`` is how often the image was shown before.

        Returns:
            (B,) int64 in [0, num_views), on the CPU.
        """
        is_mirrored = (hashed_uniform(seed, "flip", index, torch.zeros_like(index)) < 0.5) ^ (epoch % 2 == 1)
        shift = (hashed_uniform(seed, "shift", index, epoch) * self._num_shifts).long()
        return shift + self._num_shifts * is_mirrored


def _signed(number: Tensor) -> Tensor:
    """0, 1, 2, 3, 4, ... -> 0, 1, -1, 2, -2, ..."""
    return torch.where(number % 2 == 1, (number + 1) // 2, -(number // 2))


def _reflected(position: Tensor, size: int) -> Tensor:
    """Positions less than ``size`` outside 0..size-1, mirrored at the first and last pixel."""
    last = size - 1
    return last - (last - position.abs()).abs()


@dataclass(frozen=True)
class Augmentation:
    """A numbered list of views of an image: view v shows place v % P of P, mixed in manner v // P.

    Without crops and mixing, view 0 is the untouched image.
    """

    text: str  # as written in the recipe
    places: Shifts | ResizedCrops
    mixing: Mixing | None

    @property
    def num_views(self) -> int:
        return self.places.num_views * (self.mixing.num_views if self.mixing else 1)

    @property
    def reach(self) -> int:
        """R, the largest shift in pixels."""
        return self.places.reach if isinstance(self.places, Shifts) else 0

    @property
    def needs_index(self) -> bool:
        """Whether a view also depends on the image's position in its set."""
        return self.mixing is not None or isinstance(self.places, ResizedCrops)

    @property
    def alternates(self) -> bool:
        """Whether the epoch decides which view is shown: ``scheduled`` says it, and a step does not draw."""
        return isinstance(self.places, Shifts) and self.places.alternates

    def scheduled(self, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
        """The views that images (B,) int64 of an alternating flip have in their epochs (B,): (B,) int64."""
        assert isinstance(self.places, Shifts)
        mixture = hashed_uniform(seed, "mixture", index, epoch) * (self.mixing.num_views if self.mixing else 1)
        return self.places.chosen(seed, index, epoch) + self.places.num_views * mixture.long()

    def partners(self, index: Tensor, view: Tensor, num_images: int) -> Tensor | None:
        """Which images ``apply`` needs beside these: positions (B,) int64 on the CPU, or None where nothing is mixed.

        Args:
            index: (B,) int64, positions in the set.
            view: (B,) int64 in [0, num_views).
            num_images: N.
        """
        return self.mixing.partners(index, view, num_images) if self.mixing else None

    def apply(
        self, images: Tensor, view: Tensor, index: Tensor | None = None, partner_images: Tensor | None = None
    ) -> Tensor:
        """Show every image in its own view.

        Args:
            images: (B, C, H, W), any dtype; pixels that a shift brings in from outside are 0, or reflected.
            view: (B,) int64 in [0, num_views), on any device; what is hashed is hashed on the CPU.
            index: (B,) int64, positions in the set; needed where ``needs_index``.
            partner_images: (B, C, H, W), the images at ``partners``, as they are stored; needed where there are any.

        Returns:
            (B, C, H, W), same dtype and device; row b depends on its image, view, index and partner image only.

        Raises:
            UserError: a shift as wide as the image, which would leave nothing of it.
            ValueError: index or partner images are needed and not given.
        """
        if not self.needs_index:
            return self._shown(images, view, view, "")
        if index is None or (self.mixing is not None and partner_images is None):
            raise ValueError(f"augment {self.text!r}: a view depends on index and partner images; pass both")
        shown = self._shown(images, view % self.places.num_views, index, "")
        if self.mixing is None or partner_images is None:
            return shown
        place = (self.mixing.uniform("place", index, view) * self.places.num_views).long()
        others = self._shown(partner_images, place, index, self.mixing.kind)
        return self.mixing.blend(shown, others, index, view)

    def _shown(self, images: Tensor, view: Tensor, index: Tensor, role: str) -> Tensor:
        if isinstance(self.places, Shifts):
            return self.places.show(images, view)
        return self.places.show(images, view, index, role)


def augmentation(text: str) -> Augmentation:
    """Read "none", "flip", "shift:R", "crop_flip:R", "resized_crop:V[:AREA][:bicubic]", "mixup:V", or PLACES+MIXING.

    shift:R translates by up to R pixels, zero-filled; crop_flip:R also mirrors (pad by R, crop back, flip);
    alternate_flip mirrors an image at every other epoch, alternate_flip:R also translates, filled by reflection;
    resized_crop:V is V random crops, resized back and mirrored by chance, resized_crop:V:0.2:bicubic of 0.2 to 1 of the
    area (default 0.08) and bicubically (default bilinearly); mixup:V and cutmix:V mix in another image.

    Raises:
        UserError: any other text.
    """
    first, plus, second = text.partition("+")
    if not plus and (mixing := _mixing(first)):
        return Augmentation(text, Shifts(text, 0, False), mixing)
    places, mixing = _places(text, first), _mixing(second)
    if places is None or (plus and (mixing is None or first == "none")):
        raise UserError(f"augment {text!r} is unknown; {_VALID}")
    return Augmentation(text, places, mixing)


def _places(text: str, part: str) -> Shifts | ResizedCrops | None:
    if part in ("none", "flip"):
        return Shifts(text, 0, part == "flip")
    if found := re.fullmatch(r"(shift|crop_flip):([1-9]\d{0,4})", part):
        return Shifts(text, int(found[2]), found[1] == "crop_flip")
    if found := re.fullmatch(r"alternate_flip(?::([1-9]\d{0,4}))?", part):
        return Shifts(text, int(found[1] or 0), has_flip=True, alternates=True)
    found = re.fullmatch(r"resized_crop:([1-9]\d{0,6})(?::(0\.(?!0+\b)\d{1,4}))?(:bicubic)?", part)
    if not found or int(found[1]) > MAX_VIEWS:
        return None
    return ResizedCrops(int(found[1]), float(found[2] or LEAST_AREA), found[3] is not None)


def _mixing(part: str) -> Mixing | None:
    found = re.fullmatch(r"(mixup|cutmix):([1-9]\d{0,6})", part)
    return Mixing(found[1], int(found[2])) if found and int(found[2]) <= MAX_VIEWS else None
