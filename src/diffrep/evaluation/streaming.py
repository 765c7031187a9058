"""The probe with all labels in one pass over the images: block by block, in constant memory.

Letters: B images of a block, D width of a reading, K classes. A reading is a named feature vector of an image: a tap of
a teacher at one noise level, pooled, or the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.data.datasets import ImageSet
from diffrep.evaluation.label_free import MOST_IMAGES, variance_ratio
from diffrep.evaluation.ridge import Sums
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.randomness import PerImage, stream

BLOCK = 256  # images at once
PIXEL_SIDE = 8  # raw pixels are pooled to this many cells a side where all labels are used: D x D has to stay small
PIXELS = "pixels"

Tick = Callable[[int], None]  # told how many images have passed; may raise Interrupted


@dataclass(frozen=True)
class Chosen:
    """Some images of a set. positions: (N,) int64 on the CPU, in the order they are read."""

    images: ImageSet
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def blocks(self) -> Iterator[Tensor]:
        return iter(self.positions.split(BLOCK))

    def labels(self, positions: Tensor) -> Tensor:
        """(B,) int64 on the CPU."""
        assert self.images.labels is not None  # refused before
        return self.images.labels.cpu()[positions]


Read = Callable[[ImageSet, Tensor], dict[str, Tensor]]  # a set and positions (B,) -> readings (B, D) float32, CPU


def pixels_of(images: ImageSet, positions: Tensor, device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]."""
    return images.gather(positions).to(device).to(torch.float32) / 255


def pooled(feature: Tensor, pool: int) -> Tensor:
    """Maps (B, C, h, w) to (B, C * pool^2); tokens (B, N, C) to their mean at pool 1, else laid flat; vectors stay."""
    if feature.dim() == 4:
        feature = F.adaptive_avg_pool2d(feature.float(), pool)
    elif feature.dim() == 3 and pool == 1:
        feature = feature.float().mean(1)
    return feature.flatten(1).cpu()


def teacher_reader(
    teacher: DiffusionTeacher,
    timestep: int,
    taps: Sequence[str],
    pool: int,
    noise: Literal["forward"] | None,
    seed: int,
    device: torch.device,
) -> Read:
    """All taps at one timestep from one pass. An image keeps its noise from level to level: levels compare in pairs."""

    def read(images: ImageSet, positions: Tensor) -> dict[str, Tensor]:
        rng = None
        if noise is not None:
            rng = PerImage([stream(seed, "probe noise", images.split, p) for p in positions.tolist()])
        found = teacher.features(pixels_of(images, positions, device), timestep, taps, noise, rng=rng)
        return {tap: pooled(feature, pool) for tap, feature in found.items()}

    return read


def pixel_reader(side: int | None = None) -> Read:
    """The pixels themselves, pooled to ``side`` cells where the image has more."""

    def read(images: ImageSet, positions: Tensor) -> dict[str, Tensor]:
        found = pixels_of(images, positions, torch.device("cpu"))
        if side is not None and min(found.shape[-2:]) > side:
            found = F.adaptive_avg_pool2d(found, side)
        return {PIXELS: found.flatten(1)}

    return read


@dataclass(frozen=True)
class Streamed:
    """accuracies: reading -> percent correct after each part of the training images; ratios: its label-free score."""

    accuracies: dict[str, list[float]]
    ratios: dict[str, float]


def streamed(
    read: Read, parts: Sequence[Chosen], held_out: Chosen, num_classes: int, seed: int, tick: Tick = lambda _: None
) -> Streamed:
    """One pass over the training images, one over the others: sums, solution, predictions on the fly.

    Args:
        parts: training images, one part after the other; a probe is fitted after each, on all images so far.
        seed: of k-means.
    """
    sums: dict[str, Sums] = {}
    probes: dict[str, list] = {}
    every = max(1, -(-sum(map(len, parts)) // MOST_IMAGES))
    sample: dict[str, list[Tensor]] = {}
    seen = 0
    for part in parts:
        for positions in part.blocks():
            clustered = (torch.arange(seen, seen + len(positions)) % every == 0).nonzero()[:, 0]
            for name, x in read(part.images, positions).items():
                sums.setdefault(name, Sums(num_classes)).add(x, part.labels(positions))
                sample.setdefault(name, []).append(x[clustered])
            seen += len(positions)
            tick(len(positions))
        for name, one in sums.items():
            probes.setdefault(name, []).append(one.ridge())
    right = {name: torch.zeros(len(parts), dtype=torch.int64) for name in sums}
    for positions in held_out.blocks():
        labels = held_out.labels(positions)
        for name, x in read(held_out.images, positions).items():
            right[name] += torch.stack([(probe.predict(x) == labels).sum() for probe in probes[name]])
        tick(len(positions))
    accuracies = {name: (100 * count.double() / len(held_out)).tolist() for name, count in right.items()}
    return Streamed(accuracies, {n: variance_ratio(torch.cat(x), num_classes, seed) for n, x in sample.items()})
