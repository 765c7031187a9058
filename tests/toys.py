"""Tiny generators and classifiers for tests, as references: ``python:toys:painter``.

TOY_SECONDS: how long each of a painter's calls takes. TOY_PIDS: a folder in which every process that paints leaves a
file named after it. TOY_SEED: other weights. TOY_SHIFT: other images from the same weights, as another build gives.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.frozen.classifier import ClassifierTeacher
from diffrep.frozen.diffusion import DiffusionTeacher

CLASSES = 3


class Painter(nn.Module):
    """(x, timestep[, class_labels]) -> noise, in two convolutions; 8 pixels."""

    def __init__(self, classes: int | None = CLASSES) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.classes = nn.Embedding(classes + 1, 16) if classes else None

    def forward(self, x, timestep, class_labels=None):
        if not x.is_meta:  # where calls are only counted
            self.work()
        h = self.stem(x)
        if self.classes is not None:
            h = h + self.classes(class_labels)[:, :, None, None]
        return self.out(torch.tanh(h)) + float(os.environ.get("TOY_SHIFT", "0"))

    def work(self) -> None:
        if folder := os.environ.get("TOY_PIDS"):
            (Path(folder) / str(os.getpid())).touch()
        time.sleep(float(os.environ.get("TOY_SECONDS", "0")))


def painter(classes: int | None = CLASSES) -> DiffusionTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(int(os.environ.get("TOY_SEED", "0")))
        network = Painter(classes)
    return DiffusionTeacher(network, "painter", 8, 3, num_classes=classes, licence="MIT", labels_seen={"painter": 7})


def nameless() -> DiffusionTeacher:
    """A painter that knows no classes."""
    return painter(None)


# Classes whose images are known exactly, and classifiers of them


class Gaussians(nn.Module):
    """The exact denoiser of data where class k is Gaussian around its own image; the null class is around grey.

    E[x_0 | x_t] = mean + shrink (x_t - sqrt(alpha_bar) mean)
    with shrink = sqrt(alpha_bar) v / (alpha_bar v + 1 - alpha_bar)
    """

    VARIANCE = 0.04

    def __init__(self) -> None:
        super().__init__()
        means = torch.zeros(5, 3, 4, 4)
        for k in range(4):  # one bright quarter each
            means[k, :, 2 * (k // 2) : 2 * (k // 2) + 2, 2 * (k % 2) : 2 * (k % 2) + 2] = 0.5
        self.register_buffer("means", means)
        self.schedule = NoiseSchedule.named("linear")

    def forward(self, x, timestep, class_labels):
        mean, a = self.means[class_labels], self.schedule.alpha_bar(timestep, x)
        shrink = a.sqrt() * self.VARIANCE / (a * self.VARIANCE + 1 - a)
        clean = mean + shrink * (x - a.sqrt() * mean)
        return (x - a.sqrt() * clean) / (1 - a).sqrt()


def gaussians() -> DiffusionTeacher:
    network = Gaussians()
    return DiffusionTeacher(network, "gaussians", 4, 3, network.schedule, num_classes=4)


def quarters(gain: float = 6.0, classes: int = 4) -> ClassifierTeacher:
    """A linear classifier that looks where :class:`Gaussians` is bright."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, classes, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(gain * Gaussians().means[:classes].flatten(1) / 6)
    return ClassifierTeacher(network, "quarters", classes, (0.5,), (0.5,), image_size=4)


def unsure() -> ClassifierTeacher:
    """The same with smaller weights: a student that has learnt less."""
    return quarters(gain=2.0)


def pairs() -> ClassifierTeacher:
    """Of the first two classes alone."""
    return quarters(classes=2)


def triples() -> ClassifierTeacher:
    return quarters(classes=3)
