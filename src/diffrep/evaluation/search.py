"""The best pair of tap and noise level at a small share of a grid's passes.

All taps are read at every noise level on few images; half of the levels stay for twice as many, and again (successive
halving: Jamieson and Talwalkar 2016). Beside the best, on the side of the second best, golden section in log sigma
looks for a better one (Kiefer 1953). Taps cost no passes of their own, so only those clearly behind are dropped, and
the last word between the others is spoken on many images at one level: with few labels another tap may lead.

Few images make rough curves, so they are used well. A pair is scored by leaving out one training image at a time:
every image both teaches and tests. All pairs see the same images with the same noise; those of a rung are among those
of the next and are not read again. Levels are compared by an accuracy with a soft step, which counts images near the
border in part: over all taps and smoothed along log sigma while images are few, at the leading tap in the end. And test
images take no part, so the pair is not chosen by them. The rule supposes one maximum along the noise levels, as found
for models that generalise (arXiv 2502.05743).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrep.data.datasets import label_subset
from diffrep.errors import UserError
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.levels import Level, last_of, nearest_level
from diffrep.evaluation.probe import left_out_margins, smoothed_accuracy
from diffrep.evaluation.streaming import Chosen, Tick, teacher_reader
from diffrep.evaluation.sweep import Bench, gathered
from diffrep.frozen.diffusion import DiffusionTeacher

GRID_LEVELS = 20  # of the grid that the cost is a share of
REFINEMENTS = 2  # steps of golden section; each adds a level, read on as many images as the last of halving
LAST_SHARE = 3  # of the budget, the last rung takes at most one part in so many
LEAST_PER_CLASS = 2  # images of the first rung
MOST_IMAGES, MOST_PER_CLASS = 8192, 32  # of the last rung, whatever the budget: its features are held in memory
GOLDEN = (3 - math.sqrt(5)) / 2  # 0.382
CLEARLY = 2.0  # standard errors of a difference that a tap may lie behind
STEP = 0.1  # width of the soft step, in units of a one-hot label
BANDWIDTH = 0.7  # of the smoothing, in log sigma: of the default levels 1.2 of their distance


@dataclass(frozen=True)
class Plan:
    """What a search will take at most.

    rungs: (images, noise levels) of each: halving, golden section, and all taps that are left at one level.
    grid_passes: of the grid of ``GRID_LEVELS`` levels on all images.
    """

    rungs: tuple[tuple[int, int], ...]
    grid_passes: int

    @property
    def passes(self) -> int:
        """A level that stays is read on the new images only."""
        *halving, (more, added), (most, _) = self.rungs
        before = [0, *(images for images, _ in halving)]
        grown = sum((images - had) * count for had, (images, count) in zip(before, halving, strict=False))
        return grown + more * added + most - more

    @property
    def control_passes(self) -> int:
        """Of an untrained network beside the last rung; not part of the search."""
        return self.rungs[-1][0]


def plan_of(bench: Bench, levels: int) -> Plan:
    """The largest rungs that the budget allows, the last taking at most its share.

    Raises:
        UserError: fewer than three levels; a budget that leaves too few images to compare by.
    """
    if levels < 3:
        raise UserError(f"a search needs at least 3 noise levels to start from, not {levels}")
    config, grid, classes = bench.config, GRID_LEVELS * bench.passes, bench.num_classes
    most = min(len(bench.train), max(MOST_IMAGES, MOST_PER_CLASS * classes))
    budget = int(config.budget * grid)
    last = min(budget // LAST_SHARE, most)
    shape = ((1, levels), (2, -(-levels // 2)), (4, 2), (4, REFINEMENTS))
    units = Plan((*shape, (4, 1)), grid).passes  # of the first rung's images; the last rung adds what goes beyond 4
    first = min((budget - last) // (units - 4), last // 5)
    least = LEAST_PER_CLASS * classes
    if first < least:
        told = f"{max(first, 0)} images at each of {levels} noise levels are too few for {classes} classes"
        hint = "raise it, or measure the grid instead"
        raise UserError(f"search: a budget of {config.budget:g} of the grid's {grid} passes: {told}; {hint}")
    return Plan((*((images * first, count) for images, count in shape), (last, 1)), grid)


Scores = tuple[float, float]  # left-out accuracy in percent: counted, which is reported; with a soft step
Table = dict[Level, dict[str, Scores]]  # level -> tap -> scores


class Searcher:
    """Measures pairs on the first images of one label draw, and counts what that takes."""

    def __init__(self, teacher: DiffusionTeacher, bench: Bench, device: torch.device, kept: Kept, tick: Tick) -> None:
        self.teacher, self.bench, self.device, self.kept, self.tick = teacher, bench, device, kept, tick
        self.passes = self.multiply_adds = 0
        self.counted: dict[tuple[str, int], int] = {}  # (network, timestep) -> images that went through it
        self.held: dict[tuple[str, int], tuple[Tensor, dict[str, Tensor]]] = {}  # positions and features read so far

    def table(self, levels: Sequence[Level], taps: Sequence[str], images: int) -> Table:
        """Every pair, on the same images; what was read at other levels is let go."""
        stay = {(self.teacher.name, level.timestep) for level in levels}
        self.held = {key: found for key, found in self.held.items() if key in stay}
        return {level: self.scores(self.teacher, level, taps, images) for level in levels}

    def scores(self, teacher: DiffusionTeacher, level: Level, taps: Sequence[str], images: int) -> dict[str, Scores]:
        """Tap -> left-out scores on the first ``images`` training images of the label draw."""
        key = teacher.name, level.timestep
        new = max(images - self.counted.get(key, 0), 0)
        self.counted[key] = self.counted.get(key, 0) + new
        self.passes += new
        self.multiply_adds += new * teacher.multiply_adds(last_of(teacher, taps))
        name = f"{teacher.name}, t={level.timestep}, {images} images"
        return self.kept.once(name, lambda: self._measured(teacher, level, taps, images))

    def _measured(self, teacher: DiffusionTeacher, level: Level, taps: Sequence[str], images: int) -> dict[str, Scores]:
        bench, config, key = self.bench, self.bench.config, (teacher.name, level.timestep)
        train = bench.train.images
        assert train.labels is not None  # refused before
        before, had = self.held.get(key, (torch.empty(0, dtype=torch.int64), {}))
        new = label_subset(train.labels, images, bench.seed)[len(before) :].sort().values
        read = teacher_reader(teacher, level.timestep, taps, config.pool, config.noise, bench.seed, self.device)
        found = gathered(read, Chosen(train, new), self.tick)
        joined = {tap: torch.cat([had[tap], x]) if had else x for tap, x in found.items()}
        positions = torch.cat([before, new])
        self.held[key] = positions, joined
        labels = train.labels.cpu()[positions]
        margins = {tap: left_out_margins(joined[tap], labels, bench.num_classes) for tap in taps}
        return {tap: (smoothed_accuracy(m, 0), smoothed_accuracy(m, STEP)) for tap, m in margins.items()}


def search(
    searcher: Searcher,
    plan: Plan,
    levels: Sequence[Level],
    taps: Sequence[str],
    untrained: DiffusionTeacher | None = None,
) -> dict[str, Any]:
    """Rungs, refinement, last word: the pair, what every rung measured, what it took.

    Returns:
        best: the row of the pair found; rungs: {images, rows} each; control: the rows of the untrained network at the
        best level; notes: what to doubt; passes, planned_passes, grid_passes and share_of_grid.
    """
    by_sigma = sorted(levels, key=lambda level: level.sigma)
    *halving, (more, _), (most, _) = plan.rungs
    rungs, table, left = [], Table(), by_sigma
    for images, count in halving:
        left = higher(table, taps, count) if table else left
        table = searcher.table(left, taps, images)
        rungs.append(told(table, images))
        taps = not_behind(table, taps, images)
    refined = refine(searcher, table, by_sigma, taps, more)
    rungs.append(told(refined, more))
    at = highest(table | refined, leading(table, taps))
    rungs.append(told(searcher.table([at], taps, most), most))
    best, passes = max(rungs[-1]["rows"], key=lambda row: row["mean"]), searcher.passes
    control = told({at: searcher.scores(untrained, at, taps, most)}, most)["rows"] if untrained else []
    return {
        "best": best | {"images": most},
        "rungs": rungs,
        "control": control,
        "notes": doubts(at, by_sigma),
        "passes": passes,
        "planned_passes": plan.passes,
        "grid_passes": plan.grid_passes,
        "share_of_grid": round(passes / plan.grid_passes, 5),
    }


def told(table: Table, images: int) -> dict[str, Any]:
    rows = [
        {"tap": tap, **level.told(), "mean": round(v[0], 3)} for level, by in table.items() for tap, v in by.items()
    ]
    return {"images": images, "rows": rows}


def higher(table: Table, taps: Sequence[str], count: int) -> list[Level]:
    """The ``count`` levels where the mean over the taps is highest once smoothed, in order of sigma."""
    levels = sorted(table, key=lambda level: level.sigma)
    curve = smoothed([math.log(level.sigma) for level in levels], [mean_over(table, level, taps) for level in levels])
    chosen = sorted(range(len(levels)), key=lambda k: -curve[k])[:count]
    return [levels[k] for k in sorted(chosen)]


def leading(table: Table, taps: Sequence[str]) -> str:
    """The tap with the highest point."""
    return max(taps, key=lambda tap: max(row[tap] for row in table.values()))


def highest(table: Table, tap: str) -> Level:
    """The level where one tap is highest: levels that are too few and too close to be smoothed."""
    return max(table, key=lambda level: table[level][tap][1])


def mean_over(table: Table, level: Level, taps: Sequence[str]) -> float:
    return sum(table[level][tap][1] for tap in taps) / len(taps)


def not_behind(table: Table, taps: Sequence[str], images: int) -> list[str]:
    """The taps whose highest point is not clearly below that of the best one.

    Clearly: by ``CLEARLY`` standard errors of a difference of two binomial shares, the two taken as independent; on the
    same images the true error is smaller.
    """
    x = [math.log(level.sigma) for level in table]
    tops = {tap: max(smoothed(x, [row[tap][0] for row in table.values()])) for tap in taps}
    best = max(tops.values())
    error = 100 * math.sqrt(2 * max(best * (100 - best) / 1e4, 1 / images) / images)
    return [tap for tap in taps if tops[tap] >= best - CLEARLY * error]


def smoothed(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """y(x) by local lines with Gaussian weights of ``BANDWIDTH``; two points stay what they are.

    Lines rather than means: at the ends a mean would lean towards the inside (Fan and Gijbels 1996, section 3.2).
    """
    return [_local_line([k - at for k in x], y, value) for at, value in zip(x, y, strict=True)]


def _local_line(away: Sequence[float], y: Sequence[float], otherwise: float) -> float:
    """The height of the weighted line at 0; ``otherwise`` where all points lie there."""
    weights = [math.exp(-0.5 * (d / BANDWIDTH) ** 2) for d in away]
    s0, s1, s2 = (sum(w * d**k for w, d in zip(weights, away, strict=True)) for k in range(3))
    spread = s0 * s2 - s1**2
    if spread < 1e-9 * s0**2:
        return otherwise
    return sum(w * (s2 - s1 * d) * v for w, d, v in zip(weights, away, y, strict=True)) / spread


def refine(searcher: Searcher, table: Table, by_sigma: Sequence[Level], taps: Sequence[str], images: int) -> Table:
    """Golden section in log sigma, from the best level so far to its neighbour on the side of the second best; what it
    measured.
    """
    measured, refined, tap = dict(table), Table(), leading(table, taps)
    centre, second = sorted(table, key=lambda level: -table[level][tap][1])[:2]
    middle, beside = (
        math.log(centre.sigma),
        by_sigma[by_sigma.index(centre) + (1 if second.sigma > centre.sigma else -1)],
    )
    bracket: Bracket = tuple(sorted((math.log(beside.sigma), middle, middle)))
    for _ in range(REFINEMENTS):
        point = golden_point(bracket)
        level = nearest_level(searcher.teacher.schedule, math.exp(point))
        if level in measured:  # the schedule has no timestep between
            break
        measured[level] = refined[level] = searcher.scores(searcher.teacher, level, taps, images)
        is_better = measured[level][tap][1] > measured[centre][tap][1]
        bracket, centre = narrowed(bracket, point, is_better), level if is_better else centre
    return refined


Bracket = tuple[float, ...]  # low, middle, high, in log sigma


def golden_point(bracket: Bracket) -> float:
    """The next point of a golden section: in the longer part, 0.382 of it away from the middle."""
    low, middle, high = bracket
    return middle + GOLDEN * (high - middle if high - middle > middle - low else low - middle)


def narrowed(bracket: Bracket, point: float, is_better: bool) -> Bracket:
    """The bracket around the higher of its middle and a new point inside it."""
    low, middle, high = bracket
    if is_better:
        return (middle, point, high) if point > middle else (low, point, middle)
    return (low, middle, point) if point > middle else (point, middle, high)


def doubts(at: Level, by_sigma: Sequence[Level]) -> list[str]:
    """What a reader should know: no maximum inside the range."""
    if at not in (by_sigma[0], by_sigma[-1]):
        return []
    end = "lowest" if at == by_sigma[0] else "highest"
    note = f"the best is at the {end} noise level searched, sigma {at.sigma:.3g}: the curve has no maximum inside"
    falls = "; a curve that falls from the start may mean that the model memorises (arXiv 2502.05743)"
    return [note + (falls if end == "lowest" else "; search further up")]
