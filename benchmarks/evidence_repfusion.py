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

from benchmarks.evidence import RESULTS, Arms, paired, recorded, spread
from diffrep.evaluation.label_value import label_value, said, said_between
from diffrep.files import write_json
from diffrep.recipes.base import Recipe
from diffrep.recipes.repfusion_cifar10 import ARMS, LABELS, MORE_LABELS, TEACHER, TIMESTEPS, repfusion_cifar10_small
from diffrep.words import amount

RUNS, CHOSEN = Path("runs/evidence-repfusion"), RESULTS / "data" / "repfusion" / "chosen.json"
FROZEN, TUNED = f"linear_probe_{LABELS}", "top1"
# What an arm's own cost does not hold: DPM is the diffusion model's training; the study's own stages by name.
BUILDS_ON = {
    "scratch": "-",
    "random": "-",
    "contrastive": "-",
    "supervised": "scratch",
    "answers": "scratch",
    "probed": "DPM, probe",
    "clean": "DPM, extractor",
    "mixed": "DPM, mix",
}
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
        f"over {len(seeds)} seeds, or as many as (n) says. A seed draws the labels, all networks and the "
        "order of images anew; within a seed all arms share labels and order, so compare arms seed by seed, as below. "
        f"A score near 50 % has a binomial standard error of {error:.1f} points. The arms behind the table: "
        "`docs/results/data/repfusion_cifar10_small-*.json`.",
        "",
        f"The teacher is `{TEACHER}`: 2.6 M parameters, trained without labels for 49 minutes on two cores "
        "(`denoiser_cifar10_small` has its settings). Every arm but scratch sees 30,000 images (468 steps of 64) to "
        "imitate or pretrain, then 30,000 views of the labelled images; scratch sees 60,000 views of those. Settings "
        "were chosen on validation images with one seed, alike for all arms. Tap and fixed timestep (up_blocks.1, "
        "t = 50) come from an earlier look at 2,000 of the test images, which favours all arms with the diffusion "
        "model, and fixed t against probed t, which has seen the 1,000 labels alone. How much can be told: on 5,000 "
        "validation images (`diffrep probe ... --images 1000 --split validation --test-images 5000 --pool 2`, bf16) "
        "the probe of up_blocks.1 has 48.0, 48.2, 47.9, 47.2, 45.7 at t = 0, 25, 50, 100, 200, and the best "
        "elsewhere is 48.5 (up_blocks.0, t = 100): another choice would have been as good, and t matters little "
        "below 100.",
        "",
        "## Arms",
        "",
    ]


def _table(arms: Arms) -> Iterator[str]:
    yield "| arm | fine-tuned, top-1 | worth labels (95 %) | frozen, linear probe | CPU s | multiply-adds | builds on |"
    yield "|---|---|---|---|---|---|---|"
    scale = {n: _scores(arms[name]) for n, name in _scale().items() if name in arms}
    for name, words in ARMS.items():
        tuned = name if name == "scratch" else f"{name}_tuned"
        if tuned not in arms:
            continue
        worth = f"{LABELS:,}" if name == "scratch" else _worth(scale, arms[tuned])
        parts = [arms[stage] for stage in dict.fromkeys((name, tuned)) if stage in arms]
        seconds = sum(statistics.mean(a["cpu_seconds"] for a in part.values()) for part in parts)
        work = sum(next(iter(part.values()))["multiply_adds"] for part in parts)
        frozen = "-" if name == "scratch" else _spread(arms, name, FROZEN)
        cells = [_spread(arms, tuned, TUNED), worth, frozen, f"{seconds:.0f}", amount(work), BUILDS_ON.get(name, "DPM")]
        yield f"| {words} | {' | '.join(cells)} |"
    for count in MORE_LABELS:
        if (by_seed := arms.get(f"scratch_{count}")) is not None:
            seconds = statistics.mean(a["cpu_seconds"] for a in by_seed.values())
            work = amount(next(iter(by_seed.values()))["multiply_adds"])
            cells = [_spread(arms, f"scratch_{count}", TUNED), f"{count:,}", "-", f"{seconds:.0f}", work, "-"]
            yield f"| from scratch, {count:,} labels | {' | '.join(cells)} |"


def _spread(arms: Arms, stage: str, key: str) -> str:
    """Mean and deviation, with the number of seeds where some are missing."""
    found = arms.get(stage, {})
    missing = f" ({len(found)})" if 0 < len(found) < len(arms["scratch"]) else ""
    return spread(found, key) + missing


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
        "Paired by seed; brackets hold the 95 % interval of the mean by Student's t, which for three seeds is wide. "
        "Only an interval without 0 decides, and of so many comparisons one in twenty may decide wrongly.",
        "",
        "| comparison | fine-tuned, points | | frozen, points | |",
        "|---|---|---|---|---|",
    ]
    for one, other, words in PAIRS:
        found = paired(arms, one, other, TUNED)
        frozen = [] if "scratch" in (one, other) else paired(arms, *(n[: -len("_tuned")] for n in (one, other)), FROZEN)
        if found:
            rows.append(f"| {words} | {_difference(found)} | {_difference(frozen)} |")
    return [*rows, ""]


def _difference(found: list[float]) -> str:
    """``+2.1 (0.4 to 3.8) | better``."""
    if not found:
        return "- | -"
    if len(found) < 2:
        return f"{found[0]:+.1f} | one seed"
    low, high = interval(found)
    word = "better" if low > 0 else "worse" if high < 0 else "undecided"
    return f"{statistics.mean(found):+.1f} ({low:+.1f} to {high:+.1f}) | {word}"


def interval(found: list[float]) -> tuple[float, float]:
    """95 % of the mean of a few paired differences, by Student's t."""
    from scipy.stats import t

    mean, error = statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))
    reach = float(t.ppf(0.975, len(found) - 1)) * error
    return mean - reach, mean + reach


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
        *_policy_and_uniform(arms, chosen),
    ]


def _policy_and_uniform(arms: Arms, chosen: dict[str, Any]) -> list[str]:
    """Whether choosing helps, and why, from the numbers."""
    found = paired(arms, "policy_tuned", "uniform_tuned", TUNED)
    if len(found) < 2:
        return []
    rivals = "; ".join(
        f"against {words} {_difference(paired(arms, 'policy_tuned', other, TUNED)).replace(' | ', ', ')}"
        for other, words in (("uniform_tuned", "uniform t"), ("probed_tuned", "the probed t"))
    )
    early = statistics.mean(
        sum(p for p, t in zip(c["policy"], TIMESTEPS, strict=True) if t <= 200) for c in chosen.values()
    )
    share = sum(t <= 200 for t in TIMESTEPS) / len(TIMESTEPS)
    return [
        f"After fine-tuning, the policy {rivals}. Why so little: at the end it sends {100 * early:.0f} % of the images "
        f"to t <= 200, where the teacher tells most, uniform t {100 * share:.0f} %. It learns the right direction, but "
        "from 30,000 images it does not get far, and a student that is not told the timestep has to imitate many "
        "targets at once. A single good timestep, which a probe of the same labels finds in 20 CPU s, has the higher "
        "mean; the table says which of these differences three seeds decide.",
        "",
    ]


def _keep_choices(seeds: list[int]) -> None:
    found = json.loads(CHOSEN.read_text()) if CHOSEN.exists() else {}
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
