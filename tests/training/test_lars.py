"""LARS by hand, and beside timm's: pytest tests/training/test_lars.py"""

import pytest
import torch
from torch import nn

from diffrep.training.lars import TRUST
from diffrep.training.optim import OptimConfig, optimiser, set_rates


def walked(values, gradients, **settings):
    parameter = nn.Parameter(torch.tensor(values))
    made = optimiser(OptimConfig(name="lars", lr=2.0, **settings), {"student": [parameter]}, 256)
    set_rates(made, 1.0)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        made.step()
    return parameter.detach()


def test_a_matrix_by_hand():
    # |w| = 5, g + wd w = (0, 5) + 0.1 (3, 4) = (0.3, 5.4), so the step is 2 x 0.001 x 5 / |g| x g.
    step = torch.tensor([[0.3, 5.4]]) * 2 * TRUST * 5 / (0.3**2 + 5.4**2) ** 0.5
    found = walked([[3.0, 4.0]], [[[0.0, 5.0]]], weight_decay=0.1)
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0]]) - step)


def test_a_bias_goes_by_momentum_alone():
    # v = 1, then 0.5 + 1 = 1.5; p = 3 - 2 x 2.5
    assert walked([3.0], [[1.0], [1.0]], momentum=0.5, weight_decay=0.1).item() == pytest.approx(-2.0)


@pytest.mark.parametrize("values, gradient", [([[0.0, 0.0]], [[0.0, 5.0]]), ([[3.0, 4.0]], [[0.0, 0.0]])])
def test_nothing_is_divided_by_nothing(values, gradient):
    found = walked(values, [gradient])
    torch.testing.assert_close(found, torch.tensor(values) - 2 * torch.tensor(gradient))


def test_matrices_without_decay_go_as_with_timms():
    from timm.optim import Lars as Theirs

    rng = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 4, generator=rng), torch.randn(5, 3, 4, generator=rng)
    theirs = nn.Parameter(start.clone())
    other = Theirs([theirs], lr=2.0, momentum=0.9, always_adapt=True, trust_coeff=TRUST)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        other.step()
    ours = walked(start.tolist(), gradients.tolist(), momentum=0.9)
    torch.testing.assert_close(ours, theirs.detach())
