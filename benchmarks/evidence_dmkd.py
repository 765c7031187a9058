"""The page docs/results/dmkd.md: what students of drawn images are worth, from recorded arms alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.evidence import Arms, paired, recorded, spread, verdict
from diffrep.recipes.base import Study
from diffrep.recipes.dmkd import EQUAL, SAMPLERS, TEACHERS, dmkd_digits, dmkd_digits_sweeps
from diffrep.recipes.dmkd_cifar10 import dmkd_cifar10_small
from diffrep.words import amount


def dmkd_page() -> str:
    """Digits with every control, the sweeps, CIFAR-10."""
    parts = [OPENING, *_digits(), *_sweeps(), *_cifar10()]
    return "\n".join(parts) + "\n"


OPENING = """# DM-KD: measured

Made by `make evidence-dmkd`; the commands stand above each table. One thread per process on a CPU. Percent correct on
the real test images, which are read once, at the end; mean ± standard deviation over the seeds. A seed draws generator,
teacher, set and students anew; within a seed all arms share them, so compare arms seed by seed. The arms behind the
tables: `docs/results/data/dmkd_*.json`.

**What "without real images" means here.** The student saw none. The generator and the teacher were both trained on the
1,078 real digits with their labels: they carry what they learned from them.
"""


def _digits() -> list[str]:
    study = dmkd_digits()
    arms = recorded(study)
    if not arms:
        return []
    seeds = sorted(arms["set_pupil"])
    pairs = [
        ("set_pupil", "real_pupil", "drawn images + KD against real images + KD"),
        ("set_pupil", "real_labels", "drawn images + KD against real images, labels"),
        ("set_pupil", "set_labels", "drawn images + KD against drawn images, labels"),
        ("real_pupil", "real_labels", "real images: KD against labels"),
        ("set_pupil", "photographs_pupil", "drawn images + KD against unrelated photographs + KD"),
        ("set_pupil", "noise_pupil", "drawn images + KD against noise + KD"),
    ]
    return [
        "## Digits: the student and its controls",
        "",
        f"`diffrep run dmkd_digits --seeds {','.join(map(str, seeds))}`; {_tested(arms)} test digits, "
        "1,600 steps for every student, 14,458 parameters; the set has 2,200 images of 20 DDIM steps without guidance.",
        "",
        *_table(study, arms),
        "",
        "`top-1, chosen`: of the checkpoint nearest to the teacher on held-out images of the arm's own source. "
        "Calibration error: lower is better.",
        "",
        *_pairs(arms, pairs),
        "",
        "The twin taught on real images is within one point; noise, photographs and a single image are not: a teacher "
        "can only be copied where its images are. That the labels of the same set teach less than the teacher's "
        "answers agrees with the paper.",
        "",
    ]


def _tested(arms: Arms) -> int:
    return next(iter(next(iter(arms.values())).values()))["scores"]["test_images"]


def _table(study: Study, arms: Arms) -> list[str]:
    rows = ["| arm | top-1 | top-1, chosen | agreement | calibration error | CPU s |", "|---|---|---|---|---|---|"]
    for stage, name in study.arms.items():
        if stage in arms:
            scores = [spread(arms[stage], key) for key in ("top1", "best_top1", "agreement", "ece")]
            rows.append(f"| {name} | {' | '.join(scores)} | {_seconds(arms, stage):.1f} |")
    return rows


def _seconds(arms: Arms, stage: str) -> float:
    return statistics.mean(a["cpu_seconds"] for a in arms[stage].values())


def _pairs(arms: Arms, pairs: Sequence[tuple[str, str, str]]) -> list[str]:
    rows = ["| comparison | difference in points (lowest to highest seed) | verdict |", "|---|---|---|"]
    for one, other, words in pairs:
        found = paired(arms, one, other, "top1")
        if found:
            mean = statistics.mean(found)
            rows.append(f"| {words} | {mean:+.1f} ({min(found):+.1f} to {max(found):+.1f}) | {verdict(found)} |")
    return rows


def _sweeps() -> list[str]:
    arms = recorded(dmkd_digits_sweeps())
    if not arms:
        return []
    pupils = [len(by_seed) for stage, by_seed in arms.items() if stage.endswith("_pupil")]
    told = f"{max(pupils)} seeds" if min(pupils) == max(pupils) else f"{min(pupils)} to {max(pupils)} seeds per cell"
    return [
        "## Digits: guidance, steps, samplers, teachers",
        "",
        f"`diffrep run dmkd_digits_sweeps` ({told}; a cell without ± is of one seed).",
        "",
        *_fidelity(arms),
        *_samplers(arms),
        *_teachers(arms),
    ]


def _fidelity(arms: Arms) -> list[str]:
    head = "| | T = 5 | T = 20 | T = 100 |"
    rows = []
    for scale in (1, 2, 4):
        cells = [spread(arms[k], "top1") if (k := f"s{scale}_t{t}_pupil") in arms else "-" for t in (5, 20, 100)]
        rows.append(f"| s = {scale} | {' | '.join(cells)} |")
    pairs = [
        ("s1_t20_pupil", "s2_t20_pupil", "T = 20: s = 1 against s = 2"),
        ("s2_t20_pupil", "s4_t20_pupil", "T = 20: s = 2 against s = 4"),
        ("s1_t20_pupil", "s1_t5_pupil", "s = 1: T = 20 against T = 5"),
        ("s1_t20_pupil", "s1_t100_pupil", "s = 1: T = 20 against T = 100"),
    ]
    return [
        "**Guidance s x steps T at equal compute**: every set may spend 22,000 network calls, so more steps or "
        "guidance mean fewer images (4,400 at s = 1, T = 5; 110 at s > 1, T = 100). The paper reports that low "
        "fidelity (small s, few steps) teaches better than high fidelity. Student top-1:",
        "",
        head,
        "|---|---|---|---|",
        *rows,
        "",
        *_pairs(arms, pairs),
        "",
    ]


def _samplers(arms: Arms) -> list[str]:
    rows = [
        "| sampler | calls per image | CPU s of the set | student top-1 | against DDIM, 20 |",
        "|---|---|---|---|---|",
    ]
    for name, sampling in SAMPLERS.items():
        if (stage := f"{name}_pupil") not in arms:
            continue
        steps = int(sampling.num_sampling_steps)
        calls = (2 * steps - 1 if sampling.sampler == "heun" else steps) * (2 if sampling.is_guided else 1)
        spent = [a["built_on_cpu_seconds"].get(f"{name}_set", 0.0) for a in arms[stage].values()]
        found = paired(arms, stage, "ddim_20_pupil", "top1")
        told = f"{statistics.mean(found):+.1f}, {verdict(found)}" if found and name != "ddim_20" else ""
        words = f"{sampling.sampler}, {steps} steps{', s = 2' if sampling.is_guided else ''}"
        cells = [words, str(calls), f"{statistics.mean(spent):.1f}", spread(arms[stage], "top1"), told]
        rows.append(f"| {' | '.join(cells)} |")
    return [
        f"**Samplers at {EQUAL:,} images each**: do sets of ten steps teach as well as sets of a hundred? The last row "
        "is the paper's low-fidelity setting.",
        "",
        *rows,
        "",
    ]


def _teachers(arms: Arms) -> list[str]:
    rows = ["| teacher | its own top-1 | its student's top-1 |", "|---|---|---|"]
    for name, (steps, _) in TEACHERS.items():
        stage = "ddim_20_pupil" if name == "strong" else f"by_{name}_pupil"
        if stage in arms and f"teacher_{name}" in arms:
            own = spread(arms[f"teacher_{name}"], "top1")
            rows.append(f"| {name}, {steps} steps | {own} | {spread(arms[stage], 'top1')} |")
    pairs = [
        ("by_fair_pupil", "by_weak_pupil", "students: of the fair teacher against the weak one's"),
        ("ddim_20_pupil", "by_fair_pupil", "students: of the strong teacher against the fair one's"),
    ]
    return [
        f"**Teachers of different strength** on the same set ({EQUAL:,} images, DDIM, 20 steps); the paper reports "
        "that weaker classifiers teach better from drawn images:",
        "",
        *rows,
        "",
        *_pairs(arms, pairs),
        "",
    ]


def _cifar10() -> list[str]:
    study = dmkd_cifar10_small()
    arms = recorded(study)
    if not arms:
        return []
    first = next(iter(arms.values()))[0]
    return [
        "## CIFAR-10 on two cores",
        "",
        f"`diffrep run dmkd_cifar10_small`, one seed: {first['steps']:,} steps of batch 64 for every arm "
        f"({amount(first['images_seen'])} images seen), teacher ResNet-56 (93.39 %), student ResNet-20, bf16. The set: "
        "5,000 images (4,500 to learn from), 20 DDIM steps, from an unconditional diffusion model of 2.6 M parameters "
        "that was trained for 49 minutes on two cores. It knows no classes, so there is no arm with the set's labels.",
        "",
        *_table(study, arms),
        "",
        "One seed on 10,000 test images: a score near 50 % has a standard error of 0.5 points, but nothing is said of "
        "the spread over seeds. The real images are 45,000, the drawn ones 4,500; all arms take equal steps.",
        "",
    ]
