"""What frozen features know: a linear probe in closed form, nearest neighbours, and a sweep over taps and timesteps.

The linear probe is ridge regression on one-hot labels; its penalty is chosen by leave-one-out on the labelled
images themselves, so no other label is ever looked at. Letters: n labelled images, m test images, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOUR_BLOCK = 1024  # test images at once
PENALTIES = tuple(10.0**e for e in range(-3, 4))  # times the mean squared length of a feature vector


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Zero mean and unit deviation per column, by the statistics of ``train`` (which needs no labels)."""
    mean, deviation = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    return [(x.double() - mean) / deviation for x in (train, *others)]


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Classes (m,) int64 of ``test`` (m, D) by ridge regression on ``train`` (n, D) with ``labels`` (n,)."""
    centre, goal = train.double().mean(0), F.one_hot(labels, num_classes).double()
    x, offset = train.double() - centre, goal.mean(0)
    values, left = torch.linalg.eigh(x @ x.T)  # kernel form: n labelled images are few
    values = values.clamp(min=0)
    rotated = left.T @ (goal - offset)
    best = min(_penalties(values, len(x)), key=lambda p: _left_out_error(values, left, rotated, goal - offset, p))
    dual = left @ (rotated / (values + best)[:, None])  # (n, K)
    return ((test.double() - centre) @ (x.T @ dual) + offset).argmax(1)


def _penalties(values: Tensor, count: int) -> list[float]:
    """The penalties to choose from; features that do not vary at all get the majority class, not 0 / 0."""
    return [p * max(float(values.sum()), 1e-30) / count for p in PENALTIES]


def _left_out_error(values: Tensor, left: Tensor, rotated: Tensor, goal: Tensor, penalty: float) -> float:
    """Mean squared leave-one-out residual; the intercept's leverage 1/n is part of it (Allen's PRESS)."""
    shrink = values / (values + penalty)
    residual = goal - left @ (shrink[:, None] * rotated)
    leverage = left.square() @ shrink + 1 / len(goal)
    return float((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean())


def primal_probe(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """``linear_probe`` for many images of moderate width: the same solution from D x D instead of n x n."""
    centre, goal = train.double().mean(0), F.one_hot(labels, num_classes).double()
    x, offset = train.double() - centre, goal.mean(0)
    values, right = torch.linalg.eigh(x.T @ x)
    values = values.clamp(min=0)
    scores = x @ right  # (n, D)
    rotated = scores.T @ (goal - offset)

    def error(penalty: float) -> float:
        inverse = 1 / (values + penalty)
        residual = goal - offset - scores @ (inverse[:, None] * rotated)
        leverage = scores.square() @ inverse + 1 / len(goal)
        return float((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean())

    best = min(_penalties(values, len(x)), key=error)
    weights = right @ (rotated / (values + best)[:, None])
    return ((test.double() - centre) @ weights + offset).argmax(1)


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int = 1) -> Tensor:
    """Majority among the ``k`` nearest by cosine; a tie goes to the nearer ones. (m,) int64."""
    if len(test) > NEIGHBOUR_BLOCK:  # so that the table of similarities stays small
        blocks = [nearest_neighbours(train, labels, part, num_classes, k) for part in test.split(NEIGHBOUR_BLOCK)]
        return torch.cat(blocks)
    similarity = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    near = similarity.topk(min(k, len(train)), dim=1)
    votes = F.one_hot(labels[near.indices], num_classes).double()
    return (votes.sum(1) + 1e-6 * (votes * near.values[..., None]).sum(1)).argmax(1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent correct."""
    return 100 * float((predicted == labels).double().mean())


def probe_scores(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, draws: Sequence[Tensor], num_classes: int
) -> list[float]:
    """Percent correct of the linear probe for each draw of labelled positions; features (N, D) are standardised."""
    seen, held_out = standardise(train, test)
    scores = []
    for draw in draws:
        fit = linear_probe if len(draw) <= max(2048, seen.shape[1]) else primal_probe
        scores.append(accuracy(fit(seen[draw], labels[draw], held_out, num_classes), test_labels))
    return scores


def left_out_margins(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """By how much the probe of all other images prefers an image's own class to the next best, (n,) float64.

    Positive where it is right. Features (n, D) are standardised together; the penalty is that of the least left-out
    error, as in ``linear_probe``.
    """
    x, goal = standardise(features)[0], F.one_hot(labels, num_classes).double()
    offset = goal.mean(0)
    if x.shape[0] <= x.shape[1]:
        values, left = torch.linalg.eigh(x @ x.T)
    else:  # the left vectors of the same decomposition, by way of D x D; a direction without length explains nothing
        values, right = torch.linalg.eigh(x.T @ x)
        left = (x @ right) / values.clamp(min=1e-12).sqrt()
    values = values.clamp(min=0)
    rotated = left.T @ (goal - offset)
    best = min(_penalties(values, len(x)), key=lambda p: _left_out_error(values, left, rotated, goal - offset, p))
    shrink = values / (values + best)
    leverage = left.square() @ shrink + 1 / len(x)
    residual = (goal - offset - left @ (shrink[:, None] * rotated)) / (1 - leverage).clamp(min=1e-9)[:, None]
    answers, own = goal - residual, labels[:, None]
    return (answers.gather(1, own) - answers.scatter(1, own, -torch.inf).amax(1, keepdim=True))[:, 0]


def smoothed_accuracy(margins: Tensor, width: float) -> float:
    """Percent correct with a soft step: the mean of the normal distribution function at margin / width.

    An image near the border counts in part, so the noise of few images is less than that of counting; width 0 counts.
    """
    if width == 0:
        return 100 * float((margins > 0).double().mean())
    return 100 * float(torch.special.ndtr(margins / width).mean())
