"""A learned mix of feature maps into one descriptor: which taps and timesteps matter is learned, and can be read off.

Luo et al., "Diffusion Hyperfeatures", NeurIPS 2023. Each tap's map is brought to one grid, standardised and projected
to one width; the descriptor is the sum of softmax(w)_{t,l} times the projection of tap l at timestep t.
Letters: T timesteps, L taps, B images, C channels of a tap, D width of the descriptor, g cells of its grid per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from diffrep.config import Config
from diffrep.losses import pooled


class MixConfig(Config):
    """What is mixed, and the shape of what comes out."""

    taps: tuple[str, ...] = Field(min_length=1)  # dotted module paths; each returns a map
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field((0,), min_length=1)  # one pass each
    width: int = Field(64, ge=1)  # channels of the descriptor
    grid: int = Field(4, ge=1)  # its cells per side

    @field_validator("taps", "timesteps")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("one is named twice")
        return values


class Mix(nn.Module):
    """One projection per tap, shared by its timesteps, and one weight per timestep and tap; all weights start equal.

    channels: of each tap's map.
    """

    def __init__(self, config: MixConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Projection(c, config.width, len(config.timesteps)) for c in channels)
        self.logits = nn.Parameter(torch.zeros(len(config.timesteps), len(channels)))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (T, B, C, g, g) per tap -> (B, D, g, g)."""
        projected = [project(each) for project, each in zip(self.projections, maps, strict=True)]
        return torch.einsum("tl,ltbdhw->bdhw", self.weights, torch.stack(projected))

    @property
    def weights(self) -> Tensor:
        """(T, L), positive, of sum 1."""
        return self.logits.flatten().softmax(0).view_as(self.logits)

    def reset_parameters(self) -> None:
        """Equal weights; the projections reset themselves."""
        nn.init.zeros_(self.logits)


class Projection(nn.Module):
    """A bottleneck residual unit of 1x1 convolutions on a standardised map.

    What comes out has mean 0 and variance 1 in each image, so that no tap counts more for being large and the weight
    before it is its share of the descriptor.
    """

    mean: Tensor  # (T, 1, C, 1, 1), of the map over the training images
    std: Tensor

    def __init__(self, channels: int, width: int, num_timesteps: int) -> None:
        super().__init__()
        inner = max(width // 4, 1)
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.squeeze = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm = nn.GroupNorm(1, inner)
        self.expand = nn.Conv2d(inner, width, 1, bias=False)
        self.register_buffer("mean", torch.zeros(num_timesteps, 1, channels, 1, 1))
        self.register_buffer("std", torch.ones(num_timesteps, 1, channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(T, B, C, g, g) -> (T, B, D, g, g)."""
        x = ((maps - self.mean) / self.std).flatten(0, 1)  # (T B, C, g, g)
        y = self.shortcut(x) + self.expand(F.relu(self.norm(self.squeeze(x))))
        return F.layer_norm(y, y.shape[1:]).unflatten(0, maps.shape[:2])

    @torch.no_grad()
    def standardise_by(self, mean: Tensor, square: Tensor) -> None:
        """Mean and mean square per timestep and channel, (T, C) each."""
        deviation = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        self.mean.copy_(mean[:, None, :, None, None])
        self.std.copy_(deviation[:, None, :, None, None])

    def reset_parameters(self) -> None:
        """As if no image had been seen; the convolutions reset themselves."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)


def on_grid(feature: Tensor, grid: int) -> Tensor:
    """(B, C, h, w) -> (B, C, grid, grid): averaged where it is finer, bilinear where it is coarser."""
    if min(feature.shape[-2:]) >= grid:
        return pooled(feature, grid)
    return F.interpolate(feature, (grid, grid), mode="bilinear", align_corners=False)
