"""Samplers: the walk from noise to an image. A sampler is a function of (denoiser, noise, schedule, ...).

The denoiser is any callable (x_t (B, C, H, W), timestep (B,) int64) -> predicted noise, same shape: who guides,
conditions or counts calls wraps it; no sampler knows a network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffrep.diffusion.schedules import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]


def ddim(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, clip: bool = True) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, equation 12). noise (B, C, H, W) -> images in the schedule's range.

    With ``clip`` the predicted clean image is held in [-1, 1] and the noise is derived again from it; without that
    second half guided samples collapse.
    """
    x = noise
    for step in reversed(range(len(schedule))):
        here = torch.full((len(x),), step, device=x.device)
        timestep = torch.full((len(x),), int(schedule.timestep[step]), device=x.device)
        alpha_bar = schedule.alpha_bar(here, x)
        clean = clean_from_noise(x, denoiser(x, timestep), alpha_bar)
        clean = clean.clamp(-1, 1) if clip else clean
        epsilon = (x - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        before = schedule.alpha_bar(here - 1, x) if step else torch.ones_like(alpha_bar)
        x = before.sqrt() * clean + (1 - before).sqrt() * epsilon
    return x


def clean_from_noise(x: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar)."""
    return (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()


def noise_from_velocity(x: Tensor, velocity: Tensor, alpha_bar: Tensor) -> Tensor:
    """epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t (Salimans and Ho 2022)."""
    return alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * x


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """uncond + s (cond - uncond) (Ho and Salimans 2022); s = 1 is no guidance."""
    return unconditional + guidance_scale * (conditional - unconditional)
