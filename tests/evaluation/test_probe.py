"""The closed-form probe against refits one by one: pytest tests/evaluation/test_probe.py"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep.evaluation import probe
from diffrep.evaluation.probe import (
    PENALTIES,
    accuracy,
    linear_probe,
    nearest_neighbours,
    primal_probe,
    probe_scores,
    standardise,
)

SIZES = st.tuples(st.integers(4, 14), st.integers(1, 12), st.integers(2, 4), st.integers(0, 10**6))


def made(count, width, classes, seed, noise=1.0):
    """Features with a class in them, labels that name each class at least once, and features to predict."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (max(0, count - classes),), generator=rng)])
    centres = torch.randn(classes, width, generator=rng)

    def features(of):
        return (centres[of] + noise * torch.randn(len(of), width, generator=rng)).double()

    test_labels = torch.arange(40) % classes
    return features(labels), labels, features(test_labels), test_labels


def ridge(x, goal, penalty):
    """Weights and intercept of ridge regression with a free intercept, by the normal equations."""
    centre, offset = x.mean(0), goal.mean(0)
    centred = x - centre
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, centred.T @ (goal - offset))
    return weights, offset - centre @ weights


def left_out_error(x, goal, penalty):
    """Brute force: refit without each image in turn."""
    errors = []
    for k in range(len(x)):
        rest = [i for i in range(len(x)) if i != k]
        weights, intercept = ridge(x[rest], goal[rest], penalty)
        errors.append((goal[k] - x[k] @ weights - intercept).square().mean())
    return float(torch.stack(errors).mean())


@given(SIZES, st.sampled_from(PENALTIES))
@settings(max_examples=25, deadline=None)
def test_leave_one_out_error_equals_refits_one_by_one(sizes, share):
    x, labels, _, _ = made(*sizes)
    goal = F.one_hot(labels, sizes[2]).double()
    centred = x - x.mean(0)
    values, left = torch.linalg.eigh(centred @ centred.T)
    values = values.clamp(min=0)
    penalty = share * float(values.sum()) / len(x)
    rotated = left.T @ (goal - goal.mean(0))
    found = probe._left_out_error(values, left, rotated, goal - goal.mean(0), penalty)
    assert found == pytest.approx(left_out_error(x, goal, penalty), rel=1e-5)


@given(SIZES)
@settings(max_examples=25, deadline=None)
def test_the_probe_is_ridge_with_the_penalty_of_the_best_leave_one_out(sizes):
    x, labels, test, _ = made(*sizes)
    goal = F.one_hot(labels, sizes[2]).double()
    total = float((x - x.mean(0)).square().sum())
    best = min((p * total / len(x) for p in PENALTIES), key=lambda p: left_out_error(x, goal, p))
    weights, intercept = ridge(x, goal, best)
    scores = test @ weights + intercept
    top = scores.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6  # rounding may turn a tie
    for fit in (linear_probe, primal_probe):
        assert torch.equal(fit(x, labels, test, sizes[2])[clear], scores.argmax(1)[clear])


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_kernel_and_primal_forms_agree(sizes):
    x, labels, test, _ = made(*sizes)
    assert torch.equal(linear_probe(x, labels, test, sizes[2]), primal_probe(x, labels, test, sizes[2]))


def test_the_probe_finds_what_is_there_and_nothing_where_nothing_is():
    x, labels, test, truth = made(200, 10, 4, 0, noise=0.3)
    assert accuracy(linear_probe(x, labels, test, 4), truth) == 100
    shuffled = labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert accuracy(linear_probe(x, shuffled, test, 4), truth) < 60


@pytest.mark.parametrize("fit", [linear_probe, primal_probe])
def test_features_without_any_difference_give_the_most_frequent_class(fit):
    """A dead network: no 0 / 0."""
    labels = torch.tensor([0, 2, 2, 1, 2])
    assert fit(torch.zeros(5, 3), labels, torch.zeros(4, 3), 3).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("fit", [linear_probe, primal_probe])
def test_the_probe_is_indifferent_to_shift_scale_and_rotation(fit):
    x, labels, test, _ = made(30, 6, 3, 5)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    assert torch.equal(fit(x, labels, test, 3), fit(7 * x @ turn - 3, labels, 7 * test @ turn - 3, 3))


@given(SIZES, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_neighbours_by_brute_force(sizes, k):
    count, width, classes, seed = sizes
    x, labels, test, _ = made(count, width + 1, classes, seed)  # of one number, all cosines are equal
    found = nearest_neighbours(x, labels, test, classes, k)
    for row, predicted in zip(test, found.tolist(), strict=True):
        similar = [float(row @ other / row.norm() / other.norm()) for other in x]
        near = sorted(range(len(x)), key=lambda i: -similar[i])[: min(k, len(x))]
        votes = {c: [similar[i] for i in near if int(labels[i]) == c] for c in range(classes)}
        most = max(len(v) for v in votes.values())
        winners = {c: sum(v) for c, v in votes.items() if len(v) == most}
        assert predicted in winners
        assert winners[predicted] >= max(winners.values()) - 1e-9  # a tie goes to the nearer ones


def test_standardise_uses_the_statistics_of_the_first_alone():
    torch.manual_seed(0)
    train, test = torch.randn(50, 3) * 4 + 2, torch.full((2, 3), 2.0)
    a, b = standardise(train, test)
    torch.testing.assert_close(a.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(a.std(0), torch.ones(3).double())
    torch.testing.assert_close(b[0], (test[0].double() - train.double().mean(0)) / train.double().std(0))


def test_scores_look_at_no_label_outside_the_draw():
    """Labels that were not drawn may be anything."""
    x, labels, test, truth = made(60, 8, 3, 2, noise=0.5)
    draws = [torch.arange(12), torch.tensor([0, 1, 2, 20, 30, 40])]
    found = probe_scores(x, labels, test, truth, draws, 3)
    hidden = torch.full_like(labels, -1)
    for draw in draws:
        hidden[draw] = labels[draw]
    assert probe_scores(x, hidden, test, truth, draws, 3) == found and len(found) == 2
    seen, unseen = standardise(x, test)
    assert found[0] == accuracy(linear_probe(seen[:12], labels[:12], unseen, 3), truth)


def test_many_images_take_the_primal_form_to_the_same_score(monkeypatch):
    x, labels, test, truth = made(2100, 5, 3, 3)
    found = probe_scores(x, labels, test, truth, [torch.arange(2100)], 3)
    monkeypatch.setattr(probe, "linear_probe", None)  # the kernel form would need 2,100 x 2,100
    assert probe_scores(x, labels, test, truth, [torch.arange(2100)], 3) == found
    assert accuracy(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0])) == pytest.approx(200 / 3)
