"""Does a set repeat itself, and does it repeat the real images its generator learned from?

Any two images are some distance apart; what is too near is said by real images. Of those that no training image is
(held out), one in a hundred lies nearer to a training image than the 1st percentile of such distances. A generator
that draws from the same world does the same; one that copies does it more often.
Letters: N images of the set, M training images, H held-out ones, n as many of each as both have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.console import Report
from diffrep.evaluation.distances import nearest
from diffrep.evaluation.survey import Survey

PERCENTILE = 1.0
EQUAL_IMAGES = 5000  # n at most: how near neighbours are depends on how many images there are
PAIRS = 8  # shown
QUANTILES = 101  # of a distribution, for its picture


@dataclass(frozen=True)
class Space:
    """Where distances are taken. Vectors: (N, P), (M, P) and (H, P); the last two None without a real set."""

    name: str
    unit: str
    drawn: Tensor
    train: Tensor | None
    held_out: Tensor | None

    def shown(self, distance: Tensor) -> Tensor:
        """Euclidean distances of the vectors -> in the unit."""
        return distance.square() / 2 if self.unit == "cosine distance" else distance / math.sqrt(self.drawn.shape[1])

    def work(self) -> list[int]:
        """Of each search of :func:`neighbours`: vectors compared, in millions of numbers."""
        searches = [(len(self.drawn), len(self.drawn))]
        if self.train is not None and self.held_out is not None:
            searches += [(self.equal_images(), self.equal_images())] * 2
            searches += [(len(self.drawn), len(self.train)), (len(self.held_out), len(self.train))]
        return [queries * keys * self.drawn.shape[1] // 10**6 + 1 for queries, keys in searches]

    def equal_images(self) -> int:
        return min(len(self.drawn), 0 if self.train is None else len(self.train), EQUAL_IMAGES)


def spaces(drawn: Survey, real: tuple[Survey, Survey] | None, teacher: str | None) -> list[Space]:
    """Pixels, and the teacher's pooled features where there are any."""
    looked = [drawn, *(real or ())]
    found = [_space("pixels", "grey levels", [s.small for s in looked])]
    if drawn.pooled.numel():
        name = f"{teacher}'s pooled features"
        found.append(_space(name, "cosine distance", [F.normalize(s.pooled, dim=1) for s in looked]))
    return found


def _space(name: str, unit: str, vectors: Sequence[Tensor]) -> Space:
    train, held_out = vectors[1:] if len(vectors) > 1 else (None, None)
    return Space(name, unit, vectors[0], train, held_out)


def neighbours(space: Space, device: torch.device, reports: Sequence[Report]) -> dict[str, Any]:
    """Nearest neighbours within the set and among real training images; one report for each of ``space.work()``."""
    found: dict[str, Any] = {"name": space.name, "unit": space.unit, "width": space.drawn.shape[1]}
    inside, where = nearest(space.drawn, space.drawn, device, reports[0], is_same=True)
    found["within"] = {"images": len(inside), "pairs": _twins(space.shown(inside), where) if len(inside) > 1 else []}
    if space.train is None or space.held_out is None:
        return found
    found["within"] |= _equal(space, device, reports[1:3])
    ours, match = nearest(space.drawn, space.train, device, reports[3])
    theirs, _ = nearest(space.held_out, space.train, device, reports[4])
    ours, theirs = space.shown(ours), space.shown(theirs)
    found["against"] = {
        "train_images": len(space.train),
        "pairs": [(int(i), int(match[i]), float(ours[i])) for i in ours.argsort(stable=True)[:PAIRS]],
        "quantiles": {"drawn": _quantiles(ours), "held_out": _quantiles(theirs)},
        **nearer_than_usual(ours, theirs),
    }
    return found


def _equal(space: Space, device: torch.device, reports: Sequence[Report]) -> dict[str, Any]:
    """n images of the set among themselves beside n real training images among themselves."""
    n = space.equal_images()
    assert space.train is not None  # asked for where there is a real set
    if n < 2:
        return {}
    ours, theirs = (
        space.shown(nearest(_even(x, n), _even(x, n), device, report, is_same=True)[0])
        for x, report in zip((space.drawn, space.train), reports, strict=True)
    )
    return {"equal": nearer_than_usual(ours, theirs)}


def _even(vectors: Tensor, n: int) -> Tensor:
    return vectors[torch.linspace(0, len(vectors) - 1, n).round().long()]


def nearer_than_usual(ours: Tensor, usual: Tensor) -> dict[str, Any]:
    """How many of ``ours`` lie below the 1st percentile of ``usual``.

    noise: standard error, in points, of the share that an honest set would show. The percentile itself is an estimate
    from ``usual``, so that both sample sizes count.
    """
    threshold = float(torch.quantile(usual, PERCENTILE / 100))
    count, share = int((ours < threshold).sum()), PERCENTILE / 100
    noise = 100 * math.sqrt(share * (1 - share) * (1 / len(ours) + 1 / len(usual)))
    return {
        "images": len(ours),
        "real_images": len(usual),
        "threshold": threshold,
        "count": count,
        "share": 100 * count / len(ours),
        "expected": PERCENTILE,
        "noise": noise,
    }


def _twins(distance: Tensor, where: Tensor) -> list[tuple[int, int, float]]:
    """The nearest pairs within the set, each once."""
    pairs: dict[tuple[int, int], float] = {}
    for i in distance.argsort(stable=True).tolist():
        first, second = sorted((i, int(where[i])))
        pairs.setdefault((first, second), float(distance[i]))
        if len(pairs) == PAIRS:
            break
    return [(*pair, value) for pair, value in pairs.items()]


def _quantiles(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.linspace(0, 1, QUANTILES, dtype=values.dtype)).tolist()


def in_turn(report: Report, weights: Sequence[int]) -> list[Report]:
    """A report for each of several jobs that follow each other, all parts of one. weights: how long each takes."""

    def part(start: int, weight: int) -> Report:
        return lambda done, total: report(start + weight * done // total, sum(weights))

    return [part(start, weight) for start, weight in zip(accumulate(weights, initial=0), weights, strict=False)]
