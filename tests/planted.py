"""A teacher whose features are known: at one noise level, and at one tap, the class stands out of the noise most."""

import math

import torch
from torch import Tensor, nn

from diffrep.data.datasets import ImageSet
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.frozen.diffusion import DiffusionTeacher

BEST_SIGMA = 0.15
CLASSES = 5


def images(count: int, seed: int, split: str = "train") -> ImageSet:
    """Red tells the class of a 4x4 image, a little; green and blue are noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    templates = torch.randn(CLASSES, 4, 4, generator=torch.Generator().manual_seed(0))
    red = 0.5 + 0.12 * templates[labels] + 0.12 * torch.randn(count, 4, 4, generator=rng)
    pixels = torch.stack([red, *(torch.rand(count, 4, 4, generator=rng) for _ in range(2))], 1)
    classes = tuple(f"class {k}" for k in range(CLASSES))
    return ImageSet("planted", split, classes, "none", (255 * pixels.clamp(0, 1)).to(torch.uint8), labels)


class Mixed(nn.Module):
    """gain * red + green: the larger the gain, the clearer the class."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.share * gain[:, None, None, None] * x[:, :1] + x[:, 1:2]


class Planted(nn.Module):
    """Taps ``poor``, ``good`` and ``fair``; ``passes`` counts the images that went through."""

    def __init__(self, curve) -> None:
        super().__init__()
        self.curve, self.passes = curve, 0
        self.poor, self.good, self.fair = Mixed(0.1), Mixed(1.0), Mixed(0.5)
        self.schedule = NoiseSchedule.named("linear")

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.passes += 0 if x.is_meta else len(x)
        sigma = self.schedule.sigma_at(0 if timestep.is_meta else int(timestep[0]))
        gain = torch.full((len(x),), self.curve(math.log(sigma)), device=x.device)
        return self.fair(x, gain) + self.good(x, gain) + self.poor(x, gain)


def unimodal(log_sigma: float) -> float:
    return 2 * math.exp(-((log_sigma - math.log(BEST_SIGMA)) ** 2))


def teacher(curve=unimodal) -> DiffusionTeacher:
    return DiffusionTeacher(Planted(curve).eval(), "planted", 4)
