"""Mixed views that can be counted: an image with a part of another, a function of (index, view) and that other image.

Source: dmkd.md section 1.5, the official options mixup and cutmix; only images are mixed, a teacher labels the result.
The official code draws one lambda and one permutation per batch; here each (index, view) has its own, so that a view
does not depend on the batch, and no image is its own partner.
Letters: B images, C channels, H and W pixels, N images of the set, V mixtures of a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrep.data.crops import as_stored
from diffrep.randomness import hashed_uniform

BETA = {"mixup": 0.4, "cutmix": 0.25}  # lambda ~ Beta(a, a)
_SEED = 0  # of every draw: a view belongs to the augmentation, not to a run


@dataclass(frozen=True)
class Mixing:
    """``kind`` "mixup" or "cutmix", V mixtures."""

    kind: str
    num_views: int

    def uniform(self, what: str, index: Tensor, view: Tensor) -> Tensor:
        """(B,) float64 in [0, 1) for one purpose."""
        return hashed_uniform(_SEED, f"{self.kind} {what}", index, view)

    def partners(self, index: Tensor, view: Tensor, num_images: int) -> Tensor:
        """The other image's position for each row, (B,) int64 in [0, N); the image itself only where N = 1."""
        steps = 1 + (self.uniform("partner", index, view) * (num_images - 1)).long()
        return (index.cpu() + steps) % num_images

    def share(self, index: Tensor, view: Tensor) -> Tensor:
        """lambda, (B,) float64 in [0, 1]: how much of the image itself remains."""
        from scipy.special import betaincinv

        a = BETA[self.kind]
        return torch.from_numpy(betaincinv(a, a, self.uniform("lambda", index, view).numpy()))

    def blend(self, images: Tensor, others: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """images, others (B, C, H, W) of one dtype -> the mixtures, same shape, dtype and device."""
        if self.kind == "cutmix":
            is_other = self.box(index, view, *images.shape[-2:]).to(images.device)
            return torch.where(is_other[:, None], others, images)
        share = self.share(index, view).float().to(images.device)[:, None, None, None]
        # Two products and a sum, each rounded: a fused form rounds otherwise at the end of a batch than inside it.
        mine, theirs = (part.to(torch.float32, copy=True) for part in (images, others))
        return as_stored(mine.mul_(share).add_(theirs.mul_(1 - share)), images.dtype)

    def box(self, index: Tensor, view: Tensor, height: int, width: int) -> Tensor:
        """Where cutmix shows the other image, (B, H, W) bool: area 1 - lambda, its centre anywhere, cut at the edge."""
        side = (1 - self.share(index, view)).sqrt()
        rows = _stretch(side, self.uniform("row", index, view), height)
        columns = _stretch(side, self.uniform("column", index, view), width)
        return rows[:, :, None] & columns[:, None, :]


def _stretch(share: Tensor, centre: Tensor, count: int) -> Tensor:
    """Which of ``count`` positions lie in a stretch of this share around a centre, (B, count) bool."""
    length = (share * count).round()
    start = (centre * count - length / 2).round()
    positions = torch.arange(count)
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])
