"""The walk from noise to an image, where the answer is known: pytest tests/diffusion/test_sampling.py"""

import math
from itertools import pairwise

import pytest
import torch
from walks import Silent, drawing, one_step, until

from diffrep.diffusion.sampling import (
    LIBRARY,
    SAMPLERS,
    asked_timesteps,
    clean_from_noise,
    clipped,
    ddim,
    ddim_reverse,
    ddpm,
    guided,
    named_sampler,
    noise_from_clean,
    noise_from_velocity,
)
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.randomness import stream

# Whole walks with a known end


def point_denoiser(schedule, target):
    """The exact noise prediction where all data are one image."""
    return lambda x, timestep: noise_from_clean(x, target, schedule.alpha_bar(timestep, x))


@pytest.mark.parametrize("spacing", ["1", "7", "ddim20", "10,5", "200"])
@pytest.mark.parametrize("clip", [True, False])
def test_a_point_mass_is_found_exactly(spacing, clip):
    schedule, target = NoiseSchedule.named("linear", 200), torch.rand(1, 3, 4, 4) * 2 - 1
    denoiser = point_denoiser(schedule, target)
    held = clipped(denoiser, schedule) if clip else denoiser
    found = ddim(held, torch.randn(5, 3, 4, 4), schedule.respaced(spacing), Silent())
    torch.testing.assert_close(found, target.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", ["1", "2", "7", "40"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_on_a_point_mass(name, steps):
    schedule, target = NoiseSchedule.named("linear"), torch.rand(1, 3, 2, 2) * 2 - 1
    rng = drawing(4)
    found = named_sampler(name, steps)(point_denoiser(schedule, target), rng.normal(3, 2, 2), schedule, rng)
    torch.testing.assert_close(found, target.expand(4, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_ddim_ends_on_a_point_mass_too(eta):
    schedule, target, rng = NoiseSchedule.named("linear"), torch.rand(1, 3, 2, 2) * 2 - 1, drawing(4)
    walk = named_sampler("ddim", "25", eta)
    found = walk(point_denoiser(schedule, target), rng.normal(3, 2, 2), schedule, rng)
    torch.testing.assert_close(found, target.expand(4, -1, -1, -1), rtol=0, atol=1e-4)


def test_deterministic_ddim_stays_on_its_line():
    """sqrt(alpha_bar_k) mu + sqrt(1 - alpha_bar_k) epsilon with one epsilon, at every step."""
    schedule = NoiseSchedule.named("linear").respaced("12")
    target, noise = torch.rand(1, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    whole, seen = NoiseSchedule.named("linear"), []

    def denoiser(x, timestep):
        bar = whole.alpha_bar(timestep, x)
        seen.append(float((x - bar.sqrt() * target - (1 - bar).sqrt() * noise).abs().max()))
        return noise_from_clean(x, target, bar)

    start = schedule.alpha_bar_at(11) ** 0.5 * target + (1 - schedule.alpha_bar_at(11)) ** 0.5 * noise
    found = ddim(denoiser, start, schedule, Silent())
    assert len(seen) == 12 and max(seen) < 1e-10
    torch.testing.assert_close(found, target.expand(2, -1, -1, -1), rtol=0, atol=1e-10)


def test_reverse_and_forward_meet():
    """To noise and back: the denoiser is that of N(0.3, 0.5^2), the steps are fine."""
    schedule = NoiseSchedule.named("linear")
    images = torch.randn(50, 1, 1, 1, dtype=torch.float64) * 0.5 + 0.3
    noise = ddim_reverse(gaussian_denoiser(schedule), images, schedule)
    torch.testing.assert_close(noise, (images - 0.3) / 0.5, rtol=0.03, atol=0.02)
    torch.testing.assert_close(ddim(gaussian_denoiser(schedule), noise, schedule, Silent()), images, rtol=0, atol=0.02)


def gaussian_denoiser(schedule, mean=0.3, deviation=0.5):
    """E[epsilon | x_t] of data N(mean, deviation^2)."""

    def denoiser(x, timestep):
        bar = schedule.alpha_bar(timestep, x)
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * deviation**2 + 1 - bar)

    return denoiser


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_gaussian_comes_out_with_its_mean_and_deviation(name):
    """Data N(m, s^2): the exact denoiser is linear, and DDIM maps noise z to m + s z as the steps grow."""
    mean, deviation = 0.3, 0.2
    schedule = NoiseSchedule.named(name)
    denoiser = gaussian_denoiser(schedule, mean, deviation)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    found = ddim(denoiser, noise, schedule, Silent())
    assert float(found.mean()) == pytest.approx(mean, abs=0.01)
    assert float(found.std()) == pytest.approx(deviation, rel=0.05)
    assert float(torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1]) > 0.9999
    coarse = ddim(denoiser, noise, schedule.respaced("4"), Silent())
    assert abs(float(coarse.std()) - deviation) > abs(float(found.std()) - deviation)


def test_ancestral_sampling_draws_from_the_data():
    """Data N(m, s^2) again: right mean and spread, but another image of the same start with other draws."""
    schedule, rng = NoiseSchedule.named("linear"), stream(0, "test")

    class Fresh:
        def normal(self, *shape):
            return torch.randn(4000, *shape, generator=rng)

    noise = Fresh().normal(1, 1, 1)
    found = ddpm(gaussian_denoiser(schedule), noise, schedule.respaced("250"), Fresh())
    assert float(found.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(found.std()) == pytest.approx(0.5, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1])) < 0.1


# How fast the error falls


def middle_error(name, steps):
    """Root mean square distance from the exact flow half-way of a walk: four Gaussians, four starts, in float64.

    Half-way, because the last step goes to no noise at all, which is no step of a small length for any solver.
    """
    total = 1024 if name == "heun" else 1025  # so that half-way is one of the timesteps of all these walks
    schedule, half = NoiseSchedule.named("linear", total), total // 2 - (name == "heun")
    deviation, mean = torch.tensor([0.25, 0.5, 1, 2], dtype=torch.float64).view(4, 1, 1, 1), 0.3
    noise, seen = torch.tensor([-1.5, 1, 0.5, 1.5], dtype=torch.float64).view(4, 1, 1, 1), []

    def exact(step):
        """Mean and deviation of x_t."""
        bar = schedule.alpha_bar_at(step)
        return bar**0.5 * mean, (bar * deviation**2 + 1 - bar) ** 0.5

    def denoiser(x, timestep):
        if int(timestep[0]) == half:
            seen.append(x)
        return gaussian_denoiser(schedule, mean, deviation)(x, timestep)

    # DDIM keeps both ends, the solvers one: the same length of a step for all.
    named_sampler(name, str(steps + (name == "ddim")))(denoiser, noise, schedule, Silent())
    (first, spread), (m, s) = exact(total - 1), exact(half)
    return float((seen[-1] - m - s * (noise - first) / spread).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "low", "high"), [("ddim", 0.9, 1.1), ("dpmsolver++", 1.8, 2.2), ("unipc", 1.8, 3.4), ("heun", 1.8, 2.4)]
)
def test_the_order_of_a_sampler(name, low, high):
    """Slope of log error over log steps, 16 to 128. UniPC's corrector gives its order 2 about one more."""
    errors = [middle_error(name, steps) for steps in (16, 32, 64, 128)]
    for more, fewer in pairwise(errors):
        assert low < math.log2(more / fewer) < high
    assert errors[-1] < 0.003


@pytest.mark.parametrize("name", list(LIBRARY))
def test_a_solver_needs_fewer_steps_for_a_whole_walk(name):
    schedule, noise = NoiseSchedule.named("linear"), torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    bar = schedule.alpha_bar_at(999)
    exact = 0.3 + 0.5 * (noise - bar**0.5 * 0.3) / (bar * 0.25 + 1 - bar) ** 0.5

    def error(sampler, steps):
        walk = named_sampler(sampler, steps)
        return float((walk(gaussian_denoiser(schedule), noise, schedule, Silent()) - exact).abs().max())

    calls = len(asked_timesteps(named_sampler(name, "20"), schedule))
    assert error(name, "20") < 0.6 * error("ddim", str(calls)) < 0.1  # for the same number of calls
    assert error(name, "100") < error(name, "10") / 10


# Clipping


def test_clipping_holds_the_prediction_and_derives_the_noise_again():
    schedule, target = NoiseSchedule.named("cosine", 100), torch.full((1, 1, 2, 2), 3.0)
    denoiser = point_denoiser(schedule, target)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(ddim(denoiser, x, schedule, Silent()).min()) == pytest.approx(3, abs=1e-2)
    found = ddim(clipped(denoiser, schedule), x, schedule, Silent())
    torch.testing.assert_close(found, torch.ones_like(x), rtol=0, atol=1e-5)
    part = until(schedule, 50)
    output = denoiser(x, torch.tensor([50, 50]))
    step = one_step(lambda d: ddim(clipped(d, schedule), x, part, Silent()), output, part, 50)
    now, before = (schedule.alphas_cumprod[s] for s in (50, 49))
    epsilon = (x - math.sqrt(now)) / math.sqrt(1 - now)  # of the held prediction 1, not of 3
    torch.testing.assert_close(step, math.sqrt(before) + math.sqrt(1 - before) * epsilon, rtol=1e-4, atol=1e-4)


def guided_mixture(schedule, templates, labels, scale, deviation=0.3):
    """The exact denoiser of one Gaussian per class, guided against that of their mixture: x is (B, 1, 1, D)."""

    def clean(x, bar, template):
        return template + bar.sqrt() * deviation**2 / (bar * deviation**2 + 1 - bar) * (x - bar.sqrt() * template)

    def denoiser(x, timestep):
        bar = schedule.alpha_bar(timestep, x)
        away = (x - bar.sqrt() * templates).square().sum(3) / (2 * (bar * deviation**2 + 1 - bar)).squeeze(3)
        share = (-away).softmax(2).unsqueeze(3)  # (B, 1, K, 1): how likely x_t comes from each class
        null = (share * clean(x, bar, templates)).sum(2, keepdim=True)
        own = clean(x, bar, templates[labels].view(len(x), 1, 1, -1))
        return guided(noise_from_clean(x, own, bar), noise_from_clean(x, null, bar), scale)

    return denoiser


def half_clipped(denoiser, x, schedule, steps):
    """What not to do: hold the clean image, and go on in the direction that belonged to another one."""
    kept = schedule.respaced(steps)
    for step in reversed(range(len(kept))):
        here, before = kept.alpha_bar_at(step), kept.alpha_bar_at(step - 1)
        epsilon = denoiser(x, torch.full((len(x),), int(kept.timestep[step])))
        x = before**0.5 * clean_from_noise(x, epsilon, here).clamp(-1, 1) + (1 - before) ** 0.5 * epsilon
    return x


@pytest.mark.parametrize("scale", [4.0, 15.0])
@pytest.mark.parametrize("steps", ["20", "50"])
def test_strong_guidance_does_not_collapse(scale, steps):
    """Every image stays in range and of its class, where clipping without its second half loses them all."""
    rng = stream(0, "test")
    templates = 0.7 * torch.randint(0, 2, (4, 64), generator=rng).float().mul(2).sub(1)
    labels, noise = torch.arange(100) % 4, torch.randn(100, 1, 1, 64, generator=rng)
    schedule = NoiseSchedule.named("linear")
    denoiser = guided_mixture(schedule, templates, labels, scale)

    def of_their_class(images):
        return float(((images - templates).square().sum(3).argmin(2).squeeze(1) == labels).float().mean())

    held = named_sampler("ddim", steps)(clipped(denoiser, schedule), noise, schedule, Silent())
    assert of_their_class(held) == 1 and float(held.abs().max()) < 1 + 1e-4
    assert of_their_class(half_clipped(denoiser, noise, schedule, steps)) < 0.5
    free = named_sampler("ddim", steps)(denoiser, noise, schedule, Silent())
    assert of_their_class(free) == 1 and float(free.abs().max()) > 1.3


# What a walk asks for


def test_every_step_is_shown_once_from_noisy_to_clean():
    schedule, shown = NoiseSchedule.named("linear").respaced("5"), []

    def denoiser(x, timestep):
        assert timestep.shape == (3,) and timestep.dtype == torch.int64
        shown.append(int(timestep[0]))
        return torch.zeros_like(x)

    ddim(denoiser, torch.randn(3, 1, 2, 2), schedule, Silent())
    assert shown == [999, 749, 500, 250, 0] == schedule.timestep.tolist()[::-1]


WALKS = [(name, steps) for name in SAMPLERS for steps in ("1", "9", "61")]
WALKS += [(name, steps) for name in ("ddpm", "ddim") for steps in ("ddim20", "6,3")]


@pytest.mark.parametrize(("name", "steps"), WALKS)
def test_the_asked_timesteps_are_the_calls_really_made(name, steps):
    schedule, walk, made = NoiseSchedule.named("linear", 300), named_sampler(name, steps), []

    def denoiser(x, timestep):
        assert timestep.shape == (2,) and (timestep == timestep[0]).all()
        made.append(int(timestep[0]))
        return 0.1 * x

    rng = drawing(2)
    walk(denoiser, rng.normal(3, 2, 2), schedule, rng)
    assert asked_timesteps(walk, schedule) == made
    assert made == sorted(made, reverse=True) and 0 <= made[-1] <= made[0] < 300
    if steps.isdigit():
        assert len(set(made)) == int(steps) and len(made) == (2 * int(steps) - 1 if name == "heun" else int(steps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_nothing_from_one_batch_to_the_next(name):
    schedule, walk = NoiseSchedule.named("linear"), named_sampler(name, "6")
    first, second = (
        walk(gaussian_denoiser(schedule), drawing(3).normal(1, 2, 2), schedule, drawing(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", ["0", "1001", "ddim400", "600,500", "", "2.5", "-1"])
def test_a_spacing_that_the_schedule_cannot_give_is_refused(name, steps):
    with pytest.raises(UserError, match=f"num_sampling_steps '{steps}'"):
        asked_timesteps(named_sampler(name, steps), NoiseSchedule.named("linear"))


@pytest.mark.parametrize("name", list(LIBRARY))
@pytest.mark.parametrize("steps", ["0", "1001", "ddim20", "10,10", "", "2.5", "-1", "\u00b2"])
def test_a_solver_takes_one_number(name, steps):
    with pytest.raises(UserError, match="num_sampling_steps"):
        asked_timesteps(named_sampler(name, steps), NoiseSchedule.named("linear"))


def test_as_many_steps_as_timesteps():
    """Two solvers put one space more between their steps, and would divide by a step of length 0."""
    schedule = NoiseSchedule.named("linear", 100)
    for name in ("dpmsolver++", "unipc"):
        with pytest.raises(UserError, match="takes at most 99"):
            asked_timesteps(named_sampler(name, "100"), schedule)
        assert len(asked_timesteps(named_sampler(name, "99"), schedule)) == 99
    for name in ("ddpm", "ddim", "heun"):
        assert sorted(set(asked_timesteps(named_sampler(name, "100"), schedule))) == list(range(100))


# Words


def test_prediction_round_trips():
    schedule, step = NoiseSchedule.named("cosine"), torch.tensor([10, 500, 900])
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    noised, alpha_bar = schedule.noised(x, noise, step), schedule.alpha_bar(step, x)
    torch.testing.assert_close(clean_from_noise(noised, noise, alpha_bar), x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(noise_from_clean(noised, x, alpha_bar), noise, rtol=1e-3, atol=1e-4)
    velocity = schedule.velocity(x, noise, step)
    torch.testing.assert_close(noise_from_velocity(noised, velocity, alpha_bar), noise, rtol=1e-4, atol=1e-5)


def test_guidance_scale_one_is_off_and_zero_is_unconditional():
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(conditional, unconditional, 1), conditional)
    assert torch.equal(guided(conditional, unconditional, 0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 3), unconditional + 3 * (conditional - unconditional))


def test_the_channels_that_are_not_guided_stay_conditional():
    conditional, unconditional = torch.randn(2, 8, 2, 2), torch.randn(2, 8, 2, 2)
    for scale in (0.0, 2.5):
        found = guided(conditional, unconditional, scale, channels=3)
        assert torch.equal(found[:, 3:], conditional[:, 3:])
        assert torch.equal(found[:, :3], guided(conditional[:, :3], unconditional[:, :3], scale))
    each = guided(conditional, unconditional, torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))
    assert torch.equal(each[0], unconditional[0])  # a scale of its own for every image
    torch.testing.assert_close(each[1], 2 * conditional[1] - unconditional[1])
