"""How a student is held against its teacher at one pair of taps: standardised, projected, on one grid, one distance.

Letters: B images, A timesteps with statistics of their own (or 1), C teacher channels, D student channels, g hint grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep import losses
from diffrep.models.contrast import ContrastiveMemory, contrast_table, from_all_processes
from diffrep.randomness import Rows

Projector = Literal["linear", "conv"]
LossName = Literal["l2", "l1", "l2_norm", "cosine", "at", "rkd", "info_nce", "crd"]
MEMORY = "crd"  # the one loss that remembers images between batches


class Comparison(nn.Module):
    """Student feature (B, D, h, w) and teacher code (B, C, h', w') -> one number.

    Args:
        loss: a key of ``losses.FEATURE_LOSSES``, or crd.
        widths: D and C.
        grid: cells per side both are pooled to; None: the teacher's own grid (dense).
        statistics: rows of mean and deviation of the code, one per timestep or one for all.
        negatives: images that crd compares each one with.
    """

    mean: Tensor  # (A or 1, C, 1, 1) of the code, over the training set
    std: Tensor

    def __init__(
        self, loss: LossName, widths: tuple[int, int], grid: int | None, projector: Projector, statistics: int,
        negatives: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.widths, self.grid, self.negatives = loss, widths, grid, negatives
        self.memory: ContrastiveMemory | None = None  # of crd; as large as the training set, see `remember`
        if loss != MEMORY and losses.FEATURE_LOSSES[loss].needs_projector:
            self.projector = projector_of(projector, *widths)
        for name, value in (("mean", torch.zeros), ("std", torch.ones)):
            self.register_buffer(name, value(statistics, widths[1], 1, 1))

    def standardised(self, code: Tensor, choice: Tensor) -> Tensor:
        """(code - mean) / std, by the row of each image's timestep, (B,)."""
        row = choice if len(self.mean) > 1 else torch.zeros_like(choice)
        return (code - self.mean[row]) / self.std[row]

    def measure(self, moments: Tensor) -> None:
        """Take mean and deviation from (A or 1, 2, C): means and mean squares."""
        mean, square = moments.unbind(1)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean[:, :, None, None])
        self.std.copy_(deviation.clamp(min=1e-6)[:, :, None, None])

    def imitation(self, feature: Tensor, grid: torch.Size) -> Tensor:
        """The student's map in the code's width and on its ``grid``; losses without a projector keep its width.

        Pooled before a 1x1 projector, not after as in the official code: both are linear, the result is the same.
        """
        if self.grid is not None:
            feature = losses.pooled(feature, self.grid)
        if hasattr(self, "projector"):
            feature = self.projector(feature)
        return feature if feature.shape[-2:] == grid else F.interpolate(feature, grid, mode="bilinear")

    def distance(self, imitation: Tensor, code: Tensor, index: Tensor, rng: Rows) -> Tensor:
        """(): the loss of these images, whose positions in the training set are ``index`` (B,)."""
        if self.memory is None:
            loss = losses.FEATURE_LOSSES[self.loss]
            if loss.fewest > 1:
                imitation, code = from_all_processes(imitation), from_all_processes(code)
            return loss.function(imitation, code).mean()
        table = contrast_table(index, self.negatives, len(self.memory.memory_s), rng)
        return self.memory(imitation.flatten(1), code.flatten(1), table).mean()

    def remember(self, num_images: int) -> None:
        """Make room for all training images, where the loss needs it."""
        if self.loss == MEMORY:
            cells = (self.grid or 1) ** 2
            self.memory = ContrastiveMemory(self.widths[0] * cells, self.widths[1] * cells, num_images)

    def after_step(self) -> None:
        if self.memory is not None:
            self.memory.after_step()


def projector_of(kind: Projector, width_in: int, width: int) -> nn.Module:
    """linear: 1x1 (official). conv: 3x3, each channel then normalised over its places, with a scale and shift."""
    if kind == "linear":
        return nn.Conv2d(width_in, width, 1)
    return nn.Sequential(nn.Conv2d(width_in, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True))
