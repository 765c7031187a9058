"""One step of a walk, cut out; draws that were made before; the official tables."""

import torch

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.randomness import PerImage, stream


class Silent:
    """For walks that may not draw."""

    def normal(self, *shape):
        raise AssertionError("this walk draws nothing")


class Given(list):
    """Draws that were made before, one block after the other."""

    def normal(self, *shape):
        drawn = self.pop(0)
        assert drawn.shape[1:] == shape
        return drawn


def drawing(count=1):
    return PerImage([stream(k, "test") for k in range(count)])


class SeenError(Exception):
    """Ends a walk at its second call: carries what the first step gave."""

    def __init__(self, x):
        super().__init__()
        self.x = x


def one_step(walk, output, part, told):
    """What ``walk(denoiser)`` makes of its input in one step over ``part``, where the network returns ``output``."""
    calls = []

    def denoiser(now, timestep):
        if calls:
            raise SeenError(now)
        calls.append(int(timestep[0]))
        return output

    try:
        found = walk(denoiser)
    except SeenError as seen:
        found = seen.x
    assert calls == [told]  # the network is told the ORIGINAL number
    return found


def until(schedule, step):
    """The steps of ``schedule`` up to ``step``: a walk over them begins there."""
    return NoiseSchedule(schedule.betas[: step + 1], schedule.timestep[: step + 1])


def since(schedule, step):
    """The steps from ``step`` on, where a reverse walk then begins."""
    first = 1 - schedule.alphas_cumprod[step : step + 1]
    return NoiseSchedule(torch.tensor([*first, *schedule.betas[step + 1 :]]).numpy(), schedule.timestep[step:])


def official_tables(schedule):
    """log of ptilde (clipped), of beta and of FIXED_LARGE, computed here from the betas alone."""
    betas = torch.from_numpy(schedule.betas)
    bars = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    small = betas * (1 - before) / (1 - bars)
    small = torch.cat([small[1:2], small[1:]])
    return small.log(), betas.log(), torch.cat([small[1:2], betas[1:]]).log()


def off(found, expected):
    return float((found - expected).abs().max() / expected.double().square().mean().sqrt())
