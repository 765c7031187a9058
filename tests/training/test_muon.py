"""Muon against the published polynomial by hand, and against torch's own optimisers."""

import pytest
import torch
from torch import nn

from diffrep.training.muon import Muon, orthogonal
from diffrep.training.optim import OptimConfig, optimiser, set_rates

SHAPES = [(64, 216), (64, 64), (256, 80)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    left, _, right = torch.linalg.svd(noise(*shape).double(), full_matrices=False)
    values = torch.linspace(1, 0.2, min(shape)).double()  # 0.2 of the Frobenius norm's at most 8: above 0.02
    found = orthogonal((left * values) @ right).double()
    assert found.shape == shape
    assert torch.linalg.svdvals(found).min() > 0.65 and torch.linalg.svdvals(found).max() < 1.25
    turned = left.T @ found @ right.T  # diagonal where the directions stay
    assert (turned - turned.diag().diag()).abs().max() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_published_polynomial_three_times(shape):
    """anchors.md 3.4: X <- aX + (bA + cA A)X on X / ||X||, A = X X^T: on singular values a s + b s^3 + c s^5."""
    left, values, right = torch.linalg.svd(noise(*shape).double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    wanted = (left * values) @ right
    assert (orthogonal(noise(*shape)).double() - wanted).norm() < 0.02 * wanted.norm()  # bfloat16 has 8 bits


def test_of_no_gradient_at_all_nothing_comes():
    assert torch.equal(orthogonal(torch.zeros(3, 5)).float(), torch.zeros(3, 5))


def stepped(optimizer, parameter, gradients, before=lambda: None):
    for gradient in gradients:
        before()
        parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
    return parameter.detach()


def test_filters_go_as_torchs_muon_takes_matrices_from_their_rescaled_place():
    start, gradients = noise(8, 3, 2, 2), [noise(8, 12, seed=k) for k in (1, 2, 3)]
    filters, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    ours = Muon([{"params": [filters], "lr": 0.1, "weight_decay": 0.5}], momentum=0.0, filter_momentum=0.6)
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.6, weight_decay=0.0, ns_steps=3)

    @torch.no_grad()
    def rescale():
        matrix.mul_(8**0.5 / matrix.norm())

    found = stepped(ours, filters, gradients)
    wanted = stepped(theirs, matrix, gradients, rescale)
    torch.testing.assert_close(found.flatten(1), wanted, atol=3e-3, rtol=0)  # bfloat16 on steps of 0.1
    assert (found - start * 8**0.5 / start.norm()).norm() > 0.1


def test_a_filter_is_brought_to_the_root_of_its_outputs_first():
    filters = nn.Parameter(100 * noise(8, 3, 2, 2))
    ours = Muon([{"params": [filters], "lr": 0.0}], momentum=0.0, filter_momentum=0.6)
    assert float(stepped(ours, filters, [noise(8, 12)]).norm()) == pytest.approx(8**0.5)


def test_the_rest_goes_as_torchs_sgd_with_nesterov():
    gradients = [noise(5, seed=k) for k in (1, 2, 3)]
    mine, theirs = nn.Parameter(noise(5)), nn.Parameter(noise(5))
    config = OptimConfig(name="muon", lr=0.2, momentum=0.85, group_lr={"biases": 0.5}, weight_decay=0.03)
    made = optimiser(config, {"biases": [mine]}, 8)
    set_rates(made, 1.0)
    # anchors.md 3.4: the decay is divided by the group's rate, here 0.03 / 0.1.
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.85, nesterov=True, weight_decay=0.3)
    torch.testing.assert_close(stepped(made, mine, gradients), stepped(sgd, theirs, gradients))


def test_a_group_without_a_rate_stays():
    bias, untouched = nn.Parameter(noise(5)), nn.Parameter(noise(5))
    made = optimiser(
        OptimConfig(name="muon", lr=1.0, group_lr={"still": 0}, weight_decay=0.1),
        {"still": [bias], "student": [untouched]},
        8,
    )
    set_rates(made, 1.0)
    assert torch.equal(stepped(made, bias, [noise(5, seed=1)]), noise(5))
    assert untouched not in made.state and torch.equal(untouched.detach(), noise(5))  # no gradient, no step
