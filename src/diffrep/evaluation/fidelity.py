"""The Frechet distance of a set from real images, and what it would be between real images.

It reacts to class proportions, so only sets with equal label histograms are compared; it shrinks as the number of
images grows, so every distance stands beside its number and has a floor at about the same number.
Letters: N images of each side, D width of the pooled features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffrep.evaluation.distances import frechet_distance, gaussian
from diffrep.evaluation.survey import Survey
from diffrep.randomness import stream

ENOUGH = 2  # images per number of the feature; a covariance from fewer is mostly noise


def frechet(teacher: str, drawn: Survey, train: Survey, held_out: Survey) -> dict[str, Any]:
    """The set against real training images, whole and half; and two kinds of floor.

    Halves of the training images tell what chance alone does. The teacher learned from both of them; what it does to
    any unseen image, real or not, the held-out images tell.
    """
    can_match = can_be_matched(drawn, train)
    ours, theirs = matched(drawn.labels, train.labels, can_match)
    half, other = halves(train.labels, theirs, can_match)
    half_of_ours, _ = halves(drawn.labels, ours, can_match)
    unseen, half_of_half = matched(held_out.labels, train.labels[half], can_match and can_be_matched(held_out, train))
    sides = [
        ("the set, real training images", drawn.pooled[ours], train.pooled[theirs]),
        ("half of the set, half of the real", drawn.pooled[half_of_ours], train.pooled[half]),
        ("floor: one real half, the other", train.pooled[other], train.pooled[half]),
        ("floor: held-out real, a real half", held_out.pooled[unseen], train.pooled[half[half_of_half]]),
    ]
    name = f"Frechet distance on {teacher}'s pooled features"
    rows = [_row(what, a, b) for what, a, b in sides if len(a) > 1]
    return {"name": name, "width": train.pooled.shape[1], "is_matched": can_match,
            "left_out": _lacking(drawn, train) if can_match else [], "rows": rows}  # fmt: skip


def _row(what: str, first: Tensor, second: Tensor) -> dict[str, Any]:
    value = frechet_distance(gaussian(first), gaussian(second))
    is_reliable = len(first) >= ENOUGH * first.shape[1]
    return {"what": what, "images": len(first), "value": value, "is_reliable": is_reliable}


def can_be_matched(first: Survey, second: Survey) -> bool:
    """Whether labels of both mean the same classes, as far as their number tells."""
    is_labelled = first.images.labels is not None and second.images.labels is not None
    return is_labelled and len(first.images.classes) == len(second.images.classes)


def _lacking(first: Survey, second: Survey) -> list[str]:
    """Classes that one of the two has no image of."""
    both = set(first.labels.tolist()) & set(second.labels.tolist())
    return [name for label, name in enumerate(first.images.classes) if label not in both]


def matched(first: Tensor, second: Tensor, by_label: bool = True) -> tuple[Tensor, Tensor]:
    """Positions in both, with equal label histograms: of each class as many as both have, the rest left out by lot.

    Args:
        first, second: labels (N,) and (M,), -1 where there is none.
        by_label: without it, as many images of each as both have.
    """
    if not by_label:
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in sorted(set(first[first >= 0].tolist()) & set(second[second >= 0].tolist())):
        at = [(labels == label).nonzero()[:, 0] for labels in (first, second)]
        for number, (side, positions) in enumerate(zip(sides, at, strict=True)):
            order = torch.randperm(len(positions), generator=stream(0, "data card", number, label))
            side.append(positions[order[: min(map(len, at))]])
    return _joined(sides[0]), _joined(sides[1])


def halves(labels: Tensor, positions: Tensor, by_label: bool = True) -> tuple[Tensor, Tensor]:
    """Two parts of some positions, equal in size and label histogram; what does not divide by two is left out."""
    labels = labels if by_label else torch.zeros_like(labels)
    groups = [positions[labels[positions] == label] for label in labels[positions].unique()]
    return _joined([g[: len(g) // 2] for g in groups]), _joined([g[len(g) // 2 :][: len(g) // 2] for g in groups])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
