"""Finding the planted pair at a small share of a grid: pytest tests/evaluation/test_search.py"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import BEST_SIGMA, images, teacher

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.levels import levels_of, log_spaced
from diffrep.evaluation.probe import PENALTIES, left_out_margins, smoothed_accuracy, standardise
from diffrep.evaluation.probing import Probe
from diffrep.evaluation.search import GRID_LEVELS, golden_point, narrowed, not_behind, plan_of, smoothed
from diffrep.evaluation.sweep import SweepConfig, labelled

CPU = torch.device("cpu")
TRAIN, TEST = images(2000, 1), images(1000, 2, "test")


def searched(model, kept=None, stop=lambda: False, seed=0, **more):
    settings = SweepConfig(taps=("all",), pool=2, search=True, **more)
    return Probe(model, TRAIN, TEST, settings, seed, CPU).run(kept or Kept(), lambda *_: None, stop)


# Leave one out


def left_out_accuracy(x, labels, classes):
    return smoothed_accuracy(left_out_margins(x, labels, classes), 0)


def brute_force(x: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Refit without each image in turn, at every penalty; the accuracy at the one with the least squared error."""
    z, goal = standardise(x)[0], F.one_hot(labels, classes).double()
    z = z - z.mean(0)
    found = []
    for share in PENALTIES:
        penalty, answers = share * float(z.square().sum()) / len(z), []
        for k in range(len(z)):
            rest = [i for i in range(len(z)) if i != k]
            centre, offset = z[rest].mean(0), goal[rest].mean(0)
            gram = (z[rest] - centre).T @ (z[rest] - centre) + penalty * torch.eye(z.shape[1], dtype=z.dtype)
            weights = torch.linalg.solve(gram, (z[rest] - centre).T @ (goal[rest] - offset))
            answers.append((z[k] - centre) @ weights + offset)
        scores = torch.stack(answers)
        found.append((float((scores - goal).square().mean()), float((scores.argmax(1) == labels).double().mean())))
    return 100 * min(found)[1]


@pytest.mark.parametrize(("count", "width"), [(12, 3), (24, 40), (30, 30), (40, 6)])
def test_left_out_accuracy_is_that_of_refits_one_by_one(count, width):
    rng = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 3, (count,), generator=rng) * (torch.rand(count, generator=rng) < 0.8)  # unbalanced
    x = torch.randn(3, width, generator=rng)[labels] + 1.5 * torch.randn(count, width, generator=rng)
    assert left_out_accuracy(x, labels, 3) == pytest.approx(brute_force(x, labels, 3))


def test_left_out_accuracy_of_noise_is_chance_and_not_that_of_the_fit():
    rng = torch.Generator().manual_seed(0)
    assert left_out_accuracy(torch.randn(400, 300, generator=rng), torch.arange(400) % 4, 4) == pytest.approx(25, abs=7)


def test_the_soft_step_counts_what_is_sure_and_halves_what_is_not():
    margins = torch.tensor([5.0, -5.0, 0.0, 0.1], dtype=torch.float64)
    assert smoothed_accuracy(margins, 0) == 50 and smoothed_accuracy(margins[:3], 0.1) == pytest.approx(50)
    assert smoothed_accuracy(margins[3:], 0.1) == pytest.approx(84.134, abs=1e-3)  # the normal at one deviation
    assert smoothed_accuracy(margins, 1e-9) == pytest.approx(62.5)


# Finding


@pytest.mark.parametrize("seed", range(4))
def test_the_planted_pair_is_found_within_half_a_point_of_the_grid(seed):
    model = teacher()
    found = searched(model, seed=seed, budget=0.1)
    best, took = found["best"], found["search"]
    assert best["tap"] == "good" and abs(math.log(best["sigma"] / BEST_SIGMA)) < 0.7 and took["notes"] == []
    assert model.module.passes == took["passes"] == found["images_seen"] <= took["planned_passes"]
    assert took["share_of_grid"] == pytest.approx(took["passes"] / (GRID_LEVELS * 3000), abs=1e-5)
    assert took["share_of_grid"] <= 0.1
    grid = SweepConfig(taps=("good",), pool=2, sigmas=(*log_spaced(GRID_LEVELS), best["sigma"]))
    rows = Probe(model, TRAIN, TEST, grid, 0, CPU).run(Kept(), lambda *_: None, lambda: False)["rows"][1:]
    at_best = next(row["mean"] for row in rows if row["timestep"] == best["timestep"])
    assert max(row["mean"] for row in rows) - at_best <= 0.5


@pytest.mark.parametrize(
    ("sign", "words"), [(-1, "lowest noise level searched, sigma 0.019"), (1, "highest noise level searched, sigma 1:")]
)
def test_a_curve_without_a_maximum_inside_is_said_to_have_none(sign, words):
    (note,) = searched(teacher(lambda log_sigma: math.exp(2 * sign * (log_sigma + 1.9))))["search"]["notes"]
    assert words in note and "no maximum inside" in note and ("memorises" in note) == (sign < 0)


def test_a_control_stands_beside_and_is_no_part_of_the_search():
    model, untrained = teacher(), teacher(lambda log_sigma: 0.1)
    untrained.name = "untrained planted"
    settings = SweepConfig(taps=("all",), pool=2, search=True, control=True)
    found = Probe(model, TRAIN, TEST, settings, 0, CPU, untrained).run(Kept(), lambda *_: None, lambda: False)
    last = found["best"]["images"]
    assert (model.module.passes, untrained.module.passes) == (found["search"]["passes"], last)
    assert found["images_seen"] == found["search"]["passes"] + last
    control = {row["tap"]: row["mean"] for row in found["search"]["control"]}
    assert control["good"] < found["best"]["mean"] - 10


def test_a_stopped_search_goes_on_where_it_was(tmp_path):
    model, file = teacher(), tmp_path / "levels.json"
    with pytest.raises(Interrupted):
        searched(model, Kept(file), stop=lambda: model.module.passes > 1500)
    model.module.passes = 0
    found, whole = searched(model, Kept(file)), searched(teacher())
    assert found == whole  # the passes of both are those of a search that nobody stopped
    assert model.module.passes < whole["search"]["passes"]
    model.module.passes = 0
    assert searched(model, Kept(file)) == whole and model.module.passes == 0


def test_rungs_hold_each_other_and_noise_levels_thin_out():
    rungs = searched(teacher())["search"]["rungs"]
    counts = [rung["images"] for rung in rungs]
    first = counts[0]
    assert counts[1:4] == [2 * first, 4 * first, 4 * first] and counts[4] > 4 * first
    levels = [{row["timestep"] for row in rung["rows"]} for rung in rungs]
    assert list(map(len, levels[:3])) == [8, 4, 2] and levels[2] < levels[1] < levels[0]
    sets = [set(labelled(TRAIN, count, 0).tolist()) for count in counts]
    assert sets[0] < sets[1] < sets[2] < sets[4]


# Planning


@given(st.integers(300, 60_000), st.integers(100, 10_000), st.floats(0.03, 0.5), st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_a_plan_stays_within_its_budget(train, held_out, budget, levels):
    settings = SweepConfig(taps=("all",), search=True, budget=budget)
    bench = SimpleNamespace(config=settings, train=range(train), passes=train + held_out, num_classes=10)
    try:
        plan = plan_of(bench, levels)
    except UserError as error:
        assert "too few for 10 classes" in str(error)
        return
    assert plan.grid_passes == 20 * (train + held_out) and plan.passes <= budget * plan.grid_passes
    assert plan.rungs[0][0] >= 20 and plan.rungs[2][0] < plan.rungs[-1][0] <= min(train, 8192)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(UserError, match="8 images at each of 8 noise levels are too few for 5 classes"):
        searched(teacher(), budget=0.004)
    with pytest.raises(UserError, match="at least 3 noise levels to start from, not 2"):
        searched(teacher(), sigmas=(0.1, 0.2))


def test_only_taps_clearly_behind_are_dropped():
    row = {"best": (80.0, 0.0), "near": (76.0, 0.0), "far": (60.0, 99.0)}
    levels = levels_of(NoiseSchedule.named("linear"), sigmas=(0.1, 0.2, 0.4))
    table = {level: dict(row) for level in levels}
    assert not_behind(table, ("best", "near", "far"), 100) == ["best", "near"]  # two standard errors: 11 points
    assert not_behind(table, ("best", "near", "far"), 10_000) == ["best"]
    assert not_behind({level: {"a": (100.0, 0.0), "b": (99.0, 0.0)} for level in levels}, ("a", "b"), 100) == ["a", "b"]


def test_smoothing_keeps_lines_and_pairs_and_flattens_what_sticks_out():
    x = [0.0, 0.5, 1.1, 1.7, 2.2]
    assert smoothed(x, [3 - 2 * v for v in x]) == pytest.approx([3 - 2 * v for v in x])
    assert smoothed([1.0, 4.0], [7.0, 2.0]) == pytest.approx([7.0, 2.0])
    assert smoothed([1.0], [7.0]) == smoothed([1.0, 1.0], [7.0, 7.0])[:1] == [7.0]
    spike = smoothed(x, [0.0, 0.0, 5.0, 0.0, 0.0])
    assert max(spike) == spike[2] < 3 and min(spike[1], spike[3]) > 0.5


@given(st.floats(-3, 0), st.floats(0.1, 0.9))
@settings(max_examples=50, deadline=None)
def test_golden_section_closes_in_on_a_single_maximum(low, share):
    high, top = low + 1, low + share

    def height(x):
        return -(abs(x - top) ** 1.5)

    bracket = (low, low + 0.4, high)
    for _ in range(30):
        before, point = bracket, golden_point(bracket)
        assert before[0] < point < before[2]
        bracket = narrowed(bracket, point, height(point) > height(bracket[1]))
        assert before[0] <= bracket[0] < bracket[1] < bracket[2] <= before[2]
    assert abs(bracket[1] - top) < 1e-3
