"""Rates by hand, and what the optimisers and the running mean hold."""

import math

import pytest
import torch
from torch import nn

from diffrep.config import validate
from diffrep.errors import UserError
from diffrep.training.optim import Ema, LrScheduleConfig, OptimConfig, lr_factor, optimiser, set_rates


def factors(steps, **config):
    schedule = LrScheduleConfig(**config)
    return [lr_factor(schedule, step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_and_its_last_step_has_the_whole_rate():
    assert factors(6, name="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_from_zero_is_the_official_schedule():
    """lr e / warmup, then min + (lr - min) (1 + cos(pi (e - warmup) / (epochs - warmup))) / 2, at each step's e."""
    found = factors(10, warmup_steps=4, warmup_from_zero=True, final=0.1)
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert found == pytest.approx([0.0, 0.25, 0.5, 0.75, *cosine], abs=1e-12) and found[0] == 0


def test_cosine_by_hand():
    # 8 steps: progress 0, 1/8, ..., 7/8.
    wanted = [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert factors(8) == pytest.approx(wanted, abs=1e-12)
    assert factors(8)[4] == pytest.approx(0.5)


def test_cosine_after_warm_up_begins_where_warm_up_ends():
    # 2 steps of warm-up, then progress k/8 of the 8 that are left.
    assert factors(10, warmup_steps=2)[2] == 1.0
    assert factors(10, warmup_steps=2)[6] == pytest.approx(0.5)


def test_hold_keeps_the_rate_and_decay_fills_the_rest():
    # hold 0.5 of 8 steps: whole until step 4, then cosine over the last four: 1, .854, .5, .146.
    found = factors(8, hold=0.5)
    assert found[:5] == [1.0] * 5
    assert found[5:] == pytest.approx([0.8535534, 0.5, 0.1464466])


def test_final_is_where_the_decay_ends():
    schedule = LrScheduleConfig(final=0.2)
    assert lr_factor(schedule, 5, 10) == pytest.approx(0.2 + 0.8 * 0.5)
    assert lr_factor(schedule, 10, 10) == pytest.approx(0.2)


def test_polynomial_by_hand():
    # (1 - k/4)^2
    assert factors(4, name="polynomial", power=2.0) == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


def test_step_falls_at_its_milestones():
    found = factors(8, name="step", milestones=(0.5, 0.75), gamma=0.1)
    assert found == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "step"}, "milestones"),
        ({"name": "step", "milestones": (1.0,)}, "shares of the run"),
        ({"hold": 1.0}, "hold"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        validate(LrScheduleConfig, values, "here")


def test_base_lr_is_per_256_images():
    assert OptimConfig(base_lr=1.5e-4).rate(1024) == pytest.approx(6e-4)
    assert OptimConfig(lr=1e-3).rate(1024) == 1e-3


@pytest.mark.parametrize("values", [{}, {"lr": 1e-3, "base_lr": 1e-3}, {"lr": 1, "betas": (0.9, 1.0)}])
def test_contradictions_are_refused(values):
    with pytest.raises(UserError, match=r"either lr or base_lr|betas"):
        validate(OptimConfig, values, "here")


def groups():
    return {"student": [nn.Parameter(torch.ones(2))], "head": [nn.Parameter(torch.ones(3))], "empty": []}


def test_each_part_gets_its_share_of_the_rate():
    made = optimiser(OptimConfig(base_lr=0.1, group_lr={"head": 30}), groups(), batch_size=128)
    assert {g["name"]: g["peak_lr"] for g in made.param_groups} == pytest.approx({"student": 0.05, "head": 1.5})
    set_rates(made, 0.5)
    assert [g["lr"] for g in made.param_groups] == pytest.approx([0.025, 0.75])


def test_a_rate_for_a_part_that_is_not_there_names_the_near_ones():
    with pytest.raises(UserError, match=r"no part 'haed'; did you mean 'head'"):
        optimiser(OptimConfig(lr=1, group_lr={"haed": 2}), groups(), 8)


def one_step(config, gradients):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    made = optimiser(config, {"student": [parameter]}, 256)
    set_rates(made, 1.0)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        made.step()
    return parameter.detach(), made.state[parameter]


def test_sgd_with_momentum_by_hand():
    # v1 = g1 + wd p0 = 1.1, 1.8; p1 = p0 - 0.1 v1 = .89, -2.18; v2 = 0.9 v1 + g2 + wd p1
    value, state = one_step(OptimConfig(name="sgd", lr=0.1, weight_decay=0.1), [[1.0, 2.0], [0.0, 0.0]])
    speed = [0.9 * 1.1 + 0.089, 0.9 * 1.8 - 0.218]
    assert state["momentum_buffer"].tolist() == pytest.approx(speed)
    assert value.tolist() == pytest.approx([0.89 - 0.1 * speed[0], -2.18 - 0.1 * speed[1]])


def test_adamw_by_hand_and_its_decay_is_apart_from_the_gradient():
    # The first step of Adam goes by the rate against the gradient's sign; decay first takes lr x wd of the weight.
    value, state = one_step(OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99)), [[1.0, 2.0]])
    assert value.tolist() == pytest.approx([0.95 - 0.1, -1.9 - 0.1])
    assert state["exp_avg"].tolist() == pytest.approx([0.1, 0.2])
    assert state["exp_avg_sq"].tolist() == pytest.approx([0.01, 0.04])
    adam, _ = one_step(OptimConfig(name="adam", lr=0.1, weight_decay=0.5), [[1.0, 2.0]])
    assert adam.tolist() == pytest.approx([0.9, -2.1])  # gradient + 0.5 x weight = 1.5, 1: the same signs


def test_running_mean_by_hand_of_trained_parameters_alone():
    network = nn.Linear(1, 1)
    network.bias.requires_grad_(False)
    network.register_buffer("count", torch.zeros(()))
    nn.init.constant_(network.weight, 1.0)
    mean = Ema(network, decay=0.5)
    assert list(mean.mean) == ["weight"]
    # Warm start: the decay is (1 + n) / (10 + n) = 1/10, 2/11, ... until that is above 0.5 (n = 8).
    by_hand, value = 1.0, 1.0
    for step, decay in [(0, 0.1), (1, 2 / 11), (8, 0.5), (1000, 0.5)]:
        value += 1.0
        nn.init.constant_(network.weight, value)
        mean.update(network, step)
        by_hand = decay * by_hand + (1 - decay) * value
        assert mean.mean["weight"].item() == pytest.approx(by_hand, rel=1e-6)
    bias = network.bias.clone()
    mean.copy_to(network)
    assert network.weight.item() == pytest.approx(by_hand, rel=1e-6)
    assert torch.equal(network.bias, bias)


def test_nesterov_is_refused_where_it_would_do_nothing():
    for settings in ({"name": "adamw"}, {"name": "muon"}, {"name": "sgd", "momentum": 0}):
        with pytest.raises(ValueError, match="nesterov belongs to sgd"):
            OptimConfig(lr=0.1, nesterov=True, **settings)
