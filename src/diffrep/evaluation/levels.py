"""Where and when to look: noise levels on one scale, and the taps of a network's blocks.

A level is a timestep of the teacher's own schedule. It may be asked for as timestep, sigma, SNR or alpha-bar; whatever
was asked for, the nearest timestep is measured and its own numbers are told:
SNR = alpha_bar / (1 - alpha_bar) and sigma = 1 / sqrt(SNR), the noise in units of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from diffrep.diffusion.schedules import NoiseSchedule, alpha_bar_of_sigma, alpha_bar_of_snr
from diffrep.frozen.diffusion import DiffusionTeacher

ALL = "all"  # in place of tap names: every block
# Contain every published choice from CIFAR-10 (0.05) over ImageNet (0.3) to matching (0.7).
LOWEST, HIGHEST, NUM_SIGMAS = 0.02, 1.0, 8


def log_spaced(count: int, low: float = LOWEST, high: float = HIGHEST) -> tuple[float, ...]:
    """``count`` values from ``low`` to ``high``, evenly spaced in the logarithm, to four digits."""
    return tuple(float(f"{sigma:.4g}") for sigma in np.geomspace(low, high, count))


@dataclass(frozen=True)
class Level:
    """One noise level, in every unit."""

    timestep: int
    alpha_bar: float
    snr: float
    sigma: float

    def told(self) -> dict[str, Any]:
        """As it stands in a row; six digits."""
        return {name: float(f"{v:.6g}") if name != "timestep" else v for name, v in asdict(self).items()}


def level_at(schedule: NoiseSchedule, timestep: int) -> Level:
    alpha_bar = min(max(schedule.alpha_bar_at(timestep), 1e-12), 1 - 1e-12)  # schedules that end in pure noise
    snr = alpha_bar / (1 - alpha_bar)
    return Level(timestep, alpha_bar, snr, snr**-0.5)


def nearest_level(schedule: NoiseSchedule, sigma: float) -> Level:
    return level_at(schedule, schedule.step_at(alpha_bar_of_sigma(sigma)))


def levels_of(
    schedule: NoiseSchedule,
    timesteps: Iterable[int] = (),
    sigmas: Iterable[float] = (),
    snrs: Iterable[float] = (),
    alpha_bars: Iterable[float] = (),
) -> list[Level]:
    """The levels that were asked for, in that order; those that fall on one timestep once. None asked for: 8 sigmas."""
    wanted = [*alpha_bars, *map(alpha_bar_of_sigma, sigmas), *map(alpha_bar_of_snr, snrs)]
    steps = [*timesteps, *map(schedule.step_at, wanted)]
    steps = steps or [schedule.step_at(alpha_bar_of_sigma(sigma)) for sigma in log_spaced(NUM_SIGMAS)]
    return [level_at(schedule, step) for step in dict.fromkeys(steps)]


UNET = ("conv_in", "down_blocks", "mid_block", "up_blocks")  # diffusers' names


def block_taps(teacher: DiffusionTeacher) -> tuple[str, ...]:
    """The taps at block level, in the order a pass reaches them.

    Of a U-Net of diffusers conv_in, down_blocks.i, mid_block and up_blocks.i; of any other network its top-level
    modules, with containers replaced by what they hold. What has no place axis (an embedding of t) is left out.
    """
    children = _children(teacher.module)
    if children.keys() >= {"down_blocks", "up_blocks"}:
        children = {name: child for name, child in children.items() if name in UNET}
    blocks = {block for name, child in children.items() for block in _opened(name, child)}
    return tuple(tap.name for tap in teacher.taps() if tap.name in blocks and len(tap.shape) > 1)


def _children(network: nn.Module) -> dict[str, nn.Module]:
    """The top-level modules; a network that is only wrapped around another has that one's."""
    children, prefix = dict(network.named_children()), ""
    while len(children) == 1 and len(dict((only := next(iter(children.values()))).named_children())) > 1:
        prefix = f"{prefix}{next(iter(children)).rpartition('.')[2]}."
        children = {f"{prefix}{name}": child for name, child in only.named_children()}
    return children


def _opened(name: str, module: nn.Module) -> list[str]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return [f"{name}.{inner}" for inner, _ in module.named_children()]
    return [name]


def taps_of(teacher: DiffusionTeacher, names: Sequence[str]) -> tuple[str, ...]:
    """``names``, or the block taps where they say ``all``; each was found in the teacher.

    Raises:
        UserError: an unknown tap.
    """
    found = block_taps(teacher) if tuple(names) == (ALL,) else tuple(dict.fromkeys(names))
    for name in found:
        teacher.tap(name)
    return found


def last_of(teacher: DiffusionTeacher, names: Sequence[str]) -> str:
    """The tap that a pass reaches last: the pass ends there."""
    return [tap.name for tap in teacher.taps() if tap.name in names][-1]
