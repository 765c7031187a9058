"""timm's augmentation of labelled images, as functions of (seed, step, row): RandAugment, erasing, mixup, cutmix.

These views cannot be counted, so no answer to them can be stored; they are for learning from labels alone. Each row has
draws of its own, and each step one mixture for its whole batch (timm's mode "batch"): the row from the other end is
mixed in, whichever process or micro-batch it belongs to.
Letters: B images of a step, b of them asked for, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.data.batch import Batch, Mixture
from diffrep.randomness import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's: what shifts bring in, what is put over boxes
_WORD = r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*"
Box = tuple[int, int, int, int]  # first and last row, first and last column; the last ones are outside


class TimmConfig(Config):
    """What is done to training images behind ``data.augment``; defaults do nothing."""

    rand_augment: str | None = Field(None, pattern=f"^{_WORD}$")  # timm's word, e.g. "rand-m9-mstd0.5-inc1"
    erasing: float = Field(0.0, ge=0, le=1)  # probability of one box of noise ("reprob", mode pixel)
    mixup: float = Field(0.0, ge=0)  # share ~ Beta(a, a)
    cutmix: float = Field(0.0, ge=0)  # share ~ Beta(a, a)
    mix_prob: float = Field(1.0, ge=0, le=1)  # of a step's being mixed at all
    switch_prob: float = Field(0.5, ge=0, le=1)  # of cutmix where both are on

    @model_validator(mode="after")
    def _does_something(self) -> TimmConfig:
        if not (self.rand_augment or self.erasing or self.mixup or self.cutmix):
            raise ValueError("does nothing: give rand_augment, erasing, mixup or cutmix, or leave it out")
        return self


class TimmViews:
    """batch_size: B, of the global batch; seed: of the run."""

    def __init__(self, config: TimmConfig, batch_size: int, seed: int) -> None:
        self.config, self.batch_size, self.seed = config, batch_size, seed

    def batch(self, step: int, rows: Sequence[int], gather: Callable[[list[int]], Batch]) -> Batch:
        """``rows`` of a step, changed and mixed; where there is mixing, ``target`` is a :class:`Mixture`.

        Args:
            gather: rows of the step -> their batch, images in [0, 1]. Noise put over a box leaves that range.
        """
        if not (self.config.mixup or self.config.cutmix):
            return self._changed(step, list(rows), gather)
        partners = [self.batch_size - 1 - row for row in rows]
        wanted = sorted({*rows, *partners})
        found = self._changed(step, wanted, gather)
        own, other = (_rows(found, [wanted.index(row) for row in those]) for those in (rows, partners))
        return mixed(own, other, *self.mixture(step, *found.images.shape[-2:]))

    def _changed(self, step: int, rows: list[int], gather: Callable[[list[int]], Batch]) -> Batch:
        batch = gather(rows)
        if not (self.config.rand_augment or self.config.erasing):
            return batch
        images = [self.changed(image, step, row) for image, row in zip(batch.images.cpu(), rows, strict=True)]
        return replace(batch, images=torch.stack(images).to(batch.images.device))

    def changed(self, image: Tensor, step: int, row: int) -> Tensor:
        """(3, H, W) in [0, 1] -> the same after RandAugment and erasing, by the draws of (seed, step, row)."""
        with seeded(self.seed, "timm view", step, row):
            if self.config.rand_augment:
                image = _rand_augmented(image, self.config.rand_augment)
            return _erased(image, self.config.erasing) if self.config.erasing else image

    def mixture(self, step: int, height: int, width: int) -> tuple[float, Box | None]:
        """How much of each row stays its own, in [0, 1], and the box that does not; None: all pixels are mixed.

        Drawn in the order of timm's ``Mixup``; the share of a box is that of the pixels outside it.
        """
        _torchvision_compat.install()
        from timm.data.mixup import cutmix_bbox_and_lam

        config = self.config
        with seeded(self.seed, "timm mixture", step):
            if np.random.rand() >= config.mix_prob:
                return 1.0, None
            both = bool(config.mixup and config.cutmix)
            is_cut = np.random.rand() < config.switch_prob if both else config.cutmix > 0
            alpha = config.cutmix if is_cut else config.mixup
            share = float(np.random.beta(alpha, alpha))
            if not is_cut or share == 1:
                return share, None
            (top, bottom, left, right), share = cutmix_bbox_and_lam((height, width), share)
            return float(share), (int(top), int(bottom), int(left), int(right))


def mixed(own: Batch, other: Batch, share: float, box: Box | None) -> Batch:
    """``share`` of each row of ``own`` with what is left of ``other``: within a box, or everywhere."""
    if box is None:
        images = own.images * share + other.images * (1 - share)
    else:
        top, bottom, left, right = box
        images = own.images.clone()
        images[:, :, top:bottom, left:right] = other.images[:, :, top:bottom, left:right]
    target = None if other.labels is None else Mixture(other.labels, share)
    return replace(own, images=images, target=target)


def _rows(batch: Batch, rows: list[int]) -> Batch:
    def chosen(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return Batch(batch.images[rows], chosen(batch.labels), batch.index[rows], chosen(batch.view))


def _rand_augmented(image: Tensor, word: str) -> Tensor:
    """timm's RandAugment on an 8-bit image; sizes as timm's `create_transform` sets them."""
    _torchvision_compat.install()
    from timm.data.auto_augment import rand_augment_transform

    settings = {
        "translate_const": int(min(image.shape[-2:]) * 0.45),
        "img_mean": tuple(round(255 * mean) for mean in MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    stored = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    shown = rand_augment_transform(word, settings)(Image.fromarray(stored))
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1).to(torch.float32) / 255


def _erased(image: Tensor, probability: float) -> Tensor:
    """One box of standard normal noise as seen after ImageNet's normalisation; every other pixel keeps its bits."""
    _torchvision_compat.install()
    from timm.data.random_erasing import RandomErasing

    canvas = RandomErasing(probability, mode="pixel", device="cpu")(torch.full_like(image, torch.nan))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return torch.where(canvas.isnan(), image, canvas * std + mean)
