"""Noise schedules against the official tables and diffusers: pytest tests/diffusion/test_schedules.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep import _torchvision_compat
from diffrep.diffusion.schedules import NoiseSchedule, kept_timesteps, linear_betas, schedule_from_diffusers
from diffrep.errors import UserError


def of_case(meta):
    """The schedule that a golden case's metadata describes (guided-diffusion's or DiT's layout)."""
    wanted = meta.get("diffusion_kwargs", meta)
    steps = wanted.get("steps") if "diffusion_kwargs" in meta else wanted.get("diffusion_steps", 1000)
    spacing = wanted.get("timestep_respacing") or wanted.get("respacing") or str(steps)
    return NoiseSchedule.named(wanted.get("noise_schedule", "linear"), steps).respaced(spacing)


def described(case):
    return bool({"diffusion_kwargs", "diffusion_steps"} & case.meta.keys()) and case.outputs_named("timestep_map")


@pytest.mark.golden(of=described)
def test_golden_respaced_tables(golden_case):
    schedule = of_case(golden_case.meta)
    steps = range(len(schedule))
    found = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alphas_cumprod,
        "timestep_map": schedule.timestep,
        "alphas_cumprod_prev": np.array([schedule.alpha_bar_at(k - 1) for k in steps]),
        "posterior_mean_coef1": np.array([schedule.posterior_weights(k)[0] for k in steps]),
        "posterior_mean_coef2": np.array([schedule.posterior_weights(k)[1] for k in steps]),
        "posterior_log_variance_clipped": np.array([schedule.log_variances(k)[0] for k in steps]),
    }
    # Entry 0 of the variance is 0, which has no log.
    found["posterior_variance"] = np.concatenate([[0.0], np.exp(found["posterior_log_variance_clipped"][1:])])
    named = {
        key.rsplit("/", 1)[1]: golden_case.get(key).numpy() for name in found for key in golden_case.outputs_named(name)
    }
    assert {"betas", "alphas_cumprod", "timestep_map"} <= named.keys()
    for name, expected in named.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.golden(of=described)
def test_golden_large_variances_are_the_betas(golden_case):
    """FIXED_LARGE: the betas with the first replaced by the second posterior variance; a learned one ends at beta."""
    schedule = of_case(golden_case.meta)
    betas = np.log(golden_case.get(golden_case.outputs_named("betas")[0]).numpy())
    large = [schedule.log_variances(k)[1] for k in range(len(schedule))]
    np.testing.assert_allclose(large[1:], betas[1:], rtol=1e-12)
    assert large[0] == schedule.log_variances(1)[0]
    np.testing.assert_allclose([schedule.log_beta(k) for k in range(len(schedule))], betas, rtol=1e-12)


@pytest.mark.golden(of=lambda case: "timestep_map" in case.meta and "respacing" in case.meta)
def test_golden_timesteps_of_a_respacing(golden_case):
    total = golden_case.meta.get("diffusion_steps", 1000)
    assert kept_timesteps(total, golden_case.meta["respacing"]).tolist() == golden_case.meta["timestep_map"]


@pytest.mark.golden(of=lambda case: case.outputs_named("q_sample"))
def test_golden_q_sample(golden_case):
    names = ("x", "noise", "spaced_t") if "diffusion_kwargs" in golden_case.meta else ("x", "step_noise", "ti")
    x, noise, step = (golden_case.get(f"inputs/{name}") for name in names)
    (key,) = golden_case.outputs_named("q_sample")
    found = of_case(golden_case.meta).noised(x, noise, step)
    torch.testing.assert_close(found, golden_case.get(key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_signal_falls_from_almost_all_to_almost_nothing(name, steps):
    alpha_bar = NoiseSchedule.named(name, steps).alphas_cumprod
    assert alpha_bar.dtype == np.float64 and len(alpha_bar) == steps
    assert (np.diff(alpha_bar) < 0).all() and alpha_bar[0] > 0.85 and 0 < alpha_bar[-1] < 0.01


def test_linear_betas_of_the_paper():
    betas = linear_betas(1000)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    np.testing.assert_allclose(np.cumprod(1 - betas)[-1], 4.0358e-5, rtol=1e-4)  # sqrt = 0.00635, Ho et al. 2020


def test_cosine_of_the_paper():
    """Nichol and Dhariwal's closed form, wherever beta is not held at 0.999."""
    t = (np.arange(1000) + 1) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(NoiseSchedule.named("cosine").alphas_cumprod[:-1], f[:-1], rtol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "linear", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_a_diffusers_scheduler_is_read_as_diffusers_means_it(settings):
    _torchvision_compat.install()
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**settings)
    ours = schedule_from_diffusers(dict(theirs.config))
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-8)  # float32
    x, noise, step = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        ours.noised(x, noise, step), theirs.add_noise(x, noise, step).float(), rtol=1e-4, atol=1e-5
    )
    velocity = theirs.get_velocity(x, noise, step).float()
    torch.testing.assert_close(ours.velocity(x, noise, step), velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}])
def test_a_scheduler_that_would_be_misread_is_refused(config):
    with pytest.raises(UserError):
        schedule_from_diffusers(config)


# Below 25 timesteps the scaled linear schedule leaves so little signal that 1 - beta is 0 in float64.
@given(st.integers(25, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_respacing_keeps_alpha_bar_and_original_numbers(total, data):
    count = data.draw(st.integers(1, total))
    schedule = NoiseSchedule.named("linear", total)
    kept = schedule.respaced(str(count))
    assert len(kept) == count and kept.timestep[0] == 0 and (count == 1 or kept.timestep[-1] == total - 1)
    assert (np.diff(kept.timestep) > 0).all()
    np.testing.assert_allclose(kept.alphas_cumprod, schedule.alphas_cumprod[kept.timestep], rtol=1e-9)
    again = kept.respaced("1")
    assert again.timestep.tolist() == [0]


def test_all_timesteps_are_the_base_process():
    whole = NoiseSchedule.named("linear")
    kept = whole.respaced("1000")
    assert kept.timestep.tolist() == list(range(1000))
    np.testing.assert_allclose(kept.betas, whole.betas, rtol=1e-10)
    np.testing.assert_allclose(kept.alphas_cumprod, whole.alphas_cumprod, rtol=1e-12)


def test_alpha_bar_is_as_exact_as_what_it_multiplies():
    schedule, step = NoiseSchedule.named("linear"), torch.tensor([0, 999])
    for dtype, kept in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        found = schedule.alpha_bar(step, torch.zeros(2, 3, 4, 4, dtype=dtype))
        assert found.shape == (2, 1, 1, 1) and found.dtype == kept
        expected = torch.from_numpy(schedule.alphas_cumprod)[step]
        assert torch.equal(found.flatten(), expected.to(kept))


def test_sections_and_strides():
    assert kept_timesteps(300, "2,3,1").tolist() == [0, 99, 100, 150, 199, 200]  # both ends of each section
    assert kept_timesteps(1000, "ddim50").tolist() == list(range(0, 1000, 20))
    assert kept_timesteps(1000, "ddim30").tolist() == list(range(0, 1000, 34))
    assert kept_timesteps(1000, "100").tolist()[:5] == [0, 10, 20, 30, 40]
    assert kept_timesteps(1000, "100").tolist()[-3:] == [979, 989, 999]
    assert kept_timesteps(1000, "250").tolist()[-3:] == [991, 995, 999]
    assert kept_timesteps(1000, "50").tolist()[:4] == [0, 20, 41, 61]
    assert kept_timesteps(10, "ddim4").tolist() == [0, 3, 6, 9]
    assert NoiseSchedule.named("linear", 40).respaced("ddim10").respaced("ddim5").timestep.tolist() == [
        0,
        8,
        16,
        24,
        32,
    ]


@pytest.mark.parametrize(
    "spacing", ["0", "-3", "a", "", "5,", "ddim0", "ddimx", "1.5", "101", "60,2", "ddim99", "ddim40"]
)
def test_a_spacing_that_cannot_be_had_is_refused(spacing):
    with pytest.raises(UserError, match="num_sampling_steps"):
        kept_timesteps(100, spacing)


@given(st.integers(0, 999), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_velocity_and_noise_are_two_spellings(step, seed):
    """x_0 and epsilon come back from (x_t, v)."""
    rng = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 3, 4, 4, generator=rng), torch.randn(2, 3, 4, 4, generator=rng)
    schedule, at = NoiseSchedule.named("cosine"), torch.tensor([step, step])
    noised, velocity = schedule.noised(x, noise, at), schedule.velocity(x, noise, at)
    a = schedule.alpha_bar(at, x)
    torch.testing.assert_close(a.sqrt() * noised - (1 - a).sqrt() * velocity, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.sqrt() * velocity + (1 - a).sqrt() * noised, noise, rtol=1e-4, atol=1e-5)


def test_each_image_has_its_own_timestep():
    schedule = NoiseSchedule.named("linear")
    x, noise = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    found = schedule.noised(x, noise, torch.tensor([0, 999]))
    assert float(found[0].min()) == pytest.approx(0.99995, abs=1e-5) and float(found[1].max()) < 0.007
