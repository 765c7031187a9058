"""Noise schedules: how much of an image is left at each timestep. Pure numbers, no networks.

Letters: T timesteps, B images; alpha_bar_t is the share of signal variance left at t (0 = cleanest).
Arrays are float64 and cast at use, as in guided-diffusion's `gaussian_diffusion.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.errors import UserError

BETA_START, BETA_END = 1e-4, 0.02  # Ho et al. 2020, section 4, for 1,000 timesteps
MAX_BETA = 0.999  # Nichol and Dhariwal 2021, section 3.2


def linear_betas(num_timesteps: int, start: float = BETA_START, end: float = BETA_END) -> np.ndarray:
    """(T,) float64, evenly spaced; for other T the ends are scaled by 1000 / T as in guided-diffusion."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * start, min(scale * end, MAX_BETA), num_timesteps, dtype=np.float64)


def scaled_linear_betas(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """(T,) float64, evenly spaced in the square root (Stable Diffusion)."""
    return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """(T,) float64; alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2) (Nichol and Dhariwal 2021, equation 17)."""

    def alpha_bar(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    pairs = ((i / num_timesteps, (i + 1) / num_timesteps) for i in range(num_timesteps))
    return np.array([min(1 - alpha_bar(after) / alpha_bar(before), MAX_BETA) for before, after in pairs])


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) over a list of timesteps.

    betas:    (T,) float64.
    timestep: (T,) int64, the ORIGINAL number of each step: what a network is told, also after respacing.
    """

    betas: np.ndarray
    timestep: np.ndarray

    @classmethod
    def from_betas(cls, betas: np.ndarray) -> NoiseSchedule:
        return cls(betas, np.arange(len(betas)))

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000) -> NoiseSchedule:
        """``linear`` or ``cosine``."""
        return cls.from_betas({"linear": linear_betas, "cosine": cosine_betas}[name](num_timesteps))

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    def __len__(self) -> int:
        return len(self.betas)

    def alpha_bar(self, step: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at ``step`` (B,) int64, shaped (B, 1, 1, ...) to multiply ``like``, in float32 or better."""
        kept = torch.promote_types(like.dtype, torch.float32)
        values = torch.from_numpy(self.alphas_cumprod).to(like.device)[step].to(kept)
        return values.view(-1, *[1] * (like.dim() - 1))

    def alpha_bar_at(self, step: int) -> float:
        """alpha_bar at one step; 1 before the first (step -1)."""
        return float(self.alphas_cumprod[step]) if step >= 0 else 1.0

    def sigma_at(self, step: int) -> float:
        """sqrt((1 - alpha_bar) / alpha_bar): the noise level in units of the image (EDM's sigma)."""
        alpha_bar = self.alpha_bar_at(step)
        return ((1 - alpha_bar) / alpha_bar) ** 0.5

    def step_at(self, alpha_bar: float) -> int:
        """The step whose noise level is nearest to ``alpha_bar``, by log sigma; beyond the ends it is the end."""
        here, wanted = np.clip(self.alphas_cumprod, 1e-12, 1 - 1e-12), min(max(alpha_bar, 1e-12), 1 - 1e-12)
        return int(np.abs(np.log((1 - here) / here) - math.log((1 - wanted) / wanted)).argmin())

    def posterior_weights(self, step: int) -> tuple[float, float]:
        """The weights of x_0 and x_t in the mean of q(x_(t-1) | x_t, x_0) (Ho et al. 2020, equation 7)."""
        beta, here, before = float(self.betas[step]), self.alpha_bar_at(step), self.alpha_bar_at(step - 1)
        return beta * before**0.5 / (1 - here), (1 - before) * (1 - beta) ** 0.5 / (1 - here)

    def log_variances(self, step: int) -> tuple[float, float]:
        """Log of the smallest and the largest sensible variance of one backward step.

        Smallest: the posterior's, whose first entry is 0 and is replaced by the second. Largest: beta, with the first
        entry replaced by the second posterior variance. Source: guided-diffusion `gaussian_diffusion.py`.
        """
        at = max(step, min(1, len(self) - 1))
        before, here = self.alpha_bar_at(at - 1), self.alpha_bar_at(at)
        small = float(self.betas[at]) * (1 - before) / (1 - here)
        log_small = math.log(small) if small > 0 else self.log_beta(step)  # a schedule of a single step has no other
        return log_small, self.log_beta(step) if step else log_small

    def log_beta(self, step: int) -> float:
        """The upper end of a learned variance."""
        return math.log(float(self.betas[step]))

    def noised(self, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, equation 4)."""
        alpha_bar = self.alpha_bar(step, x)
        return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise

    def velocity(self, x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, section 4)."""
        alpha_bar = self.alpha_bar(step, x)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x

    def respaced(self, spacing: str) -> NoiseSchedule:
        """Keep some timesteps: ``"N"``, ``"a,b,c"`` (per section) or ``"ddimN"`` (integer stride), as guided-diffusion.

        The kept steps keep their alpha_bar: new beta_i = 1 - alpha_bar_i / alpha_bar_(previous kept).
        """
        kept = kept_timesteps(len(self), spacing)
        alphas = self.alphas_cumprod[kept]
        return NoiseSchedule(1 - alphas / np.concatenate([[1.0], alphas[:-1]]), self.timestep[kept])


def alpha_bar_of_sigma(sigma: float) -> float:
    """sigma^2 = (1 - alpha_bar) / alpha_bar, so alpha_bar = 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma**2)


def alpha_bar_of_snr(snr: float) -> float:
    """SNR = alpha_bar / (1 - alpha_bar) = 1 / sigma^2, so alpha_bar = SNR / (1 + SNR)."""
    return snr / (1 + snr)


def kept_timesteps(total: int, spacing: str) -> np.ndarray:
    """The sorted positions that ``spacing`` keeps of ``total`` timesteps.

    Raises:
        UserError: no integer stride gives ``ddimN`` steps, or a section is asked for more steps than it has.
    """
    if spacing.startswith("ddim"):
        return _by_stride(total, _count(spacing.removeprefix("ddim"), spacing))
    counts = [_count(part, spacing) for part in spacing.split(",")]
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    kept, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if count > size:
            raise UserError(f"num_sampling_steps '{spacing}': a section of {size} timesteps cannot give {count} steps")
        stride = 1.0 if count <= 1 else (size - 1) / (count - 1)
        # Summed, not multiplied: the official code rounds a running sum, and halves may round the other way.
        kept += [start + round(offset) for offset in accumulate([stride] * (count - 1), initial=0.0)]
        start += size
    return np.array(sorted(set(kept)))


def _by_stride(total: int, wanted: int) -> np.ndarray:
    for stride in range(1, total):
        if len(range(0, total, stride)) == wanted:
            return np.arange(0, total, stride)
    raise UserError(f"num_sampling_steps 'ddim{wanted}': no integer stride over {total} timesteps gives {wanted} steps")


def _count(text: str, spacing: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit()) or int(text) < 1:
        raise UserError(f"num_sampling_steps '{spacing}' is not 'N', 'a,b,c' or 'ddimN' with whole numbers above 0")
    return int(text)


def schedule_from_diffusers(config: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule that a diffusers ``scheduler_config.json`` describes."""
    steps, name = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", BETA_START), config.get("beta_end", BETA_END)
    if config.get("rescale_betas_zero_snr"):
        raise UserError("the scheduler's rescale_betas_zero_snr is not supported: its last timestep has no signal left")
    if config.get("trained_betas") is not None:
        return NoiseSchedule.from_betas(np.asarray(config["trained_betas"], dtype=np.float64))
    if name == "linear":  # diffusers does not scale the ends with T
        return NoiseSchedule.from_betas(np.linspace(start, end, steps, dtype=np.float64))
    if name == "scaled_linear":
        return NoiseSchedule.from_betas(scaled_linear_betas(steps, start, end))
    if name == "squaredcos_cap_v2":
        return NoiseSchedule.from_betas(cosine_betas(steps))
    raise UserError(f"noise schedule '{name}' is not known; valid: linear, scaled_linear, squaredcos_cap_v2")
