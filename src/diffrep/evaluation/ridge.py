"""Ridge regression on one-hot labels from streaming sums: constant memory, however many images pass by.

What is kept is a count and a sum per class and one second moment; the penalty is chosen by generalised cross
validation (Golub, Heath and Wahba 1979), which these sums determine. Letters: B images of a block, N of all, D width,
K classes, x a feature vector, y its one-hot label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.errors import RunError, UserError
from diffrep.evaluation.probe import PENALTIES

WIDEST = 8192  # numbers per image whose second moment is kept: half a gigabyte, minutes to decompose


@dataclass(frozen=True)
class Ridge:
    """A fitted probe. weights: (D, K), centre: (D,) of the raw features, offset: (K,); all float64."""

    weights: Tensor
    centre: Tensor
    offset: Tensor
    penalty: float  # of the standardised features

    def scores(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K) float64."""
        return (x.double() - self.centre) @ self.weights + self.offset

    def predict(self, x: Tensor) -> Tensor:
        """(B, D) -> classes (B,) int64."""
        return self.scores(x).argmax(1)


def check_width(width: int, tap: str = "a feature") -> None:
    """Refuse a feature whose second moment would fill the memory.

    Raises:
        UserError: wider than ``WIDEST``.
    """
    if width > WIDEST:
        told = f"{tap} of {width} numbers is too wide for the probe with all labels (at most {WIDEST})"
        raise UserError(f"{told}: pool it to fewer cells (pool), leave the tap out, or probe with few labels")


class Sums:
    """All that a ridge probe needs to know of the images so far.

    Features are taken relative to the mean of the first block: sums of squares far from zero would lose their digits.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64)  # (K,)
        self.origin: Tensor | None = None  # (D,)
        self.by_class = self.second = torch.zeros(0)  # (K, D) and (D, D), once D is known

    def add(self, x: Tensor, labels: Tensor) -> None:
        """x (B, D) of any float, labels (B,) int64.

        Raises:
            UserError: wider than ``WIDEST``.
        """
        check_width(x.shape[1])
        x = x.double()
        if not bool(torch.isfinite(x).all()):
            raise RunError("the probe met features that are not finite: the teacher returned inf or NaN")
        if self.origin is None:
            self.origin = x.mean(0)
            self.by_class = x.new_zeros(len(self.counts), x.shape[1])
            self.second = x.new_zeros(x.shape[1], x.shape[1])
        x = x - self.origin
        goal = F.one_hot(labels, len(self.counts)).double()
        self.counts += goal.sum(0)
        self.by_class.addmm_(goal.T, x)
        self.second.addmm_(x.T, x)

    def ridge(self, penalty: float | None = None) -> Ridge:
        """The probe on standardised features.

        Args:
            penalty: of the standardised features; None takes that of ``PENALTIES`` (times the mean squared length of a
                feature vector) with the least generalised cross validation error.
        """
        assert self.origin is not None  # nobody asks before the first image
        count = float(self.counts.sum())
        mean, offset = self.by_class.sum(0) / count, self.counts / count
        moment = self.second - count * torch.outer(mean, mean)
        deviation = (moment.diagonal() / max(count - 1, 1)).clamp(min=0).sqrt().clamp(min=1e-6)
        values, right = torch.linalg.eigh(moment / torch.outer(deviation, deviation))
        values = values.clamp(min=0)
        cross = (self.by_class.T - torch.outer(mean, self.counts)) / deviation[:, None]  # (D, K): sum of x (y - offset)
        rotated = right.T @ cross
        if penalty is None:
            spread = count - float(self.counts.square().sum()) / count  # sum of |y - offset|^2
            shares = [p * max(float(values.sum()), 1e-30) / count for p in PENALTIES]
            penalty = min(shares, key=lambda p: cross_validation_error(values, rotated, spread, count, p))
        weights = right @ (rotated / (values + penalty)[:, None]) / deviation[:, None]
        return Ridge(weights, self.origin + mean, offset, penalty)


def cross_validation_error(values: Tensor, rotated: Tensor, spread: float, count: float, penalty: float) -> float:
    """Generalised cross validation: (RSS / N) / (1 - df / N)^2, the intercept being one of the df.

    Args:
        values: (D,) eigenvalues of the second moment. rotated: (D, K) X^T y in its eigenvectors.
        spread: sum of the squared targets, centred.
    """
    shrunk = values / (values + penalty)
    explained = rotated.square().sum(1) / (values + penalty) * (2 - shrunk)
    residual = max(spread - float(explained.sum()), 0.0)
    freedom = 1 - (1 + float(shrunk.sum())) / count
    return residual / count / max(freedom, 1e-9) ** 2
