"""The page docs/results/repfusion.md: what a diffusion model's features are worth to a student, from recorded arms.

Beside the arms' scores, which are recorded, the page tells what each policy and probe chose: read from the run folders
once, kept in docs/results/data/repfusion/.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.evidence import RESULTS, Arms, paired, recorded, spread, verdict
from diffrep.evaluation.label_value import label_value, said, said_between
from diffrep.files import write_json
from diffrep.recipes.base import Recipe
from diffrep.recipes.repfusion_cifar10 import ARMS, LABELS, MORE_LABELS, TEACHER, TIMESTEPS, repfusion_cifar10_small
from diffrep.words import amount

RUNS, CHOSEN = Path("runs/evidence-repfusion"), RESULTS / "data" / "repfusion" / "chosen.json"
FROZEN, TUNED = f"linear_probe_{LABELS}", "top1"
PAIRS = (
    ("policy_tuned", "uniform_tuned", "learned policy against uniform t"),
    ("policy_tuned", "probed_tuned", "learned policy against the t that a probe found"),
    ("policy_tuned", "fixed_tuned", "learned policy against fixed t"),
    ("fixed_tuned", "random_tuned", "fixed t against a random teacher"),
    ("fixed_tuned", "scratch", "fixed t against scratch"),
    ("fixed_tuned", "supervised_tuned", "fixed t against a supervised teacher, hint"),
    ("fixed_tuned", "answers_tuned", "fixed t against a supervised teacher, KD"),
    ("fixed_tuned", "contrastive_tuned", "fixed t against self-supervised"),
    ("random_tuned", "scratch", "random teacher against scratch"),
    ("clean_tuned", "fixed_tuned", "clean-input extractor against fixed t"),
    ("mixed_tuned", "fixed_tuned", "learned mix against fixed t"),
)


def repfusion_page() -> str:
    """Empty where nothing is recorded."""
    arms = recorded(repfusion_cifar10_small())
    if "scratch" not in arms:
        return ""
    return "\n".join([*_opening(arms), *_table(arms), "", *_pairs(arms), *_chosen(arms), *_cost(arms)]) + "\n"


def _opening(arms: Arms) -> list[str]:
    seeds = sorted(arms["scratch"])
    tested = arms["scratch"][seeds[0]]["scores"]["test_images"]
    error = 100 * math.sqrt(0.25 / tested)
    return [
        "# RepFusion: measured",
        "",
        f"Made by `make evidence-repfusion` (`diffrep run repfusion_cifar10_small`), one thread per process on a CPU. "
        f"CIFAR-10, ResNet-20, {LABELS:,} labels; percent correct on {tested:,} test images, mean ± standard deviation "
        f"over {len(seeds)} seeds. A seed draws the labels, all networks and the order of images anew; within a seed "
        "all arms share labels and order, so compare arms seed by seed, as below. A score near 50 % has a binomial "
        f"standard error of {error:.1f} points. The arms behind the table: "
        "`docs/results/data/repfusion_cifar10_small-*.json`.",
        "",
        f"The teacher is `{TEACHER}`: 2.6 M parameters, trained without labels for 49 minutes on two cores "
        "(`denoiser_cifar10_small` has its settings). Every arm but scratch sees 30,000 images (468 steps of 64) to "
        "imitate or pretrain, then 30,000 views of the labelled images; scratch sees 60,000 views of those. Settings "
        "were chosen on validation images with one seed, alike for all arms. The fixed timestep, t = 50, comes from an "
        "earlier look at 2,000 of the test images, so it has an unfair advantage over the probed one, which has seen "
        "the 1,000 labels alone.",
        "",
        "## Arms",
        "",
    ]


def _table(arms: Arms) -> Iterator[str]:
    yield "| arm | fine-tuned, top-1 | worth labels (95 %) | frozen, linear probe | CPU s | multiply-adds |"
    yield "|---|---|---|---|---|---|"
    scale = {n: _scores(arms[name]) for n, name in _scale().items() if name in arms}
    for name, words in ARMS.items():
        tuned = name if name == "scratch" else f"{name}_tuned"
        if tuned not in arms:
            continue
        worth = f"{LABELS:,}" if name == "scratch" else _worth(scale, arms[tuned])
        parts = [arms[stage] for stage in dict.fromkeys((name, tuned)) if stage in arms]
        seconds = sum(statistics.mean(a["cpu_seconds"] for a in part.values()) for part in parts)
        work = sum(next(iter(part.values()))["multiply_adds"] for part in parts)
        frozen = "-" if name == "scratch" else spread(arms.get(name, {}), FROZEN)
        yield f"| {words} | {spread(arms[tuned], TUNED)} | {worth} | {frozen} | {seconds:.0f} | {amount(work)} |"
    for count in MORE_LABELS:
        if (by_seed := arms.get(f"scratch_{count}")) is not None:
            seconds = statistics.mean(a["cpu_seconds"] for a in by_seed.values())
            work = amount(next(iter(by_seed.values()))["multiply_adds"])
            cells = [spread(by_seed, TUNED), f"{count:,}", "-", f"{seconds:.0f}", work]
            yield f"| from scratch, {count:,} labels | {' | '.join(cells)} |"


def _scale() -> dict[int, str]:
    return {LABELS: "scratch", **{count: f"scratch_{count}" for count in MORE_LABELS}}


def _scores(by_seed: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {seed: arm["scores"][TUNED] for seed, arm in by_seed.items()}


def _worth(scale: dict[int, dict[int, float]], by_seed: dict[int, dict[str, Any]]) -> str:
    """How many labels the same student needs from scratch for the score."""
    if len(scale) < 2:
        return "-"
    tested = next(iter(by_seed.values()))["scores"]["test_images"]
    found, ends = label_value(scale, _scores(by_seed), tested, np.random.default_rng(0)), (min(scale), max(scale))
    between = said_between(found.interval, ends) if found.interval else "one seed"
    return f"{said(found.labels, ends)} ({between})"


def _pairs(arms: Arms) -> list[str]:
    rows = [
        "| comparison | fine-tuned: points (lowest to highest seed) | verdict | frozen: points | verdict |",
        "|---|---|---|---|---|",
    ]
    for one, other, words in PAIRS:
        cells = []
        for key in (TUNED, FROZEN):
            first, second = (n if key == TUNED else n.removesuffix("_tuned") for n in (one, other))
            found = paired(arms, first, second, key) if key == TUNED or "scratch" not in (one, other) else []
            told = f"{statistics.mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f})" if found else "-"
            cells += [told, verdict(found) if found else "-"]
        if cells[0] != "-":
            rows.append(f"| {words} | {' | '.join(cells)} |")
    return [*rows, ""]


def _chosen(arms: Arms) -> list[str]:
    """What policies and probes chose, and what that says about policy and uniform t."""
    if RUNS.exists():
        _keep_choices(sorted(arms["scratch"]))
    if not CHOSEN.exists():
        return []
    chosen = json.loads(CHOSEN.read_text())
    head = f"| seed | {' | '.join(f't = {t}' for t in TIMESTEPS)} | the probe found |"
    rows = [
        f"| {seed} | {' | '.join(f'{100 * p:.0f} %' for p in found['policy'])} | t = {found['probed']} |"
        for seed, found in chosen.items()
    ]
    return [
        "## What was chosen",
        "",
        "Share of the images that the policy sent to each timestep at the end of stage 1 (it begins with 10 % each), "
        "and the timestep that the probe of the same 1,000 labelled images found.",
        "",
        head,
        "|" + "---|" * (len(TIMESTEPS) + 2),
        *rows,
        "",
    ]


def _keep_choices(seeds: list[int]) -> None:
    found = {}
    for seed in seeds:
        log, best = RUNS / f"policy-s{seed}" / "metrics.jsonl", RUNS / f"probe-s{seed}" / "best.yaml"
        if log.exists() and best.exists():
            last = json.loads(log.read_text().splitlines()[-1])
            values = yaml.safe_load(best.read_text())["method"]["timestep"]["values"]
            found[str(seed)] = {"policy": [round(p, 4) for p in last["policy_probs"]], "probed": values[0]}
    if found:
        CHOSEN.parent.mkdir(parents=True, exist_ok=True)
        write_json(CHOSEN, found)


def _cost(arms: Arms) -> list[str]:
    """What the budgets leave out: what several arms share, and the teacher itself."""
    policy = next(iter(arms.get("policy", {}).values()), None)
    stage = repfusion_cifar10_small().stages["policy"]
    assert isinstance(stage, Recipe)
    shared = {
        name: statistics.mean(a["built_on_cpu_seconds"].get(on, 0.0) for a in arms[name].values())
        for name, on in (("probed", "probe"), ("clean", "extractor"), ("mixed", "mix"))
        if name in arms
    }
    told = ", ".join(f"{ARMS[name]} {seconds:.0f}" for name, seconds in shared.items())
    seen = f"each arm of stage 1 saw {policy['images_seen']:,} images" if policy else ""
    return [
        "## Cost",
        "",
        f"CPU seconds and multiply-adds are of both stages of an arm ({seen}; forward and backward of what is trained, "
        "the truncated pass of what is frozen). On top of them come, in CPU s per seed: "
        f"{told}; of the supervised teachers one training from scratch; and of every arm with the diffusion model its "
        "own training once: 481,792 images, 266 T multiply-adds, 49 minutes on two cores. Counted in full, a single "
        "arm at this size does not earn its teacher back; the teacher is paid for when it teaches many students, or "
        "was there before.",
        "",
    ]
