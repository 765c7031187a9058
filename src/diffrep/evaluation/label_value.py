"""What a score is worth in labels: how many of them the same student needs from scratch to score the same.

The scale is measured, not assumed: from-scratch scores at several label counts, made to rise with the count (isotonic
regression) and joined by straight lines over the logarithm of the count. Nothing is said of what lies beyond its ends.

What the 95 % interval covers: the spread over seeds of the scale and of the arm (labelled images drawn, initialisation,
order of the data), and the drawing of the test images. Seeds are resampled together where all scores have the same
ones; deviations are widened as Student's t asks for so few. The test set's binomial noise is counted once for each
mean, in full and independently, although the scores share their images: it is on the careful side. With one seed only
the test set's noise is in it. It does not cover that the truth between two counts is no straight line.

Letters: K label counts of the scale, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 4000
INSIDE = 0.95
SCORE = "top1"  # of a network's own last layer; a probe's score, with labels of its own, is not held against it
# What a recipe says that does not change the student: the rest of two points of one scale is alike, but the labels.
SAYS = ("format", "name", "about", "seed", "published", "ours", "assumed", "needs", "evaluate")
# Kinds of data whose labels are none of real images.
NOT_REAL = ("synthetic", "generated", "photographs", "one_image", "noise")

Scores = Mapping[int, float]  # seed -> percent
Arm = tuple[Mapping[str, Any], Mapping[int, Mapping[str, Any]]]  # a recipe, and its results by seed


@dataclass(frozen=True)
class Worth:
    """A number of labels; 0: fewer than the scale's least count, inf: more than its largest.

    interval: the 95 % ends, likewise; None where neither seeds nor test images say anything.
    """

    labels: float
    interval: tuple[float, float] | None


def label_value(scale: Mapping[int, Scores], arm: Scores, test_images: int, rng: np.random.Generator) -> Worth:
    """How many labels of the scale give the arm's mean score.

    Args:
        scale: label count -> scores by seed, at least two counts.
        arm: scores by seed of what is valued.
        test_images: how many images a score is measured on; 0: not known, then their noise is left out.
        rng: of the resampling.
    """
    counts = np.array(sorted(scale), dtype=float)
    points = [scale[n] for n in sorted(scale)]
    means = np.array([[_mean(p) for p in (*points, arm)]])
    found = float(reached(isotonic(means[:, :-1]), counts, means[:, -1], np.less)[0])
    if not test_images and all(len(p) < 2 for p in (*points, arm)):
        return Worth(found, None)
    drawn = resampled([*points, arm], test_images, rng)
    curves, tail = isotonic(drawn[:, :-1]), (1 - INSIDE) / 2
    ends = ((np.less, tail), (np.less_equal, 1 - tail))
    low, high = (
        float(np.quantile(reached(curves, counts, drawn[:, -1], below), q, method="inverted_cdf")) for below, q in ends
    )
    return Worth(found, (min(low, found), max(high, found)))  # few resamples could leave out what was measured


def isotonic(scores: np.ndarray) -> np.ndarray:
    """(R, K) -> (R, K), the nearest rising sequence by least squares.

    Source: the min-max formula of Robertson, Wright and Dykstra, Order Restricted Statistical Inference (1988), 1.4.
    """
    ends = range(scores.shape[1])
    mean = {(j, k): scores[:, j : k + 1].mean(1) for j in ends for k in ends if j <= k}
    lowest = {(j, i): np.min([mean[j, k] for k in ends if k >= i], 0) for j in ends for i in ends if j <= i}
    return np.stack([np.max([lowest[j, i] for j in range(i + 1)], 0) for i in ends], 1)


def reached(curves: np.ndarray, counts: np.ndarray, scores: np.ndarray, below: Callable[..., Any]) -> np.ndarray:
    """Where each rising curve reaches its score, (R,): 0 before its first count, inf after its last.

    Where it is level at the score, ``below`` decides: ``np.less`` finds the fewest labels, ``np.less_equal`` the most.

    Args:
        curves: (R, K) scores at the counts; counts: (K,) labels, rising; scores: (R,).
    """
    rows, last, passed = np.arange(len(curves)), len(counts) - 1, below(curves, scores[:, None]).sum(1)
    left, right = np.clip(passed - 1, 0, last), np.clip(passed, 0, last)
    low, high, logs = curves[rows, left], curves[rows, right], np.log(counts)
    part = np.divide(scores - low, high - low, out=np.zeros(len(rows)), where=high > low)
    found = np.exp(logs[left] + part * (logs[right] - logs[left]))
    return np.where(scores < curves[:, 0], 0.0, np.where(scores > curves[:, last], np.inf, found))


def resampled(points: Sequence[Scores], test_images: int, rng: np.random.Generator) -> np.ndarray:
    """Means of every point as other seeds and other test images might have given them, (R, points) in percent.

    A resample of n seeds spreads too little by sqrt((n - 1) / n), and does not know how unsure a spread of n values is;
    dividing by the root of a chi-squared draw makes normal scores' deviations those of Student's t.
    """
    together = len({tuple(sorted(p)) for p in points}) == 1
    size = len(points[0])
    shared, unsure = rng.integers(size, size=(RESAMPLES, size)), _unsure(size, rng)
    columns = []
    for point in points:
        values, n = np.array([point[seed] for seed in sorted(point)]), len(point)
        draw, factor = (shared, unsure) if together else (rng.integers(n, size=(RESAMPLES, n)), _unsure(n, rng))
        columns.append(values.mean() + factor * (values[draw].mean(1) - values.mean()))
    means = np.clip(np.stack(columns, 1), 0, 100)
    return 100 * rng.binomial(test_images, means / 100) / test_images if test_images else means


def _unsure(seeds: int, rng: np.random.Generator) -> np.ndarray:
    """(R,) what deviations of resampled means are multiplied by."""
    return np.sqrt(seeds / rng.chisquare(seeds - 1, RESAMPLES)) if seeds > 1 else np.ones(RESAMPLES)


def _mean(scores: Scores) -> float:
    return float(np.mean(list(scores.values())))


def worth(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Every scale among the arms, with what the other arms of its student and its test images are worth on it.

    Returns:
        plain values, a dict per scale: ``scale`` label count -> mean score; ``arms`` name -> score, labels of its own,
        the number of labels and its interval (None: beyond the scale), and the same in words. Equal scores give equal
        intervals. Empty where no arms differ in ``data.labels`` alone.
    """
    groups: dict[str, dict[int, str]] = {}
    for name, arm in arms.items():
        if _is_from_scratch(arm[0]) and _scores(arm) and (count := own_labels(arm)):
            groups.setdefault(_but_for_labels(arm[0]), {})[count] = name
    return [row for points in groups.values() if len(points) > 1 if (row := _on_scale(points, arms))["arms"]]


def _on_scale(points: Mapping[int, str], arms: Mapping[str, Arm]) -> dict[str, Any]:
    """points: label count -> name."""
    names = [points[n] for n in sorted(points)]
    alike = _measured(arms[names[0]][0])
    valued = [n for n, arm in arms.items() if n not in names and _scores(arm) and _measured(arm[0]) == alike]
    scale = {n: _scores(arms[points[n]]) for n in sorted(points)}
    everything = [arms[name] for name in (*names, *valued)]
    scored = [r["scores"] for _, results in everything for r in results.values() if r.get("scores")]
    images = min(int(scores.get("test_images") or 0) for scores in scored)
    return {
        "score": SCORE,
        "student": str(arms[names[0]][0]["method"]["student"]["name"]),
        "test_images": images,
        "scale": {str(n): round(_mean(scores), 3) for n, scores in scale.items()},
        "scale_arms": names,
        "seeds": min(len(_scores(arm)) for arm in everything),
        "arms": {name: _valued(scale, arms[name], images) for name in valued},
    }


def _valued(scale: Mapping[int, Scores], arm: Arm, images: int) -> dict[str, Any]:
    own, ends = own_labels(arm), (min(scale), max(scale))
    found = label_value(scale, _scores(arm), images, np.random.default_rng(0))
    interval = found.interval
    return {
        "score": round(_mean(_scores(arm)), 3),
        "own_labels": own,
        "labels": _inside(found.labels),
        "interval": [_inside(end) for end in interval] if interval else None,
        "words": said(found.labels, ends),
        "interval_words": said_between(interval, ends) if interval else None,
        "times": said(found.labels / own, (ends[0] / own, ends[1] / own)) if own else None,
    }


def _inside(labels: float) -> float | None:
    return round(labels, 1) if 0 < labels < np.inf else None


def said(number: float, ends: tuple[float, float]) -> str:
    """``1,830``, ``fewer than 500`` or ``more than 4,000``: three digits, and never beyond the ends of the scale."""
    if number == 0:
        return f"fewer than {_careful(ends[0], np.ceil)}"
    if number == np.inf:
        return f"more than {_careful(ends[1], np.floor)}"
    return _plain(min(max(float(f"{number:.3g}"), ends[0]), ends[1]))


def said_between(interval: tuple[float, float], ends: tuple[float, float]) -> str:
    """``1,410 to 2,260``; said once where both ends lie beyond the same end of the scale."""
    return " to ".join(dict.fromkeys(said(end, ends) for end in interval))


def _careful(end: float, towards: Callable[[float], float]) -> str:
    """An end of the scale, rounded so that what is said of it stays true."""
    parts = 1 if end >= 10 else 100
    return _plain(towards(round(end * parts, 6)) / parts)


def _plain(number: float) -> str:
    """Whole from ten on, below with three digits."""
    return f"{number:,.0f}" if number >= 10 or number == round(number) else f"{float(f'{number:.3g}'):g}"


def own_labels(arm: Arm) -> int | None:
    """How many labels of real images its training read, and that of the student it started from; None: none."""
    recipe, results = arm
    first = next(iter(results.values()), {})
    if _is_made(recipe):
        return None
    behind = first.get("labels_behind") or {}
    before = {part: n for part, n in behind.items() if part.startswith("before:") and part.count(":") == 1}
    seen = first["labels_seen"] if "labels_seen" in first else {"recipe": recipe["data"].get("labels") or 0}
    return max((*seen.values(), *before.values()), default=0) or None


def _scores(arm: Arm) -> dict[int, float]:
    """The score that scales are made of, by seed; empty where it was not measured."""
    found = {seed: (result.get("scores") or {}).get(SCORE) for seed, result in arm[1].items()}
    return {seed: float(score) for seed, score in found.items() if isinstance(score, int | float)}


def _is_made(recipe: Mapping[str, Any]) -> bool:
    return str(recipe["data"]["source"]).partition(":")[0] in NOT_REAL


def _is_from_scratch(recipe: Mapping[str, Any]) -> bool:
    method = recipe.get("method") or {}
    return method.get("kind") == "finetune" and not method.get("init") and not _is_made(recipe)


def _but_for_labels(recipe: Mapping[str, Any]) -> str:
    """Everything that two points of one scale share."""
    kept = {k: v for k, v in recipe.items() if k not in SAYS} | {"measured": _measured(recipe)}
    return json.dumps(kept | {"data": {k: v for k, v in recipe["data"].items() if k != "labels"}}, sort_keys=True)


def _measured(recipe: Mapping[str, Any]) -> list[Any]:
    """What must be alike for two scores to be held against each other: student, test images, their size."""
    data, source = recipe.get("data") or {}, (recipe.get("evaluate") or {}).get("source")
    return [(recipe.get("method") or {}).get("student"), source or data.get("source"), data.get("image_size")]
