"""How a picture with a mask is brought before a network, in training and in the test.

Training: resized by a random factor, cropped, mirrored, recoloured, padded; a mask is resized to the nearest pixel and
goes through no colour. Pictures are resized without antialiasing, as OpenCV does it for the published numbers.
Source: mmsegmentation's Resize, RandomCrop, RandomFlip and PhotoMetricDistortion, rebuilt from their description.
Deviations: colours stay fractions between two steps, where the original rounds to 0..255; the jitter of zllrunning
sees the crop, not the whole picture; where a class pair is mirrored, its labels change sides (the original's do not).
Letters: H W a picture, h w a mask or a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.data.dense import IGNORED, DenseSet

_TRIES = 10  # further crops, where the first ones are too much of one class
_BRIGHTNESS, _FACTORS, _HUE = 32, (0.5, 1.5), 18  # of 255; contrast and saturation; of 180: PhotoMetricDistortion
_JITTER = (0.5, 1.5)  # brightness, contrast and saturation: zllrunning's


class SegmentViews(Config):
    """What is done to pictures and masks; the defaults are those of face parsing with BiSeNet."""

    # long and short side of the frame a picture is fitted into, its shape kept: (2048, 512) makes the short side 512
    base: tuple[int, int] = (512, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)  # in training the frame is so many times as large, drawn evenly
    ratios: tuple[float, ...] = ()  # or one of these: 0.75, 1, 1.25, 1.5, 1.75, 2 (zllrunning)
    crop: int = Field(448, ge=1)  # pixels of the side of a training crop
    cat_max_ratio: float = Field(0.75, gt=0, le=1)  # of a crop's counted pixels, that one class may fill; 1 = any
    flip: float = Field(0.5, ge=0, le=1)  # share of training pictures that are mirrored
    swap_mirrored: bool = True  # and left and right labels exchanged in them; false: as the official code
    colour: Literal["photometric", "jitter", "none"] = "photometric"
    test: Literal["whole", "slide"] = "whole"  # the fitted picture at once, or averaged over windows of it
    window: int = Field(512, ge=1)  # pixels of a window's side ...
    stride: int = Field(256, ge=1)  # ... and from one to the next
    test_ratios: tuple[float, ...] = (1.0,)  # sizes of the frame that are averaged in the test
    test_flip: bool = False  # mirrored pictures are averaged with them

    @model_validator(mode="after")
    def _fits(self) -> SegmentViews:
        if not 1 <= self.base[1] <= self.base[0]:
            raise ValueError(f"base = {self.base}: the long side comes first, and both are 1 or more")
        if not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise ValueError(f"ratio_range = {self.ratio_range}: two numbers above 0, the smaller one first")
        if min((*self.ratios, *self.test_ratios), default=1) <= 0 or not self.test_ratios:
            raise ValueError("ratios and test_ratios are above 0, and test_ratios has at least one")
        if self.stride > self.window:
            raise ValueError(f"stride = {self.stride}: windows of {self.window} pixels would leave gaps")
        return self


def fitted(height: int, width: int, base: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """(h, w) of a picture in a frame of ``ratio`` times ``base`` (long side, short side), its shape kept."""
    long, short = (int(side * ratio) for side in base)
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) uint8, or float in [0, 1] -> (3, h, w) float32 in [0, 1], bilinear; uint8 stays whole numbers."""
    if tuple(image.shape[1:]) != size:
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    return image.float() / 255 if image.dtype == torch.uint8 else image


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) uint8 -> (h, w), each pixel the nearest one's label."""
    return mask if tuple(mask.shape) == size else F.interpolate(mask[None, None], size, mode="nearest")[0, 0]


def exchange(mirrored: tuple[tuple[int, int], ...]) -> Tensor:
    """Label -> label in a mirror image, (256,) uint8."""
    table = torch.arange(256, dtype=torch.uint8)
    for left, right in mirrored:
        table[left], table[right] = right, left
    return table


def mirror(image: Tensor, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(3, h, w) and (h, w) uint8, left and right exchanged, labels by ``table`` of :func:`exchange`."""
    return image.flip(-1), table[mask.flip(-1).long()]


class SegmentTraining:
    """Training views: image (3, crop, crop) float32 in [0, 1], mask (crop, crop) uint8 with ``IGNORED``."""

    def __init__(self, config: SegmentViews, images: DenseSet, mean: Sequence[float] = (0.5,)) -> None:
        """mean: the student's, one number or one per channel: the colour beyond a picture, which it sees as 0."""
        self.config = config
        self.padding = tuple(mean) * (3 // len(mean))
        self.table = exchange(images.mirrored if config.swap_mirrored else ())

    def __call__(self, image: Tensor, truth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        size = fitted(image.shape[1], image.shape[2], config.base, self._ratio(rng))
        mask = resized_mask(truth, size)
        rows, columns = chosen_crop(mask, config.crop, config.cat_max_ratio, rng)
        image, mask = resized(image, size)[:, rows, columns], mask[rows, columns]
        if _uniform(rng) < config.flip:
            image, mask = mirror(image, mask, self.table)
        image = RECOLOURED[config.colour](image, rng)
        return padded(image, mask, config.crop, self.padding)

    def collate(self, targets: list[Tensor]) -> Tensor:
        """(B, crop, crop) int64."""
        return torch.stack(targets).long()

    def _ratio(self, rng: torch.Generator) -> float:
        if self.config.ratios:
            return self.config.ratios[_integer(rng, len(self.config.ratios))]
        return _uniform(rng, *self.config.ratio_range)


def chosen_crop(mask: Tensor, side: int, most: float, rng: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a crop in which no class fills ``most`` of what is counted; else the last one tried."""
    for _ in range(1 + _TRIES):
        rows, columns = _stretch(mask.shape[0], side, rng), _stretch(mask.shape[1], side, rng)
        if most == 1 or _is_varied(mask[rows, columns], most):
            break
    return rows, columns


def _stretch(length: int, side: int, rng: torch.Generator) -> slice:
    start = _integer(rng, max(length - side, 0) + 1)
    return slice(start, min(start + side, length))


def _is_varied(mask: Tensor, most: float) -> bool:
    counts = torch.bincount(mask.flatten(), minlength=256)[:IGNORED]
    return bool((counts > 0).sum() > 1 and counts.max() < most * counts.sum())


def padded(image: Tensor, mask: Tensor, side: int, colour: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Below and to the right: the image with a colour, the mask with ``IGNORED``."""
    height, width = mask.shape
    if (height, width) == (side, side):
        return image.contiguous(), mask.contiguous()
    whole = torch.tensor(colour)[:, None, None].expand(3, side, side).clone()
    whole[:, :height, :width] = image
    return whole, F.pad(mask, (0, side - width, 0, side - height), value=IGNORED)


# Colours, of images (3, h, w) in [0, 1]


def photometric(image: Tensor, rng: torch.Generator) -> Tensor:
    """PhotoMetricDistortion: each of four changes in half of the images, contrast before or after the middle two."""
    if _is_heads(rng):
        image = (image + _uniform(rng, -_BRIGHTNESS, _BRIGHTNESS) / 255).clamp(0, 1)
    contrast_first = _is_heads(rng)
    if contrast_first:
        image = _contrast(image, rng)
    if _is_heads(rng):
        image = saturated(image, _uniform(rng, *_FACTORS))
    if _is_heads(rng):
        image = _functional().adjust_hue(image, (_integer(rng, 2 * _HUE) - _HUE) / 180)
    return image if contrast_first else _contrast(image, rng)


def _contrast(image: Tensor, rng: torch.Generator) -> Tensor:
    return (image * _uniform(rng, *_FACTORS)).clamp(0, 1) if _is_heads(rng) else image


def saturated(image: Tensor, factor: float) -> Tensor:
    """S of HSV times ``factor``, at most 1; H and V stay: V - (V - colour) S' / S."""
    value, least = image.amax(0), image.amin(0)
    highest = value / (value - least).clamp_min(1e-12)  # 1 / S, where S' = 1
    return value - (value - image) * highest.clamp_max(factor)


def jitter(image: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation, each times a factor of its own, as Pillow understands them."""
    change = _functional()
    for adjust in (change.adjust_brightness, change.adjust_contrast, change.adjust_saturation):
        image = adjust(image, _uniform(rng, *_JITTER))
    return image


RECOLOURED = {"photometric": photometric, "jitter": jitter, "none": lambda image, _rng: image}


def _functional() -> Any:
    _torchvision_compat.install()
    from torchvision.transforms.v2 import functional

    return functional


def _uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def _integer(rng: torch.Generator, count: int) -> int:
    """One of 0 ... count - 1."""
    return int(torch.randint(count, (), generator=rng))


def _is_heads(rng: torch.Generator) -> bool:
    return _uniform(rng) < 0.5
