"""Noise levels on one scale, and the taps of a network's blocks: pytest tests/evaluation/test_levels.py"""

import json

import numpy as np
import pytest
from torch import nn

from diffrep.diffusion.schedules import NoiseSchedule, alpha_bar_of_sigma, alpha_bar_of_snr, scaled_linear_betas
from diffrep.errors import UserError
from diffrep.evaluation.levels import block_taps, last_of, level_at, levels_of, log_spaced, nearest_level, taps_of
from diffrep.frozen.diffusion import DiffusionTeacher

LINEAR = NoiseSchedule.named("linear")
STABLE = NoiseSchedule.from_betas(scaled_linear_betas(1000, 0.00085, 0.012))

# Where published work read its features: timestep, alpha-bar, SNR, sigma.
PUBLISHED = [
    (LINEAR, 11, 0.9975, 397, 0.050),  # CIFAR-10 probe (DDAE)
    (LINEAR, 41, 0.979, 46, 0.147),
    (LINEAR, 51, 0.969, 31, 0.179),
    (LINEAR, 81, 0.928, 12.9, 0.278),
    (LINEAR, 90, 0.913, 10.5, 0.308),  # ImageNet probe
    (LINEAR, 101, 0.893, 8.4, 0.346),  # semantic matches (DIFT)
    (LINEAR, 121, 0.853, 5.8, 0.416),
    (STABLE, 51, 0.951, 19, 0.228),
    (STABLE, 199, 0.755, 3.1, 0.569),
    (STABLE, 261, 0.656, 1.9, 0.725),
]


@pytest.mark.parametrize(("schedule", "timestep", "alpha_bar", "snr", "sigma"), PUBLISHED)
def test_published_levels(schedule, timestep, alpha_bar, snr, sigma):
    level = level_at(schedule, timestep)
    assert level.alpha_bar == pytest.approx(alpha_bar, abs=6e-4)
    assert level.snr == pytest.approx(snr, rel=0.02)
    assert level.sigma == pytest.approx(sigma, abs=6e-4)
    assert min(log_spaced(8)) < sigma < max(log_spaced(8))
    assert abs(nearest_level(schedule, sigma).timestep - timestep) <= 1  # sigma has three digits


def test_an_edm_level_has_its_timestep():
    """Step 4 from the clean end of the 18-step rho-7 schedule, counted from 1: SNR 279, sigma 0.060."""
    steps = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigma = steps[::-1][3]
    assert sigma == pytest.approx(0.060, abs=5e-4)
    assert level_at(LINEAR, nearest_level(LINEAR, sigma).timestep).snr == pytest.approx(279, rel=0.05)


@pytest.mark.parametrize("schedule", [LINEAR, STABLE, NoiseSchedule.named("cosine"), NoiseSchedule.named("linear", 20)])
def test_every_unit_finds_every_timestep_again(schedule):
    steps = range(0, len(schedule), max(1, len(schedule) // 50))
    levels = [level_at(schedule, step) for step in steps]
    for name in ("sigma", "snr", "alpha_bar"):
        asked = {f"{name}s": [getattr(level, name) for level in levels]}
        assert [found.timestep for found in levels_of(schedule, **asked)] == list(steps), name


def test_units_agree():
    for sigma in (0.01, 0.3, 1.0, 40.0):
        alpha_bar = alpha_bar_of_sigma(sigma)
        assert ((1 - alpha_bar) / alpha_bar) ** 0.5 == pytest.approx(sigma)
        assert alpha_bar_of_snr(sigma**-2) == pytest.approx(alpha_bar)


def test_what_falls_on_one_timestep_is_measured_once_and_order_stays():
    found = levels_of(LINEAR, sigmas=(0.3, 0.05, 0.0501, 0.3))
    assert [level.timestep for level in found] == [nearest_level(LINEAR, s).timestep for s in (0.3, 0.05)]
    assert [level.timestep for level in levels_of(LINEAR, timesteps=(5, 2, 5))] == [5, 2]


def test_without_a_wish_there_are_eight_sigmas():
    found = levels_of(LINEAR)
    assert len(found) == 8 and found[0].sigma == pytest.approx(0.02, rel=0.1)
    assert found[-1].sigma == pytest.approx(1, rel=0.01)
    ratios = np.diff(np.log(log_spaced(8)))
    assert np.allclose(ratios, ratios[0], rtol=1e-3)


def test_beyond_the_ends_it_is_the_end_and_pure_noise_is_told_as_a_number():
    assert nearest_level(LINEAR, 1e-9).timestep == 0 and nearest_level(LINEAR, 1e9).timestep == 999
    betas = np.linspace(0, 1, 10)
    for step in (0, 9):
        json.dumps(level_at(NoiseSchedule.from_betas(betas), step).told(), allow_nan=False)


class Transformer(nn.Module):
    """Blocks in a list and in a sequence, an embedding of t without a place."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, 2)
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x, timestep):
        tokens = self.embed(x).flatten(2).mT + self.time(timestep[:, None].float())[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.tail(tokens)


def test_all_means_every_block_of_any_network(pipeline, tiny_denoiser):
    from diffrep.api import load_teacher

    unet = load_teacher(str(pipeline()))
    assert block_taps(unet) == (
        "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    )  # fmt: skip
    other = DiffusionTeacher(Transformer().eval(), "transformer", 8)
    assert block_taps(other) == ("embed", "blocks.0", "blocks.1", "blocks.2", "tail.0", "tail.1")
    tiny = DiffusionTeacher(tiny_denoiser().eval(), "tiny", 8)
    assert block_taps(tiny) == ("stem", "down.0", "down.1", "down.2", "mid", "up", "out")
    assert taps_of(tiny, ("all",)) == block_taps(tiny)


def test_named_taps_are_checked_and_the_last_is_the_one_a_pass_ends_at(tiny_denoiser):
    teacher = DiffusionTeacher(tiny_denoiser().eval(), "tiny", 8)
    assert taps_of(teacher, ("up", "stem", "up")) == ("up", "stem")
    assert last_of(teacher, ("up", "stem")) == "up"
    with pytest.raises(UserError, match="tap 'downs' does not exist in TinyDenoiser; did you mean 'down'"):
        taps_of(teacher, ("stem", "downs"))
    with pytest.raises(UserError, match="tap 'all'"):
        taps_of(teacher, ("all", "up"))


def test_all_of_a_wrapped_network_are_its_own_blocks():
    """EDM-style networks stand behind a wrapper, with their blocks in dictionaries."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1)})
            self.out = nn.Conv2d(4, 3, 1)

        def forward(self, x, timestep):
            return self.out(self.enc["b"](self.enc["a"](x)))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Inner()

        def forward(self, x, timestep):
            return self.net(x, timestep)

    assert block_taps(DiffusionTeacher(Wrapper(), "wrapped", 8)) == ("net.enc.a", "net.enc.b", "net.out")
