"""The walk from noise to an image, where the answer is known: pytest tests/diffusion/test_sampling.py"""

import math

import pytest
import torch

from diffrep.diffusion.sampling import clean_from_noise, ddim, guided, noise_from_velocity
from diffrep.diffusion.schedules import NoiseSchedule


class SeenError(Exception):
    """Ends a walk at its second call: carries what the first step gave."""

    def __init__(self, x):
        super().__init__()
        self.x = x


def one_step(x, clean, schedule, step, clip):
    """What ``ddim`` makes of x_t in one step, when the network predicts ``clean``."""
    part = NoiseSchedule(schedule.betas[: step + 1], schedule.timestep[: step + 1])
    calls = []

    def denoiser(now, timestep):
        if calls:
            raise SeenError(now)
        calls.append(int(timestep[0]))
        alpha_bar = part.alpha_bar(torch.tensor([step]), now)
        return (now - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()

    try:
        found = ddim(denoiser, x, part, clip)
    except SeenError as seen:
        found = seen.x
    assert calls == [int(schedule.timestep[step])]  # the network is told the ORIGINAL number
    return found


def has_step(case):
    return "diffusion_kwargs" in case.meta and {"outputs/diffusion/ddim_sample/sample"} <= case.keys


@pytest.mark.golden(of=has_step)
def test_golden_ddim_step(golden_case):
    """One official step, with the network's part replaced by the official prediction of the clean image."""
    wanted = golden_case.meta["diffusion_kwargs"]
    spacing = wanted.get("timestep_respacing") or str(wanted["steps"])
    schedule = NoiseSchedule.named(wanted["noise_schedule"], wanted["steps"]).respaced(spacing)
    x, clean = (golden_case.get(f"outputs/diffusion/{k}") for k in ("q_sample", "p_mean_variance/pred_xstart"))
    expected = golden_case.get("outputs/diffusion/ddim_sample/sample")
    for k, step in enumerate(golden_case.get("inputs/spaced_t").tolist()):
        found = one_step(x[k : k + 1], clean[k : k + 1], schedule, step, clip=True)
        torch.testing.assert_close(found, expected[k : k + 1], rtol=1e-4, atol=1e-4)


def point_denoiser(schedule, target):
    """The exact noise prediction where all data are one image."""

    def denoiser(x, timestep):
        alpha_bar = schedule.alpha_bar(timestep, x)
        return (x - alpha_bar.sqrt() * target) / (1 - alpha_bar).sqrt()

    return denoiser


@pytest.mark.parametrize("spacing", ["1", "7", "ddim20", "10,5", "200"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_point_mass_is_found_exactly(spacing, clip):
    torch.manual_seed(0)
    schedule, target = NoiseSchedule.named("linear", 200), torch.rand(1, 3, 4, 4) * 2 - 1
    found = ddim(point_denoiser(schedule, target), torch.randn(5, 3, 4, 4), schedule.respaced(spacing), clip)
    torch.testing.assert_close(found, target.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_clipping_holds_the_prediction_and_derives_the_noise_again():
    schedule, target = NoiseSchedule.named("cosine", 100), torch.full((1, 1, 2, 2), 3.0)
    denoiser = point_denoiser(schedule, target)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(ddim(denoiser, x, schedule, clip=False).min()) == pytest.approx(3, abs=1e-2)
    clipped = ddim(denoiser, x, schedule, clip=True)
    torch.testing.assert_close(clipped, torch.ones_like(x), rtol=0, atol=1e-5)
    step = one_step(x, torch.full_like(x, 3.0), schedule, 50, clip=True)
    now, before = (schedule.alphas_cumprod[s] for s in (50, 49))
    epsilon = (x - math.sqrt(now)) / math.sqrt(1 - now)  # of the held prediction 1, not of 3
    torch.testing.assert_close(step, math.sqrt(before) + math.sqrt(1 - before) * epsilon, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_gaussian_comes_out_with_its_mean_and_deviation(name):
    """Data N(m, s^2): the exact denoiser is linear, and DDIM maps noise z to m + s z as the steps grow."""
    mean, deviation = 0.3, 0.2
    schedule = NoiseSchedule.named(name)

    def denoiser(x, timestep):
        alpha_bar = schedule.alpha_bar(timestep, x)
        variance = alpha_bar * deviation**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * mean) / variance  # E[epsilon | x_t]

    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    found = ddim(denoiser, noise, schedule, clip=False)
    assert float(found.mean()) == pytest.approx(mean, abs=0.01)
    assert float(found.std()) == pytest.approx(deviation, rel=0.05)
    assert float(torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1]) > 0.9999
    coarse = ddim(denoiser, noise, schedule.respaced("4"), clip=False)
    assert abs(float(coarse.std()) - deviation) > abs(float(found.std()) - deviation)


def test_every_step_is_shown_once_from_noisy_to_clean():
    schedule, shown = NoiseSchedule.named("linear").respaced("5"), []

    def denoiser(x, timestep):
        assert timestep.shape == (3,) and timestep.dtype == torch.int64
        shown.append(int(timestep[0]))
        return torch.zeros_like(x)

    ddim(denoiser, torch.randn(3, 1, 2, 2), schedule)
    assert shown == [999, 749, 500, 250, 0] == schedule.timestep.tolist()[::-1]


def test_prediction_round_trips():
    torch.manual_seed(0)
    schedule, step = NoiseSchedule.named("cosine"), torch.tensor([10, 500, 900])
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    noised, alpha_bar = schedule.noised(x, noise, step), schedule.alpha_bar(step, x)
    torch.testing.assert_close(clean_from_noise(noised, noise, alpha_bar), x, rtol=1e-3, atol=1e-4)
    velocity = schedule.velocity(x, noise, step)
    torch.testing.assert_close(noise_from_velocity(noised, velocity, alpha_bar), noise, rtol=1e-4, atol=1e-5)


def test_guidance_scale_one_is_off_and_zero_is_unconditional():
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(conditional, unconditional, 1), conditional)
    assert torch.equal(guided(conditional, unconditional, 0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 3), unconditional + 3 * (conditional - unconditional))
