"""What a score is worth in labels, on planted curves: pytest tests/evaluation/test_label_value.py"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from diffrep.evaluation.label_value import RESAMPLES, isotonic, label_value, own_labels, resampled, said, worth

COUNTS = (500, 1000, 2000, 4000)


def planted(labels: float) -> float:
    """10 points for each factor of e: 52.1 % at 500 labels, 72.9 % at 4,000."""
    return 10 * math.log(labels) - 10


def flat(*scores: float) -> dict[int, float]:
    return dict(enumerate(scores))


SCALE = {n: flat(planted(n)) for n in COUNTS}


def value(scale, arm, images=0):
    return label_value(scale, arm, images, np.random.default_rng(0))


@pytest.mark.parametrize("labels", [500, 640, 1000, 1833, 3999, 4000])
def test_a_planted_curve_gives_the_planted_labels(labels):
    found = value(SCALE, flat(planted(labels)))
    assert found.labels == pytest.approx(labels, rel=1e-9) and found.interval is None


def test_nothing_is_said_beyond_the_scale():
    assert value(SCALE, flat(planted(499))).labels == 0 and value(SCALE, flat(planted(4001))).labels == math.inf
    far = value(SCALE, flat(99.0), images=10_000)
    assert far.labels == math.inf and far.interval == (math.inf, math.inf)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=4, max_size=4), st.floats(0, 100), st.floats(0, 50))
def test_a_higher_score_is_never_worth_less(points, score, more):
    scale = {n: flat(p) for n, p in zip(COUNTS, points, strict=True)}
    assert value(scale, flat(score)).labels <= value(scale, flat(score + more)).labels


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_scale_is_made_to_rise_as_another_implementation_does(rows):
    theirs = [IsotonicRegression().fit_transform(range(5), row) for row in rows]
    np.testing.assert_allclose(isotonic(np.array(rows)), theirs, atol=1e-9)


def test_where_the_scale_is_level_the_fewest_labels_count_and_the_interval_holds_all():
    scale = {500: flat(50.0), 1000: flat(70.0), 2000: flat(60.0), 4000: flat(80.0)}  # 1,000 and 2,000 pool to 65
    found = value(scale, flat(65.0), images=10**9)
    assert found.labels == pytest.approx(1000, rel=1e-6)
    assert found.interval[0] == pytest.approx(1000, rel=0.01) and found.interval[1] == pytest.approx(2000, rel=0.01)


def test_the_unit_of_labels_does_not_matter():
    seeds = {n: flat(planted(n) - 1, planted(n), planted(n) + 1) for n in COUNTS}
    arm = flat(60.0, 62.0, 61.0)
    one, dozens = value(seeds, arm, 1000), value({12 * n: s for n, s in seeds.items()}, arm, 1000)
    assert dozens.labels == pytest.approx(12 * one.labels)
    assert dozens.interval == pytest.approx([12 * end for end in one.interval])


def width(scale, arm, images) -> float:
    low, high = value(scale, arm, images).interval
    return math.log(high / low)


def test_noise_widens_the_interval():
    arm = flat(planted(1500))
    assert width(SCALE, arm, 20_000) < 0.6 * width(SCALE, arm, 5_000)  # half the standard error

    def apart(spread, count=5):
        signs = [(-1) ** k * spread for k in range(count)]
        return {n: flat(*(planted(n) + s * (1 if k % 2 else -1) for s in signs)) for k, n in enumerate(COUNTS)}

    several = flat(*[planted(1500) + s for s in (-1, 0, 1, 0, 0)])
    assert width(apart(0.1), several, 20_000) < width(apart(1.0), several, 20_000)


def test_seeds_that_move_together_are_taken_together():
    shifts = (-3.0, -1.5, 0.0, 1.5, 3.0)
    scale = {n: flat(*(planted(n) + s for s in shifts)) for n in COUNTS}
    arm = flat(*(planted(1500) + s for s in shifts))
    other = {seed + 10: score for seed, score in arm.items()}  # the same scores of other seeds
    assert width(scale, arm, 0) < 1e-6
    # sd 2.37: the arm's mean is unsure by 1.06, the scale near it by 0.76; 2 x 2.78 (t) x 1.31 points, at 10 a unit.
    assert width(scale, other, 0) == pytest.approx(0.73, rel=0.2)


def test_few_seeds_are_as_unsure_as_students_t_says():
    """Of 4 seeds, 95 %: 3.18 standard errors (table)."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        seen = rng.normal(50, 1, 4)
        low, high = np.quantile(resampled([flat(*seen)], 0, rng)[:, 0], [0.025, 0.975])
        covered.append(low <= 50 <= high)
    assert 0.91 <= np.mean(covered) <= 0.99  # without widening: about 0.8


def study(rng, seeds, images, truth):
    """Scores whose seeds move together and apart, on finitely many test images."""
    common = rng.normal(0, 1.0, seeds)

    def measured(labels):
        share = np.clip(planted(labels) + common + rng.normal(0, 0.7, seeds), 0, 100) / 100
        return flat(*(100 * rng.binomial(images, share) / images))

    return {n: measured(n) for n in COUNTS}, measured(truth)


@pytest.mark.parametrize(("seeds", "images"), [(3, 600), (3, 10_000), (5, 10_000)])
def test_the_interval_covers_the_planted_truth(seeds, images):
    hits = []
    for number in range(100):
        truth = (600, 1500, 3500)[number % 3]
        low, high = value(*study(np.random.default_rng(number), seeds, images, truth), images).interval
        hits.append(low <= truth <= high)
    assert np.mean(hits) >= 0.9


def test_one_seed_has_the_noise_of_the_test_set():
    """Seeds that do not differ: with one of them, the images alone decide."""
    hits = []
    for number in range(200):
        rng = np.random.default_rng(number)
        scores = {n: flat(100 * rng.binomial(600, planted(n) / 100) / 600) for n in (*COUNTS, 1500)}
        low, high = value({n: scores[n] for n in COUNTS}, scores[1500], 600).interval
        hits.append(low <= 1500 <= high)
    assert np.mean(hits) >= 0.9
    drawn = resampled([flat(60.0)], 600, np.random.default_rng(0))
    assert len(drawn) == RESAMPLES and drawn.std() == pytest.approx(2.0, rel=0.05)  # 100 sqrt(0.6 x 0.4 / 600)


# Finding the scale among a study's arms


def recipe(labels, init=None, source="cifar10:x", student="resnet18", kind="finetune", **data):
    return {
        "name": f"r_{labels}",
        "data": {"source": source, "labels": labels, "image_size": None, "augment": "flip", **data},
        "method": {"kind": kind, "student": {"name": student}, "init": init},
        "train": {"steps": 100},
        "evaluate": {"probe_labels": [labels or 1], "source": None},
    }


def arm(made, *scores, images=10_000, **result):
    results = [{"scores": {"top1": s, "linear_probe_50": 1.0, "test_images": images}} | result for s in scores]
    return made, dict(enumerate(results))


ARMS = {f"scratch_{n}": arm(recipe(n), planted(n), planted(n) + 1) for n in COUNTS}


def test_a_studys_scale_is_found_and_its_arms_valued():
    tuned = arm(recipe(500, init="stage:a"), planted(1000), planted(1000) + 1, labels_seen={"student": 500})
    (found,) = worth(ARMS | {"tuned": tuned})
    assert list(found["scale"]) == ["500", "1000", "2000", "4000"] and found["scale_arms"] == list(ARMS)
    assert found["seeds"] == 2 and found["test_images"] == 10_000 and list(found["arms"]) == ["tuned"]
    one = found["arms"]["tuned"]
    assert (one["labels"], one["words"], one["times"], one["own_labels"]) == (1000.0, "1,000", "2", 500)
    low, high = one["interval"]
    assert low <= 1000 <= high and "fewer than" not in one["words"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_only_like_is_held_against_like():
    left_out = {
        "other student": arm(recipe(500, init="stage:a", student="resnet34"), 60.0),
        "other images": arm(recipe(500, init="stage:a", source="digits"), 60.0),
        "other size": arm(recipe(500, init="stage:a", image_size=64), 60.0),
        "probed": (recipe(500, kind="repfusion"), {0: {"scores": {"linear_probe_50": 60.0, "test_images": 10}}}),
        "images": ({"kind": "generation", "model": "m"}, {0: {"scores": {"fid": 3.0}}}),
        "unfinished": (recipe(500, init="stage:a"), {}),
    }
    assert worth(ARMS | left_out) == []  # a scale, and nothing to value on it
    drawn = recipe(2000, init=None, source="synthetic:stage:set") | {"evaluate": {"source": "cifar10:x"}}
    (found,) = worth(ARMS | left_out | {"drawn": arm(drawn, 60.0)})
    assert list(found["arms"]) == ["drawn"] and found["arms"]["drawn"]["own_labels"] is None
    assert found["arms"]["drawn"]["times"] is None and found["seeds"] == 1


def test_no_scale_without_two_counts_that_differ_in_nothing_else():
    tuned = {"tuned": arm(recipe(500, init="stage:a"), 60.0)}
    one = {"a": ARMS["scratch_500"]}
    longer = {"b": (recipe(1000) | {"train": {"steps": 200}}, ARMS["scratch_1000"][1])}
    assert worth(one | tuned) == [] and worth(one | longer | tuned) == [] and worth({}) == []


def test_a_scale_of_all_labels_is_counted_by_what_was_seen():
    arms = {
        "few": arm(recipe(500), 50.0, labels_seen={"student": 500}),
        "all": arm(recipe(None), 80.0, labels_seen={"student": 50_000}),
        "tuned": arm(recipe(500, init="stage:a"), 90.0, labels_seen={"student": 500}),
    }
    (found,) = worth(arms)
    assert list(found["scale"]) == ["500", "50000"]
    best = found["arms"]["tuned"]
    assert (best["labels"], best["words"], best["times"]) == (None, "more than 50,000", "more than 100")
    assert best["interval"] == [None, None] and best["interval_words"] == "more than 50,000"


def test_labels_of_the_first_stage_are_its_own_and_those_of_its_teacher_are_not():
    behind = {"before: task head": 2000, "before: teacher: diffusion model": 50_000}
    assert own_labels(arm(recipe(500), 1.0, labels_seen={"student": 500}, labels_behind=behind)) == 2000
    assert own_labels(arm(recipe(None, kind="dmkd"), 1.0, labels_seen={})) is None


@pytest.mark.parametrize(
    ("number", "most", "expected"),
    [
        (1833.3, 4000, "1,830"),
        (0, 4000, "fewer than 500"),
        (math.inf, 1078, "more than 1,078"),
        (1077.9, 1078, "1,078"),
        (999.6, 4000, "1,000"),
        (612.4, 4000, "612"),
    ],
)
def test_numbers_of_labels_in_words(number, most, expected):
    assert said(number, (500, most)) == expected


def test_times_in_words():
    assert [said(n, (1 / 3, 200 / 3)) for n in (0, 0.8765, 3.6667, 21.6, math.inf)] == [
        "fewer than 0.34",
        "0.876",
        "3.67",
        "22",
        "more than 66",
    ]
