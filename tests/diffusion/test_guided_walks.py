"""guided-diffusion's own network walked by our samplers, against its own walks.

pytest tests/diffusion/test_guided_walks.py: the steps that other tests rebuild from predictions, with the network.
"""

import functools

import numpy as np
import pytest
import torch
from golden_guided import CLOSE, close, is_guided, labels_of, network_of
from test_official_steps import of_case
from walks import Silent, one_step, since, until

from diffrep.diffusion.sampling import clean_from_noise, clipped, ddim, ddim_reverse, posterior

CHAIN = {"rtol": 1e-3, "atol": 1e-3}  # of the file's own section on tolerances
OTHER = ("predict_xstart", "sigma_small", "rescale_timesteps")  # no published network was trained like that


def walks(name):
    """Cases with this output of the walks, of a diffusion as the published networks have it."""

    def reads(case):
        unusual = any(case.meta.get("diffusion_kwargs", {}).get(option) for option in OTHER)
        return is_guided(case) and f"outputs/diffusion/{name}" in case.keys and not unusual

    return reads


def close_at(schedule, step, found, expected):
    """The predicted image multiplies what rounding left in epsilon by the noise level."""
    atol = max(CLOSE["atol"], 1e-5 * schedule.sigma_at(step))
    torch.testing.assert_close(found, expected, rtol=CLOSE["rtol"], atol=atol)


def denoiser_of(case, row=slice(None)):
    """The network as samplers call it, told the labels of the case."""
    network, labels = network_of(case).requires_grad_(False), labels_of(case)
    return lambda x, timestep: network(x, timestep, None if labels is None else labels[row])


def noised(case):
    """One tuple per image: its row, its step, the official x_t, the network told its label."""
    x = case.get("outputs/diffusion/q_sample")
    for k, step in enumerate(case.get("inputs/spaced_t").tolist()):
        row = slice(k, k + 1)
        yield row, step, x[row], denoiser_of(case, row)


@pytest.mark.golden(of=walks("timestep_map"))
def test_golden_schedule(golden_case):
    _, schedule = of_case(golden_case.meta)
    assert schedule.timestep.tolist() == golden_case.get("outputs/diffusion/timestep_map").tolist()
    for name in ("betas", "alphas_cumprod"):
        expected = golden_case.get(f"outputs/diffusion/{name}").numpy()
        np.testing.assert_allclose(getattr(schedule, name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.golden(of=walks("q_sample"))
def test_golden_noising(golden_case):
    _, schedule = of_case(golden_case.meta)
    x, noise, step = (golden_case.get(f"inputs/{name}") for name in ("x", "noise", "spaced_t"))
    close(schedule.noised(x, noise, step), golden_case.get("outputs/diffusion/q_sample"))


@pytest.mark.golden(of=walks("p_mean_variance/mean"))
def test_golden_posterior(golden_case):
    whole, schedule = of_case(golden_case.meta)
    expected = golden_case.under("outputs/diffusion/p_mean_variance/")
    for row, step, x, denoiser in noised(golden_case):
        output = clipped(denoiser, whole)(x, torch.tensor([int(schedule.timestep[step])]))
        mean, log_variance = posterior(output, x, schedule, step)
        clean = clean_from_noise(x, output[:, : x.shape[1]], schedule.alpha_bar_at(step))
        found = {"mean": mean, "log_variance": log_variance, "pred_xstart": clean}
        for name, value in expected.items():
            close_at(schedule, step, found[name], value[row])


@pytest.mark.golden(of=walks("ddim_sample/sample"))
def test_golden_ddim_step(golden_case):
    whole, schedule = of_case(golden_case.meta)
    for row, step, x, denoiser in noised(golden_case):
        part, told = until(schedule, step), int(schedule.timestep[step])

        def walk(network, x=x, part=part):
            return ddim(clipped(network, whole), x, part, Silent())

        output = denoiser(x, torch.tensor([told]))
        expected = golden_case.get("outputs/diffusion/ddim_sample/sample")[row]
        close_at(schedule, step, one_step(walk, output, part, told), expected)


@pytest.mark.golden(of=walks("ddim_reverse_sample/sample"))
def test_golden_ddim_reverse_step(golden_case):
    _, schedule = of_case(golden_case.meta)
    for row, step, x, denoiser in noised(golden_case):
        part, told = since(schedule, step), int(schedule.timestep[step])
        walk = functools.partial(ddim_reverse, images=x, schedule=part)
        found = one_step(walk, denoiser(x, torch.tensor([told])), part, told)
        close(found, golden_case.get("outputs/diffusion/ddim_reverse_sample/sample")[row])


@pytest.mark.golden(of=walks("ddim_sample_loop"))
def test_golden_clipped_ddim_chain(golden_case):
    whole, schedule = of_case(golden_case.meta)
    found = ddim(clipped(denoiser_of(golden_case), whole), golden_case.get("inputs/noise"), schedule, Silent())
    torch.testing.assert_close(found, golden_case.get("outputs/diffusion/ddim_sample_loop"), **CHAIN)


@pytest.mark.golden(of=walks("ddim_sample_loop_unclipped"))
def test_golden_ddim_chain(golden_case):
    _, schedule = of_case(golden_case.meta)
    found = ddim(denoiser_of(golden_case), golden_case.get("inputs/noise"), schedule, Silent())
    torch.testing.assert_close(found, golden_case.get("outputs/diffusion/ddim_sample_loop_unclipped"), **CHAIN)
