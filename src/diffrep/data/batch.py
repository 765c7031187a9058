"""What travels between rooms: a batch of images in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch. B images, C = 3 channels, H and W pixels.

    images: (B, 3, H, W) float32 in [0, 1]; grey-scale is repeated to three channels at the door.
    labels: (B,) int64, -1 where the label is hidden from this run; None for an unlabelled source.
    index:  (B,) int64, the image's position in its source.
    view:   (B,) int64, which of the augmentation's enumerable views this is (0 = untouched); None if not enumerable.
            With ``index`` it is the key under which a teacher's answer can be cached and replayed exactly.
    target: what a dense task compares with, a :class:`Mixture` where images are mixed, or None.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    view: Tensor | None = None
    target: Any = None


@dataclass(frozen=True)
class Mixture:
    """The target of a batch into whose images others were mixed.

    labels: (B,) int64, of what was mixed in; -1 where the label is hidden.
    share: how much of each image is its own, in [0, 1].
    """

    labels: Tensor
    share: float
