"""The page docs/results/probe.md: the probe over noise levels on CIFAR-10, and the search against the whole grid.

``make evidence-probe`` needs $DIFFREP_DATA and about half an hour of CPU; what it measured is kept level by level in
runs/evidence-probe and recorded in docs/results/data/probe/. The page is written from that record alone.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch

from diffrep.data.datasets import DataConfig, ImageSet, label_subset, load_data
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.label_free import rank_correlation
from diffrep.evaluation.levels import level_at, levels_of, log_spaced
from diffrep.evaluation.probing import Probe
from diffrep.evaluation.search import GRID_LEVELS
from diffrep.evaluation.streaming import PIXEL_SIDE, Chosen, Read, pixel_reader, streamed, teacher_reader
from diffrep.evaluation.sweep import SweepConfig, labelled
from diffrep.files import located, read_json, write_json
from diffrep.frozen.diffusion import DiffusionTeacher

TEACHER, DATA = "weights/ddpm_cifar10_small", "cifar10:data/cifar10"
TAPS, POOL = ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"), 2
COUNTS, HELD_OUT, SEED = (1000, 5000), 2000, 0
TRIAL_CLEAN, TRIAL_NOISED = (0, 10, 25, 50, 100, 200, 400, 800), (25, 50, 100, 200, 400)
SEARCHES = ((0.09, range(5)), (0.05, range(5)))  # budget, seeds
RESULTS = Path("docs/results")
RECORD, TRIAL = RESULTS / "data/probe/cifar10.json", RESULTS / "data/probe/earlier_trial.json"
WORK = Path("runs/evidence-probe")


# Measuring


class Measured:
    """One set of images and one rule: for each level all taps, both pools and both label counts from one pass."""

    def __init__(self) -> None:
        config = DataConfig(source=DATA)
        self.train, self.test = load_data(config, "train"), load_data(config, "test")
        self.teacher = load(str(located(TEACHER)))
        assert self.train.labels is not None
        self.held_out = Chosen(self.test, labelled(self.test, HELD_OUT, SEED))
        order = label_subset(self.train.labels, COUNTS[-1], SEED)
        self.parts = [Chosen(self.train, part.sort().values) for part in order.tensor_split(COUNTS[:-1])]
        self.of = {"teacher": self.teacher.sha256, "training set": self.train.fingerprint}
        self.kept = Kept(WORK / "levels.json", self.of)

    def cells(self, name: str, read: Read) -> dict[str, Any]:
        """Reading -> accuracies at 1,000 and 5,000 labels, and the label-free score."""

        def make() -> dict[str, Any]:
            began = time.process_time()
            found = streamed(read, self.parts, self.held_out, len(self.train.classes), SEED)
            print(f"{name}: {time.process_time() - began:.1f} CPU s", flush=True)
            return {n: {"accuracies": a, "label_free": found.ratios[n]} for n, a in found.accuracies.items()}

        return self.kept.once(name, make)

    def level(
        self, timestep: int, noise: Literal["forward"] | None = None, untrained: DiffusionTeacher | None = None
    ) -> dict[str, Any]:
        name = f"{'untrained ' if untrained else ''}t={timestep}{' noised' if noise else ''}"
        level = level_at(self.teacher.schedule, timestep)
        return {"name": name, **level.told()} | {
            "cells": self.cells(name, both_pools(untrained or self.teacher, timestep, noise))
        }

    def search(self, budget: float, seed: int) -> dict[str, Any]:
        """One search with its own draw of images, and what the grid's rule says of the pair it finds."""
        config = SweepConfig(
            taps=TAPS, pool=POOL, train_images=COUNTS[-1], held_out_images=HELD_OUT, search=True, budget=budget
        )
        probe = Probe(self.teacher, self.train, self.test, config, seed, torch.device("cpu"))
        kept = Kept(WORK / f"search-{budget:g}-s{seed}.json", self.of)
        found = probe.run(kept, lambda *_: None, lambda: False)
        best, took = found["best"], found["search"]
        judged = self.level(best["timestep"])["cells"][f"{best['tap']} 2x2"]["accuracies"][-1]
        print(f"search {budget:g}, seed {seed}: {best['tap']} t={best['timestep']} {judged:.2f}", flush=True)
        kept_of_search = {key: took[key] for key in ("passes", "share_of_grid", "grid_passes", "notes")}
        return {"budget": budget, "seed": seed, "best": best, "judged": judged} | kept_of_search


def load(reference: str) -> DiffusionTeacher:
    from diffrep.api import load_teacher

    return load_teacher(reference)


def both_pools(teacher: DiffusionTeacher, timestep: int, noise: Literal["forward"] | None) -> Read:
    """Readings at 2x2 from the network; those at 1x1 are the means of their four cells: all maps have even sides."""
    read = teacher_reader(teacher, timestep, TAPS, POOL, noise, SEED, torch.device("cpu"))

    def both(images: ImageSet, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        found = read(images, positions)
        small = {f"{tap} 1x1": x.unflatten(1, (-1, POOL**2)).mean(2) for tap, x in found.items()}
        return small | {f"{tap} 2x2": x for tap, x in found.items()}

    return both


def measure() -> None:
    bench = Measured()
    grid = [level.timestep for level in levels_of(bench.teacher.schedule, sigmas=log_spaced(GRID_LEVELS))]
    levels = [bench.level(t) for t in sorted({*grid, *TRIAL_CLEAN})]
    levels += [bench.level(t, "forward") for t in TRIAL_NOISED]
    levels.append(bench.level(0, untrained=load(f"random:{located(TEACHER)}")))
    found = {"grid": grid, "pixels": bench.cells("pixels", pixel_reader(PIXEL_SIDE))["pixels"], "levels": levels}
    searches = [bench.search(budget, seed) for budget, seeds in SEARCHES for seed in seeds]
    write_json(RECORD, found | {"searches": searches})


# Writing

READINGS = [f"{tap} {pool}" for tap in TAPS for pool in ("1x1", "2x2")]
OPENING = f"""# Probe: measured

Made by `make evidence-probe`, one thread on a CPU. Teacher: a diffusion model of CIFAR-10 with 2.6 million parameters,
trained for 49 minutes on two cores (`{TEACHER}`), no labels. Ridge probe on features pooled to 1x1 or 2x2
cells, standardised, penalty by generalised cross validation on the training images; {COUNTS[0]:,} or {COUNTS[1]:,}
labelled training images, {HELD_OUT:,} test images, class-balanced draws of seed {SEED}. Each 2x2 number is what
`diffrep probe {TEACHER} --data {DATA} --taps {",".join(TAPS)} --pool 2 --images {COUNTS[1]} --test-images {HELD_OUT}`
prints at that level (with `--images {COUNTS[0]}` the first number). One score is sure to about ± 1.1 points, but all
cells share their images, so differences along a column are surer than that.
"""


def probe_page() -> str:
    """From the record alone; empty without one."""
    if not RECORD.exists():
        return ""
    found, trial = read_json(RECORD), read_json(TRIAL)
    levels = {level["name"]: level for level in found["levels"]}
    parts = [OPENING, *_table(found, levels), *_shape(levels, trial), *_grid(found, levels), *_searches(found, levels)]
    return "\n".join(parts)


def _score(level: dict[str, Any], reading: str, count: int = 1) -> float:
    return level["cells"][reading]["accuracies"][count]


def _table(found: dict[str, Any], levels: dict[str, Any]) -> list[str]:
    """The levels of the earlier trial; the cells of a row are 1,000 / 5,000 labels."""
    names = [name for t in TRIAL_CLEAN for name in (f"t={t}", *([f"t={t} noised"] if t in TRIAL_NOISED else []))]
    rows = [_row(name, levels[name]) for name in [*names, "untrained t=0"]]
    pixels = " / ".join(f"{a:.1f}" for a in found["pixels"]["accuracies"])
    head = [r.replace("mid_block", "mid").replace("up_blocks.", "up") for r in READINGS]
    return [
        "## Taps and timesteps",
        "",
        f"| t, input | sigma | {' | '.join(head)} |",
        "|---" * (len(READINGS) + 2) + "|",
        *rows,
        "",
        f"Raw pixels pooled to 8x8 (192 numbers): {pixels}.",
        "",
    ]


def _row(name: str, level: dict[str, Any]) -> str:
    cells = [" / ".join(f"{a:.1f}" for a in level["cells"][r]["accuracies"]) for r in READINGS]
    words = name if "noised" in name else f"{name} clean"
    return f"| {words} | {level['sigma']:.3f} | {' | '.join(cells)} |"


def _shape(levels: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """Cell by cell against the earlier trial, then claim by claim."""
    pairs = [
        (_score(levels[name], reading, k), theirs)
        for name, cells in trial["levels"].items()
        for reading, both in cells.items()
        for k, theirs in enumerate(both)
    ]
    off = [ours - theirs for ours, theirs in pairs]
    rank = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
    return [
        "## Against an earlier trial",
        "",
        "The same teacher was probed before this package had the verb, by a script of its own (penalty: the best of "
        "four on the evaluation images; the first 2,000 test images; one draw). Of its "
        f"{len(pairs)} cells ours differ by {statistics.mean(off):+.1f} points on average, {_mean_abs(off):.1f} in "
        f"absolute terms, at most {max(map(abs, off)):.1f}; rank correlation {rank:.2f}. What it had found:",
        "",
        "| finding of the trial | there | here |",
        "|---|---|---|",
        *(f"| {claim} | {there} | {here} |" for claim, there, here in _claims(levels, trial)),
        "",
        *_reading(levels, trial),
    ]


def _reading(levels: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """What was found again and what was not, with the numbers of the two cells that differ most in kind."""

    def apart(name_: str, readings: list[str]) -> str:
        """Mean over these readings of ours less theirs, 1,000 / 5,000 labels."""
        names = [n for n in trial["levels"] if n.startswith("untrained") == (name_ == "untrained")]
        cells = [(levels[n]["cells"][r]["accuracies"], trial["levels"][n][r]) for n in names for r in readings]
        return " / ".join(f"{statistics.mean(ours[k] - theirs[k] for ours, theirs in cells):+.1f}" for k in (0, 1))

    return [
        "Found again: the best tap and pool; a flat top from t = 10 to 100 on clean images and the fall behind it; "
        "noised input level with clean at t = 25, lower at 100, no use from 400; the mid block, which the paper reads, "
        "some points below the best tap; trained far above pixels and above the untrained network.",
        "",
        f"Not found again: the untrained network is better here ({apart('untrained', READINGS)} points on average with "
        "1,000 / 5,000 labels), so the lead over its best tap is smaller with few labels. An untrained network is one "
        "draw of its weights, here another one. up_blocks.2 at 1x1, 32 numbers, is better here too "
        f"({apart('trained', ['up_blocks.2 1x1'])}); the rule for the penalty is another. Neither changes the order.",
        "",
    ]


def _mean_abs(values: list[float]) -> float:
    return statistics.mean(map(abs, values))


def _claims(levels: dict[str, Any], trial: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(claim, the trial's number, ours), each computed by the same rule from both tables."""
    ours = {name: {r: level["cells"][r]["accuracies"] for r in READINGS} for name, level in levels.items()}
    tables = (trial["levels"], ours)
    best = "up_blocks.1 2x2"

    def both(rule: Any) -> tuple[str, str]:
        there, here = (rule(table) for table in tables)
        return there, here

    def at(table: dict[str, Any], reading: str, count: int) -> dict[str, float]:
        return {f"t={t}": table[f"t={t}"][reading][count] for t in TRIAL_CLEAN}

    def best_reading(table: dict[str, Any]) -> str:
        tops = [max(READINGS, key=lambda r: max(at(table, r, k).values())) for k in (0, 1)]
        return " / ".join(tops)

    def peak(table: dict[str, Any]) -> str:
        curves = [at(table, best, k) for k in (0, 1)]
        return " / ".join(f"{max(c.values()):.1f} at {max(c, key=lambda t: c[t])}" for c in curves)

    def flat(table: dict[str, Any]) -> str:
        spans = [[at(table, best, k)[f"t={t}"] for t in (10, 25, 50, 100)] for k in (0, 1)]
        return " / ".join(f"{max(s) - min(s):.1f}" for s in spans)

    def falls(table: dict[str, Any]) -> str:
        return " / ".join(f"{max(c.values()) - c['t=800']:.1f}" for c in (at(table, best, k) for k in (0, 1)))

    def noise(t: int) -> Any:
        return lambda table: " / ".join(
            f"{table[f't={t} noised'][best][k] - table[f't={t}'][best][k]:+.1f}" for k in (0, 1)
        )

    def over(control: Any) -> Any:
        return lambda table: " / ".join(f"{max(at(table, best, k).values()) - control(table, k):.1f}" for k in (0, 1))

    def published(table: dict[str, Any]) -> str:
        """The mid block, where the paper reads, against the best tap, both at their best timestep."""
        mids = [max(max(at(table, f"mid_block {p}", k).values()) for p in ("1x1", "2x2")) for k in (0, 1)]
        return " / ".join(f"{max(at(table, best, k).values()) - mids[k]:.1f}" for k in (0, 1))

    return [
        ("the best tap and pool (1,000 / 5,000 labels)", *both(best_reading)),
        (f"{best}: highest over t, clean", *both(peak)),
        (f"{best}: spread from t = 10 to 100, points", *both(flat)),
        (f"{best}: fall to t = 800, points", *both(falls)),
        (f"{best}: noised less clean at t = 25", *both(noise(25))),
        (f"{best}: the same at t = 100", *both(noise(100))),
        (f"{best}: the same at t = 400", *both(noise(400))),
        ("best tap over the mid block, points", *both(published)),
        (
            "best tap over the best of the untrained network, points",
            *both(over(lambda table, k: max(table["untrained t=0"][r][k] for r in READINGS))),
        ),
        ("best tap over the same tap untrained, points", *both(over(lambda table, k: table["untrained t=0"][best][k]))),
    ]


def _grid(found: dict[str, Any], levels: dict[str, Any]) -> list[str]:
    """Twenty levels, 2x2, 5,000 labels; how the label-free score ranks them."""
    readings = [f"{tap} 2x2" for tap in TAPS]
    grid = [levels[f"t={t}"] for t in found["grid"]]
    tap, level = best_of(found, levels)
    rows = [
        f"| {one['sigma']:.3f} | {one['timestep']} | {one['snr']:.3g} | "
        + " | ".join(_bold(f"{_score(one, r):.1f}", (r, one) == (f"{tap} 2x2", level)) for r in readings)
        + " |"
        for one in grid
    ]
    flat = [(one["cells"][r]["label_free"], _score(one, r), r, one) for one in grid for r in readings]
    within = [
        f"{r.removesuffix(' 2x2')} {rank_correlation(*zip(*[f[:2] for f in flat if f[2] == r], strict=True)):+.2f}"
        for r in readings
    ]
    rank = rank_correlation([f[0] for f in flat], [f[1] for f in flat])
    alone = max(flat, key=lambda f: f[0])
    return [
        "## Twenty noise levels",
        "",
        f"{GRID_LEVELS} sigmas evenly spaced in the logarithm from 0.02 to 1, clean image, 2x2, {COUNTS[1]:,} labels.",
        "",
        f"| sigma | t | SNR | {' | '.join(TAPS)} |",
        "|---" * (len(TAPS) + 3) + "|",
        *rows,
        "",
        f"The best level of each tap: {', '.join(_top_level(tap, grid) for tap in TAPS)}. All lie inside the range, as "
        "for models that generalise (arXiv 2502.05743); for CIFAR-10 and a larger model sigma 0.05 is published.",
        "",
        f"The label-free score (between over within variance under k-means) ranks these {len(flat)} pairs with a "
        f"correlation of {rank:+.2f} to accuracy; within a tap: {', '.join(within)}. Alone it would take "
        f"{alone[2].removesuffix(' 2x2')} at t = {alone[3]['timestep']}: {alone[1]:.1f} %. It does not replace labels.",
        "",
    ]


def _top_level(tap: str, grid: list[dict[str, Any]]) -> str:
    best = max(grid, key=lambda one: _score(one, f"{tap} 2x2"))
    return f"{tap} sigma {best['sigma']:.3f} (t = {best['timestep']})"


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def best_of(found: dict[str, Any], levels: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(tap, level) of the highest cell of the grid at 2x2 with 5,000 labels."""
    cells = [(tap, levels[f"t={t}"]) for t in found["grid"] for tap in TAPS]
    return max(cells, key=lambda cell: _score(cell[1], f"{cell[0]} 2x2"))


def _searches(found: dict[str, Any], levels: dict[str, Any]) -> list[str]:
    tap, level = best_of(found, levels)
    top = _score(level, f"{tap} 2x2")
    rows = []
    for one in found["searches"]:
        best = one["best"]
        pair = f"{best['tap']}, sigma {best['sigma']:.3f} (t = {best['timestep']})"
        share, judged = f"{one['passes']:,} | {100 * one['share_of_grid']:.1f} %", one["judged"]
        rows.append(f"| {one['budget']:g} | {one['seed']} | {pair} | {share} | {judged:.1f} | {judged - top:+.1f} |")
    return [
        "## The search against the grid",
        "",
        f"The whole grid takes {found['searches'][0]['grid_passes']:,} passes ({GRID_LEVELS} levels of "
        f"{COUNTS[1] + HELD_OUT:,} images) and finds {tap} at sigma {level['sigma']:.3f} (t = {level['timestep']}): "
        f"{top:.1f} %. Each row is one `--search` on the same teacher and taps; its seed draws its own 5,000 training "
        "images, and it never reads a test image. Judged: what the grid's rule (seed 0, 5,000 labels, 2,000 test "
        "images) says of the pair it found; the difference is to the best of the grid, itself picked on these test "
        "images.",
        "",
        "| budget | seed | pair found | passes | of the grid | judged % | difference |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        *_verdict(found["searches"], top),
        "Not blind: bandwidth, soft step and the shares of the rungs were settled while looking at this teacher and "
        "these test images; earlier versions of the rule ended up to 1.4 points below the grid's best. "
        "Beside this there is only the planted teacher of the tests.",
        "",
    ]


def _verdict(searches: list[dict[str, Any]], top: float) -> list[str]:
    said = []
    for budget in dict.fromkeys(one["budget"] for one in searches):
        off = [one["judged"] - top for one in searches if one["budget"] == budget]
        near = sum(round(d, 2) >= -0.5 for d in off)
        said.append(
            f"With a budget of {100 * budget:g} % {near} of {len(off)} searches end within half a point of the grid's "
            f"best (mean {statistics.mean(off):+.2f}, worst {min(off):+.2f})."
        )
    return [" ".join(said), ""]


if __name__ == "__main__":
    measure()
    (RESULTS / "probe.md").write_text(probe_page())
