"""Every sampler's single steps against the official code: pytest tests/diffusion/test_official_steps.py

The network's part is rebuilt from what the file says it predicted.
"""

import functools

import pytest
import torch
from walks import Given, Silent, off, official_tables, one_step, since, until

from diffrep.diffusion.sampling import clean_from_noise, clipped, ddim, ddim_reverse, ddpm, guided, posterior
from diffrep.diffusion.schedules import NoiseSchedule


def of_case(meta):
    """(the whole schedule, the respaced one) of a golden case in guided-diffusion's or DiT's layout."""
    wanted = meta.get("diffusion_kwargs", meta)
    steps = wanted["steps"] if "diffusion_kwargs" in meta else meta.get("diffusion_steps", 1000)
    whole = NoiseSchedule.named(wanted.get("noise_schedule", "linear"), steps)
    return whole, whole.respaced(wanted.get("timestep_respacing") or wanted.get("respacing") or str(steps))


def rebuilt(schedule, step, x, clean, log_variance, learned):
    """epsilon, and v where the network has one, in float64."""
    bar = float(schedule.alphas_cumprod[step])
    epsilon = (x.double() / bar**0.5 - clean.double()) / (1 / bar - 1) ** 0.5
    small, beta, _ = official_tables(schedule)
    v = 2 * (log_variance.double() - small[step]) / (beta[step] - small[step]) - 1
    return torch.cat([epsilon, v], 1) if learned else epsilon


def is_dit(case):
    return "hidden_size" in case.meta and {"inputs/ti", "outputs/pmv_mean"} <= case.keys


def dit_steps(case):
    """One tuple per image of a DiT case: position, step, x, the network's output."""
    _, schedule = of_case(case.meta)
    x, clean, log_variance = (case.get(k) for k in ("inputs/x", "outputs/pmv_pred_xstart", "outputs/pmv_log_variance"))
    for k, step in enumerate(case.get("inputs/ti").tolist()):
        row = slice(k, k + 1)
        yield (
            row,
            step,
            x[row],
            rebuilt(schedule, step, x[row], clean[row], log_variance[row], case.meta["learn_sigma"]),
        )


@pytest.mark.golden(of=is_dit)
def test_golden_posterior_and_ancestral_step(golden_case):
    _, schedule = of_case(golden_case.meta)
    names = ("pmv_mean", "pmv_log_variance", "pmv_variance", "p_sample")
    for row, step, x, output in dit_steps(golden_case):
        expected = {name: golden_case.get(f"outputs/{name}")[row] for name in names}
        mean, log_variance = posterior(output, x.double(), schedule, step)
        assert off(mean, expected["pmv_mean"]) < 2e-5
        assert off(log_variance, expected["pmv_log_variance"]) < 2e-5
        assert off(log_variance.exp(), expected["pmv_variance"]) < 2e-4
        part, noise = until(schedule, step), golden_case.get("inputs/step_noise")[row]
        walk = functools.partial(ddpm, noise=x.double(), schedule=part, rng=Given([noise] if step else []))
        found = one_step(walk, output, part, int(schedule.timestep[step]))  # at k = 0 it may not draw
        assert off(found, expected["p_sample"]) < 2e-5


@pytest.mark.golden(of=lambda case: is_dit(case) and not case.meta["learn_sigma"])
def test_golden_fixed_variance_is_the_large_one(golden_case):
    """Here nothing was rebuilt: the variance stands in the schedule alone."""
    _, schedule = of_case(golden_case.meta)
    for row, step, x, output in dit_steps(golden_case):
        log_variance = golden_case.get("outputs/pmv_log_variance")[row]
        assert off(torch.full_like(log_variance, official_tables(schedule)[2][step]), log_variance) < 2e-5
        assert off(posterior(output, x, schedule, step)[1], log_variance) < 2e-5


@pytest.mark.golden(of=lambda case: is_dit(case) and any(k.startswith("outputs/ddim_eta") for k in case.keys))
def test_golden_ddim_steps(golden_case):
    _, schedule = of_case(golden_case.meta)
    etas = sorted(k.removeprefix("outputs/ddim_eta") for k in golden_case.keys if k.startswith("outputs/ddim_eta"))
    for row, step, x, output in dit_steps(golden_case):
        part, told = until(schedule, step), int(schedule.timestep[step])
        for eta in etas:
            draws = Given([golden_case.get("inputs/step_noise")[row]] if step and float(eta) else [])
            walk = functools.partial(ddim, noise=x.double(), schedule=part, rng=draws, eta=float(eta))
            expected = golden_case.get(f"outputs/ddim_eta{eta}")[row]
            assert off(one_step(walk, output, part, told), expected) < 2e-5, (eta, step)


@pytest.mark.golden(of=lambda case: is_dit(case) and "outputs/ddim_reverse" in case.keys)
def test_golden_ddim_reverse_steps(golden_case):
    _, schedule = of_case(golden_case.meta)
    for row, step, x, output in dit_steps(golden_case):
        part = since(schedule, step)
        walk = functools.partial(ddim_reverse, images=x.double(), schedule=part)
        found = one_step(walk, output, part, int(schedule.timestep[step]))
        assert off(found, golden_case.get("outputs/ddim_reverse")[row]) < 2e-4


@pytest.mark.golden(of=lambda case: is_dit(case) and "outputs/pmv_clip_mean" in case.keys)
def test_golden_clipped_prediction(golden_case):
    whole, schedule = of_case(golden_case.meta)
    for row, step, x, output in dit_steps(golden_case):
        timestep = torch.tensor([int(schedule.timestep[step])])
        held = clipped(lambda x, timestep, output=output: output, whole)(x.double(), timestep)
        bar = float(schedule.alphas_cumprod[step])
        clean = clean_from_noise(x.double(), held[:, : x.shape[1]], bar)
        assert off(clean, golden_case.get("outputs/pmv_clip_pred_xstart")[row]) < 2e-4
        mean, log_variance = posterior(held, x.double(), schedule, step)
        assert off(mean, golden_case.get("outputs/pmv_clip_mean")[row]) < 2e-4
        assert off(log_variance, golden_case.get("outputs/pmv_log_variance")[row]) < 2e-5  # clipping leaves v alone


@pytest.mark.golden(of=lambda case: {"outputs/cfg3", "outputs/cfg4"} <= case.keys)
def test_golden_guidance_of_three_channels_and_of_all(golden_case):
    """In ``cfg3`` the channels from 3 on are unguided: conditional in the first half, unconditional in the second."""
    three, every = golden_case.get("outputs/cfg3"), golden_case.get("outputs/cfg4")
    s, channels, n = golden_case.meta["cfg_scale"], golden_case.meta["in_channels"], len(three) // 2
    assert torch.equal(three[:n, :3], three[n:, :3]) and torch.equal(three[:, :3], every[:, :3])
    conditional, unconditional = three[:n, 3:], three[n:, 3:]
    if channels == 3:
        assert torch.equal(three, every)
    else:
        assert off(guided(conditional, unconditional, s, channels - 3), every[:n, 3:]) < 2e-5
        assert off(three[:n, 3:4], every[:n, 3:4]) > 1e-3  # the two rules do differ


def has_step(case):
    return "diffusion_kwargs" in case.meta and {"outputs/diffusion/ddim_sample/sample"} <= case.keys


def guided_diffusion_steps(case):
    """One tuple per image: position, step, x_t, the network's output after the official clipping."""
    _, schedule = of_case(case.meta)
    x, clean, log_variance = (
        case.get(f"outputs/diffusion/{k}")
        for k in ("q_sample", "p_mean_variance/pred_xstart", "p_mean_variance/log_variance")
    )
    learned = case.meta["diffusion_kwargs"]["learn_sigma"]
    for k, step in enumerate(case.get("inputs/spaced_t").tolist()):
        row = slice(k, k + 1)
        yield row, step, x[row], rebuilt(schedule, step, x[row], clean[row], log_variance[row], learned)


@pytest.mark.golden(of=has_step)
def test_golden_ddim_step_of_guided_diffusion(golden_case):
    whole, schedule = of_case(golden_case.meta)
    expected = golden_case.get("outputs/diffusion/ddim_sample/sample")
    for row, step, x, output in guided_diffusion_steps(golden_case):
        part, told = until(schedule, step), int(schedule.timestep[step])

        def walk(denoiser, x=x, part=part):
            return ddim(clipped(denoiser, whole), x.double(), part, Silent())

        assert off(one_step(walk, output, part, told), expected[row]) < 1e-4


@pytest.mark.golden(of=lambda case: has_step(case) and "outputs/diffusion/ddim_reverse_sample/sample" in case.keys)
def test_golden_ddim_reverse_step_of_guided_diffusion(golden_case):
    """The file's reverse step was not clipped, its prediction was: they are compared where clipping changed nothing."""
    _, schedule = of_case(golden_case.meta)
    expected = golden_case.get("outputs/diffusion/ddim_reverse_sample/sample")
    clean, compared = golden_case.get("outputs/diffusion/p_mean_variance/pred_xstart"), 0
    for row, step, x, output in guided_diffusion_steps(golden_case):
        inside, part = clean[row].abs() < 1, since(schedule, step)
        walk = functools.partial(ddim_reverse, images=x.double(), schedule=part)
        found = one_step(walk, output, part, int(schedule.timestep[step]))
        if inside.any():
            assert off(found[inside], expected[row][inside]) < 2e-4
            compared += int(inside.sum())
    if not compared:
        pytest.skip("every pixel of this case was clipped")


@pytest.mark.golden(of=lambda case: has_step(case) and "outputs/diffusion/p_mean_variance/mean" in case.keys)
def test_golden_posterior_of_guided_diffusion(golden_case):
    _, schedule = of_case(golden_case.meta)
    for row, step, x, output in guided_diffusion_steps(golden_case):
        mean, log_variance = posterior(output, x.double(), schedule, step)
        assert off(mean, golden_case.get("outputs/diffusion/p_mean_variance/mean")[row]) < 2e-5
        assert off(log_variance, golden_case.get("outputs/diffusion/p_mean_variance/log_variance")[row]) < 2e-5


# One step, by hand


@pytest.mark.parametrize("step", [1, 2, 9])
def test_eta_one_has_the_variance_of_the_posterior(step):
    schedule = NoiseSchedule.named("linear").respaced("10")
    part, x, output = until(schedule, step), torch.randn(1, 2, 3, 3).double(), torch.randn(1, 2, 3, 3).double()

    def after(noise):
        walk = functools.partial(ddim, noise=x, schedule=part, rng=Given([noise]), eta=1.0)
        return one_step(walk, output, part, int(schedule.timestep[step]))

    variance = (after(torch.ones(1, 2, 3, 3)) - after(torch.zeros(1, 2, 3, 3))) ** 2
    bar, before = schedule.alphas_cumprod[step], schedule.alphas_cumprod[step - 1]
    ptilde = schedule.betas[step] * (1 - before) / (1 - bar)
    torch.testing.assert_close(variance, torch.full_like(variance, ptilde), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("step", [0, 1, 5, 9])
def test_a_learned_variance_goes_from_the_posterior_to_beta_and_beyond(step):
    schedule = NoiseSchedule.named("linear").respaced("10")
    small, beta, _ = official_tables(schedule)
    v = torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64).view(5, 1, 1, 1)
    output = torch.cat([torch.zeros_like(v), v], 1)
    _, found = posterior(output, torch.zeros_like(v), schedule, step)
    expected = torch.stack([small[step] + share * (beta[step] - small[step]) for share in (0, 0.5, 0.75, 1, 2)])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-12, atol=0)


def test_the_last_step_adds_no_noise_and_gives_the_clean_image():
    schedule = NoiseSchedule.named("linear").respaced("10")
    assert schedule.posterior_weights(0) == (1.0, 0.0)
    x, output = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 6, 4, 4).double()
    clean = clean_from_noise(x, output[:, :3], float(schedule.alphas_cumprod[0]))
    found = ddpm(lambda now, timestep: output, x, until(schedule, 0), Silent())
    torch.testing.assert_close(found, clean, rtol=1e-12, atol=1e-12)
