"""Samplers: the walk from noise to an image. A sampler is a function of (denoiser, noise, schedule, rng).

The denoiser is any callable (x_t (B, C, H, W), timestep (B,) int64) -> the predicted noise epsilon (B, C, H, W), or
(B, 2C, H, W) where the network also predicts its variance: who guides, clips, conditions or counts calls wraps it; no
sampler knows a network. DDPM and DDIM follow guided-diffusion's `gaussian_diffusion.py`, whose step lists diffusers
cannot take; the solvers of higher order are diffusers' own schedulers.

Letters: x a noisy image, "clean" the predicted x_0, alpha_bar the share of signal variance, v a learned variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]


class Draws(Protocol):
    """Where a sampler's noise comes from (:class:`diffrep.randomness.PerImage`, :class:`diffrep.randomness.Rows`)."""

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal."""
        ...


Sampler = Callable[[Denoiser, Tensor, NoiseSchedule, Draws], Tensor]


# DDPM


def ddpm(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, rng: Draws) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with learned-range variance where the network has one.

    A network without it gets the large fixed variance, as the official code gives it.
    """
    x = noise
    for step in reversed(range(len(schedule))):
        mean, log_variance = posterior(denoiser(x, told(schedule, step, x)), x, schedule, step)
        x = mean + (log_variance / 2).exp() * rng.normal(*x.shape[1:]).to(x) if step else mean
    return x


def posterior(output: Tensor, x: Tensor, schedule: NoiseSchedule, step: int) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(x_(t-1) | x_t) (Ho et al. 2020, equation 7; Nichol and Dhariwal 2021, equation 15)."""
    epsilon, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
    clean = clean_from_noise(x, epsilon, schedule.alpha_bar_at(step))
    c1, c2 = schedule.posterior_weights(step)
    small, large = schedule.log_variances(step)
    if v.shape[1]:
        share = (v + 1) / 2  # not clamped
        return c1 * clean + c2 * x, share * schedule.log_beta(step) + (1 - share) * small
    return c1 * clean + c2 * x, torch.full_like(x, large)


# DDIM


def ddim(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, rng: Draws, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, equation 12; eta = 0 draws nothing, eta = 1 has the variance of the DDPM posterior."""
    x = noise
    for step in reversed(range(len(schedule))):
        epsilon = denoiser(x, told(schedule, step, x))[:, : x.shape[1]]
        here, before = schedule.alpha_bar_at(step), schedule.alpha_bar_at(step - 1)
        clean = clean_from_noise(x, epsilon, here)
        sigma = eta * ((1 - before) / (1 - here)) ** 0.5 * (1 - here / before) ** 0.5
        x = before**0.5 * clean + (1 - before - sigma**2) ** 0.5 * epsilon
        if eta and step:
            x = x + sigma * rng.normal(*x.shape[1:]).to(x)
    return x


def ddim_reverse(denoiser: Denoiser, images: Tensor, schedule: NoiseSchedule) -> Tensor:
    """From an image to the noise that DDIM would draw it from (Song et al. 2021, section 4.3); ends at pure noise."""
    x = images
    for step in range(len(schedule)):
        epsilon = denoiser(x, told(schedule, step, x))[:, : x.shape[1]]
        clean = clean_from_noise(x, epsilon, schedule.alpha_bar_at(step))
        after = schedule.alpha_bar_at(step + 1) if step + 1 < len(schedule) else 0.0
        x = after**0.5 * clean + (1 - after) ** 0.5 * epsilon
    return x


# Solvers of higher order, by diffusers

LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "heun": ("HeunDiscreteScheduler", {}),
}


def solver(name: str, num_sampling_steps: int) -> Sampler:
    """A sampler of :data:`LIBRARY`; it takes the whole noise schedule and spaces its own steps."""

    def walk(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, rng: Draws) -> Tensor:
        scheduler = _scheduler(name, num_sampling_steps, schedule)  # it keeps a history: one for each batch
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            timestep = torch.full((len(x),), int(t), device=x.device)
            epsilon = denoiser(scheduler.scale_model_input(x, t), timestep)[:, : x.shape[1]]
            x = scheduler.step(epsilon, t, x).prev_sample
        return x

    return walk


def _scheduler(name: str, num_sampling_steps: int, schedule: NoiseSchedule) -> Any:
    import diffusers

    kind, options = LIBRARY[name]
    made = getattr(diffusers, kind)(
        num_train_timesteps=len(schedule), trained_betas=schedule.betas.tolist(), prediction_type="epsilon", **options
    )
    if name == "heun":  # its own spacings name parts of timesteps, which a table of timesteps does not have
        made.set_timesteps(timesteps=_trailing(num_sampling_steps, len(schedule)))
    elif num_sampling_steps == len(schedule):  # one step more than the spaces between timesteps: it would name 0 twice
        raise UserError(f"num_sampling_steps '{num_sampling_steps}': sampler {name} takes at most {len(schedule) - 1}")
    else:
        made.set_timesteps(num_sampling_steps)
    return made


def _trailing(count: int, total: int) -> list[int]:
    """``count`` whole timesteps, evenly spaced, of which the first is the last of all."""
    return [round(total * (count - k) / count) - 1 for k in range(count)]


# By name

SAMPLERS = ("ddpm", "ddim", *LIBRARY)


def named_sampler(name: str, num_sampling_steps: str, eta: float = 0.0) -> Sampler:
    """A sampler of :data:`SAMPLERS` that takes the whole noise schedule and respaces it.

    Raises (when called): UserError: more steps than the schedule has, or a spacing the sampler does not know.
    """
    if name in LIBRARY:

        def by_library(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, rng: Draws) -> Tensor:
            return solver(name, whole_steps(name, num_sampling_steps, len(schedule)))(denoiser, noise, schedule, rng)

        return by_library

    def respaced(denoiser: Denoiser, noise: Tensor, schedule: NoiseSchedule, rng: Draws) -> Tensor:
        kept = schedule.respaced(num_sampling_steps)
        return ddpm(denoiser, noise, kept, rng) if name == "ddpm" else ddim(denoiser, noise, kept, rng, eta)

    return respaced


def whole_steps(name: str, num_sampling_steps: str, total: int) -> int:
    """The number of steps of a sampler that spaces them itself; refuses what is no number in 1..total."""
    if not num_sampling_steps.isascii() or not num_sampling_steps.isdigit() or not int(num_sampling_steps):
        raise UserError(f"num_sampling_steps '{num_sampling_steps}': sampler {name} takes one number of steps")
    if int(num_sampling_steps) > total:
        raise UserError(f"num_sampling_steps '{num_sampling_steps}': the noise schedule has {total} timesteps")
    return int(num_sampling_steps)


def asked_timesteps(sampler: Sampler, schedule: NoiseSchedule) -> list[int]:
    """The timestep of every call that ``sampler`` makes of its denoiser: what an image costs, found without one."""
    asked: list[int] = []

    def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
        asked.append(int(timestep[0]))
        return torch.zeros_like(x)

    sampler(denoiser, torch.zeros(1, 1, 1, 1), schedule, _Silence())
    return asked


class _Silence:
    def normal(self, *shape: int) -> Tensor:
        return torch.zeros(1, *shape)


# Words the walks are made of


def told(schedule: NoiseSchedule, step: int, x: Tensor) -> Tensor:
    """(B,) int64: the ORIGINAL number of ``step``, which is what a network was trained to be told."""
    return torch.full((len(x),), int(schedule.timestep[step]), device=x.device)


def clean_from_noise(x: Tensor, epsilon: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar)."""
    return (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5


def noise_from_clean(x: Tensor, clean: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """epsilon = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
    return (x - alpha_bar**0.5 * clean) / (1 - alpha_bar) ** 0.5


def noise_from_velocity(x: Tensor, velocity: Tensor, alpha_bar: Tensor) -> Tensor:
    """epsilon = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t (Salimans and Ho 2022)."""
    return alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * x


def clipped(denoiser: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """Hold the predicted clean image in [-1, 1] and derive epsilon again from it.

    Without that second half guided samples collapse: the sampler would go on in a direction that belongs to another
    clean image. ``schedule`` is the whole one, which timesteps number.
    """

    def held(x: Tensor, timestep: Tensor) -> Tensor:
        output, alpha_bar = denoiser(x, timestep), schedule.alpha_bar(timestep, x)
        clean = clean_from_noise(x, output[:, : x.shape[1]], alpha_bar).clamp(-1, 1)
        return torch.cat([noise_from_clean(x, clean, alpha_bar), output[:, x.shape[1] :]], 1)

    return held


def guided(
    conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor, channels: int | None = None
) -> Tensor:
    """uncond + s (cond - uncond) on the first ``channels`` channels, cond on the others (Ho and Salimans 2022).

    s = 1 is no guidance. Official DiT guides three of its four latent channels and no variance (``channels=3``).
    """
    both = unconditional + guidance_scale * (conditional - unconditional)
    return both if channels is None else torch.cat([both[:, :channels], conditional[:, channels:]], 1)
