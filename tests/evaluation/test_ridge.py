"""Ridge regression from streaming sums against the same from all data at once: pytest tests/evaluation/test_ridge.py"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep.errors import UserError
from diffrep.evaluation.probe import PENALTIES, primal_probe, standardise
from diffrep.evaluation.ridge import Sums

SIZES = st.tuples(st.integers(5, 60), st.integers(1, 12), st.integers(2, 4), st.integers(0, 10**6))


def made(count, width, classes, seed, offset=0.0):
    """Features with a class in them, float64, and their labels; every class is there."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (count - classes,), generator=rng)])
    centres = torch.randn(classes, width, generator=rng)
    x = centres[labels] + torch.randn(count, width, generator=rng)
    return x.double() * torch.linspace(0.1, 3, width).double() + offset, labels


def summed(x, labels, classes, block=7) -> Sums:
    sums = Sums(classes)
    for start in range(0, len(x), block):
        sums.add(x[start : start + block], labels[start : start + block])
    return sums


def direct(x, labels, classes, penalty):
    """Normal equations on the standardised features; (scores of x, trace of the hat matrix with its intercept)."""
    z, goal = standardise(x)[0], F.one_hot(labels, classes).double()
    offset = goal.mean(0)
    gram = z.T @ z + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    hat = z @ torch.linalg.solve(gram, z.T)
    return hat @ (goal - offset) + offset, float(hat.trace()) + 1


@given(SIZES, st.sampled_from([1e-3, 1.0, 100.0]), st.sampled_from([0.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_sums_of_blocks_give_the_direct_solution(sizes, penalty, offset):
    count, width, classes, seed = sizes
    x, labels = made(count, width, classes, seed, offset)
    expected, _ = direct(x, labels, classes, penalty)
    found = summed(x, labels, classes).ridge(penalty).scores(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_the_penalty_has_the_least_generalised_cross_validation_error(sizes):
    count, width, classes, seed = sizes
    x, labels = made(count, width, classes, seed)
    goal = F.one_hot(labels, classes).double()
    total = float(standardise(x)[0].square().sum()) / count

    def error(penalty):
        scores, freedom = direct(x, labels, classes, penalty)
        return float((goal - scores).square().sum()) / count / max(1 - freedom / count, 1e-9) ** 2

    found = summed(x, labels, classes).ridge().penalty
    tried = {p * total: error(p * total) for p in PENALTIES}
    assert min(abs(found / p - 1) for p in tried) < 1e-9
    assert error(found) <= min(tried.values()) * (1 + 1e-6)


def test_many_images_are_classified_as_by_the_probe_with_leave_one_out():
    """The two rules for the penalty differ; with many images their answers hardly do."""
    x, labels = made(3000, 20, 5, 0)
    test, _ = made(1000, 20, 5, 0)
    seen, unseen = standardise(x, test)
    found = summed(x, labels, 5, 256).ridge().predict(test)
    assert (found == primal_probe(seen, labels, unseen, 5)).double().mean() > 0.995


def test_what_is_kept_does_not_grow_with_the_images():
    x, labels = made(2000, 6, 3, 1)

    def kept(sums):
        return sum(v.numel() for v in vars(sums).values() if isinstance(v, torch.Tensor))

    assert kept(summed(x, labels, 3)) == kept(summed(x[:20], labels[:20], 3)) == 3 + 6 + 3 * 6 + 6 * 6


def test_dead_features_give_the_most_frequent_class():
    labels = torch.tensor([0, 2, 2, 1, 2])
    for x in (torch.zeros(5, 3), torch.full((5, 3), 4.2)):
        assert summed(x, labels, 3, 2).ridge().predict(x[:2]).tolist() == [2, 2]
    mixed = torch.cat([torch.full((5, 1), 1e5), F.one_hot(labels, 3).float()], 1)
    assert summed(mixed, labels, 3, 2).ridge(1e-6).predict(mixed).tolist() == labels.tolist()


def test_one_image_is_enough_not_to_fall_over():
    sums = Sums(3)
    sums.add(torch.ones(1, 4), torch.tensor([1]))
    assert sums.ridge().predict(torch.zeros(2, 4)).tolist() == [1, 1]


def test_what_is_too_wide_is_refused_with_a_way_out():
    with pytest.raises(UserError, match=r"a feature of 9000 numbers is too wide .* pool it to fewer cells"):
        Sums(2).add(torch.zeros(1, 9000), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_float_is_summed_in_float64(dtype):
    x, labels = made(50, 4, 2, 3)
    sums = summed(x.to(dtype), labels, 2)
    assert sums.second.dtype == sums.by_class.dtype == torch.float64
    expected, _ = direct(x.to(dtype).double(), labels, 2, 1.0)
    torch.testing.assert_close(sums.ridge(1.0).scores(x), expected, atol=0.02, rtol=0)
