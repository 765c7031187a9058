"""Rates by hand, and what the optimisers and the running mean hold."""

import math
import re

import pytest
import torch
from torch import nn

from diffrep.config import validate
from diffrep.errors import UserError
from diffrep.models import depths
from diffrep.models.maps import MapBackbone
from diffrep.models.students import StudentConfig
from diffrep.training.optim import (
    Ema,
    LrScheduleConfig,
    OptimConfig,
    lr_factor,
    norm_parameters,
    optimiser,
    set_rates,
)


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


def test_a_ratio_multiplies_the_scheduled_rate_while_the_decay_goes_on():
    # (1 - k/8) (1 - (1 - k/4) 0.9): mmcv, whose decay counts from the first step.
    found = factors(8, name="polynomial", power=1.0, warmup_steps=4, warmup_ratio=0.1)
    assert found == pytest.approx([0.1, 0.875 * 0.325, 0.75 * 0.55, 0.625 * 0.775, 0.5, 0.375, 0.25, 0.125])


def test_warm_up_by_powers_and_the_decay_behind_it():
    # 0.01^(1 - k/2), then 1 - k/4.
    found = factors(6, name="polynomial", power=1.0, warmup_steps=2, warmup_ratio=0.01, warmup_by_powers=True)
    assert found == pytest.approx([0.01, 0.1, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("steps", [184_375, 1740, 7, 99_991])
def test_a_milestone_that_is_a_step_falls_at_that_step(steps):
    for step in range(1, steps, max(1, steps // 97)):
        schedule = LrScheduleConfig(name="step", milestones=(step / steps,))
        assert (lr_factor(schedule, step - 1, steps), lr_factor(schedule, step, steps)) == (1.0, 0.1)


# The four published recipes. Their settings stand in words in the note of the golden case.
PUBLISHED = {
    "seg": (5e-3, 160_000, {"name": "polynomial", "final": 0.02, "warmup_steps": 1000, "warmup_ratio": 0.1}),
    "ade": (1e-4, 160_000, {"name": "polynomial", "power": 1.0, "warmup_steps": 1500, "warmup_ratio": 1e-6}),
    "landmark": (2e-3, None, {"name": "step", "milestones": (40 / 60, 55 / 60), "warmup_steps": 500}),
    "vitdet": (1e-4, 184_375, {"name": "step", "milestones": (163_889 / 184_375, 177_546 / 184_375)}),
}
PUBLISHED["landmark"][2].update(warmup_ratio=1e-3)
PUBLISHED["vitdet"][2].update(warmup_steps=250, warmup_ratio=1e-3)
ITERATIONS = {"ade": "seg_iters"}  # others have a list of their own


def is_schedules(case):
    return case.meta.get("kind") == "learning-rate schedules"


@pytest.mark.golden(of=is_schedules)
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_golden_rates_are_those_of_the_official_code(golden_case, recipe):
    lr, steps, settings = PUBLISHED[recipe]
    listed = next(k for k in golden_case.keys if k.startswith(f"inputs/{ITERATIONS.get(recipe, recipe + '_iters')}"))
    rates = (k for k in golden_case.keys if k.startswith(f"outputs/{recipe}_") and k.endswith("_lr"))
    wanted = golden_case.get(next(rates))
    if steps is None:  # 60 epochs, of as many iterations as the name of the list says
        steps = 60 * int(re.search(r"(\d+)_per_epoch", listed)[1])
    schedule = LrScheduleConfig(**settings)
    found = [lr * lr_factor(schedule, step, steps) for step in golden_case.get(listed).tolist()]
    assert len(found) > 1
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=0, atol=1e-10)


@pytest.mark.golden(of=is_schedules)
def test_golden_shares_of_layers_are_those_of_vitdet(golden_case):
    names = golden_case.meta["layer_scale_names"]
    depth = 1 + max(int(found[1]) for name in names if (found := re.search(r"blocks\.(\d+)\.", name)))
    key = next(k for k in golden_case.keys if "layer_scale" in k)
    decay = float(re.search(r"layer_scale_(\d+_\d+)", key)[1].replace("_", "."))
    small = {"img_size": 32, "embed_dim": 8, "num_heads": 2, "depth": depth}
    backbone = MapBackbone(StudentConfig(name="vit_base_patch16_224", options=small))
    head = nn.Linear(2, 2)
    groups = {"student": [*backbone.parameters()], "head": [*head.parameters()]}
    layers = [*depths.layers(backbone.net), [*head.parameters()]]
    made = optimiser(OptimConfig(lr=1.0, layer_decay=decay), groups, 64, layers)
    rates = {p: group["peak_lr"] for group in made.param_groups for p in group["params"]}
    own = dict(backbone.net.named_parameters())
    inside = [name.removeprefix("backbone.net.") for name in names]
    found = [rates[own.get(name, head.weight)] for name in inside]
    assert sum(name in own for name in inside) == depth + 2
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), golden_case.get(key), rtol=0, atol=1e-10)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 3, 4))
        self.linear, self.norm, self.batch = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)


def spared(**settings):
    network = Whole()
    config, groups = OptimConfig(lr=1.0, weight_decay=0.1, **settings), {"student": [*network.parameters()]}
    made = optimiser(config, groups, 1, undecayed=[network.table], norms=norm_parameters(network))
    names = {p: name for name, p in network.named_parameters()}
    return {names[p] for group in made.param_groups for p in group["params"] if not group["weight_decay"]}


def test_norms_alone_are_spared_where_asked_and_biases_decay():
    norms = {"norm.weight", "norm.bias", "batch.weight", "batch.bias", "table"}
    assert spared() == set()
    assert spared(weight_decay_exclude_norms=True) == norms
    assert spared(weight_decay_exclude_1d=True) == norms | {"linear.bias"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_ratio": 0.1}, "warmup_steps"),
        ({"warmup_ratio": 0.1, "warmup_steps": 2, "warmup_from_zero": True}, "not warmup_from_zero"),
        ({"warmup_by_powers": True, "warmup_steps": 2}, "starts from a warmup_ratio"),
        ({"warmup_ratio": 0.0, "warmup_steps": 2}, "warmup_ratio"),
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
