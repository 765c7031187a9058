"""The page docs/results/addp.md: what images of tokens, and the encoders, are worth, from recorded arms alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from benchmarks.evidence import Arms, paired, recorded, spread
from diffrep.recipes.addp import ABLATED, ARMS, addp_digits
from diffrep.recipes.addp_cifar10 import DRAWN, ENCODERS, LABELS, addp_cifar10_small
from diffrep.words import amount

Pairs = Iterable[tuple[str, str, str]]
DIGITS = (
    ("one_step", "alternation", "all tokens at once against tokens and pixels in turn"),
    ("alternation", "predictor_alone", "tokens and pixels in turn against the token predictor alone"),
    ("walk_hard", "alternation", "unreliable tokens hard against soft"),
    ("walk_own_target", "alternation", "target without the predictor against with it"),
)
PROBED = (
    ("hard", "addp", "unreliable tokens hard against soft"),
    ("own_target", "addp", "target without the predictor against with it"),
)


def addp_page() -> str:
    """Digits with ablations; CIFAR-10."""
    return "\n".join([OPENING, *_digits(), *_cifar10()])


OPENING = """# ADDP: measured

Made by `make evidence-addp`, one thread per process on a CPU; the commands stand above each table. The distance is a
Frechet distance in the pooled features of a classifier, lower is better: no FID, and to be compared within one table
alone. The arms behind the tables: `docs/results/data/addp_*.json`.
"""


def _digits() -> list[str]:
    arms = recorded(addp_digits())
    if not arms:
        return []
    seeds = sorted(arms["alternation"])
    return [
        "## Digits: the walk, its rivals and its ablations",
        "",
        f"`diffrep run addp_digits --seeds {','.join(map(str, seeds))}`. A seed trains tokenizer, token predictor, "
        "ADDP and the judging classifier anew; within a seed all arms share them. 1,000 images of each arm against all "
        "1,797 digits (D = 128). Mean ± standard deviation over the seeds.",
        "",
        *_made(arms, ARMS | {name: words for name, words in ABLATED.items() if name.startswith("walk_")}),
        "",
        *_pairs(arms, DIGITS, "frechet"),
        "",
        "The encoders of the same networks, frozen, under a linear probe with 50 labels, percent of 539 test digits:",
        "",
        *_probed(arms, [name for name in ABLATED if not name.startswith("walk_")]),
        "",
        *_pairs(arms, PROBED, "linear_probe_50"),
        "",
        *DIGITS_WORDS,
        "",
    ]


DIGITS_WORDS = (
    "All tokens at once means that each is drawn for itself from what is known of its place: independent marginals. "
    "That the walk matters is the first finding. The way through pixels gains nothing for images of digits: the token "
    "predictor alone, which decodes once at the end, is a little nearer in every seed.",
    "",
    "The ablations. Hard unreliable tokens are no better than soft ones for images (undecided) and, on average, worse "
    "for the encoder (undecided too). To learn the image's own ids in place of the predictor's answer makes nearer "
    "images in every seed and a worse encoder in every seed: here the predictor as a target is worth its pass for "
    "recognition and not for generation. No gain over raw pixels is to be expected of 8-pixel digits.",
)


def _cifar10() -> list[str]:
    arms = recorded(addp_cifar10_small())
    if not arms:
        return []
    return [
        "## CIFAR-10: what the encoders are worth",
        "",
        "`DIFFREP_DATA=FOLDER diffrep run addp_cifar10_small`, one seed; 64 tokens of 256 codes, a ViT of width 128 "
        f"and 6 blocks, {LABELS:,} labels. ± is the 95 % interval of 10,000 test images alone (binomial; a bootstrap "
        "of so many images gives the same), not of another training. Cost is the arm's own; what it builds on stands "
        "in the last column. Budgets are not equal: ADDP's is the largest by any measure, MAE sees the most images.",
        "",
        *_encoders(arms),
        "",
        *_made_by(arms),
        *_tokenizer(arms),
        *CIFAR10_WORDS,
        "",
    ]


def _made_by(arms: Arms) -> list[str]:
    if not arms.keys() & DRAWN.keys():
        return []
    return [
        "## CIFAR-10: what the models draw",
        "",
        "2,000 images of each in 16 steps against the 60,000 real ones, in the features of a ResNet-56 (D = 64).",
        "",
        *_made(arms, DRAWN),
        "",
    ]


def _tokenizer(arms: Arms) -> list[str]:
    """What the tokenizer keeps of a test image."""
    found = [arm["scores"] for arm in arms.get("tokenizer", {}).values()]
    told = [f"PSNR {one['psnr']:.1f} dB, perplexity {one['test_perplexity']:.0f} of 256 codes" for one in found]
    return [f"The tokenizer's copies of test images: {told[0]}.", ""] if told else []


CIFAR10_WORDS = (
    "What it shows: at this budget pixels win. MAE's encoder is far ahead of MAGE's and of ADDP's in a linear "
    "probe, at a third of ADDP's arithmetic and without a tokenizer; ADDP's is below the same network untrained. "
    "Fine-tuned, MAE's start is worth 13 points over scratch, which takes twice the steps; MAGE's and ADDP's end "
    "below it. The walk through pixels draws nearer images than all tokens at once. A likely reason: 256 codes for "
    "4x4 pixels keep colours and edges, and what such tokens are is hard to tell from their neighbours, so that the "
    "soft targets and decoded unreliable tokens which ADDP learns from say little. The published models saw five to "
    "ten thousand times as many images, with another tokenizer. What it does not show: anything about ADDP at its "
    "published size.",
)


def _encoders(arms: Arms) -> list[str]:
    head = ("arm", "linear probe", "fine-tuned top-1", "images", "multiply-adds", "CPU s", "builds on, CPU s")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stage, name in ENCODERS.items():
        for arm in arms.get(stage, {}).values():
            scores = [with_interval(arm["scores"], key) for key in (f"linear_probe_{LABELS}", "top1")]
            cost = [amount(arm["images_seen"]), amount(arm["multiply_adds"]), f"{arm['cpu_seconds']:.0f}"]
            below = (
                ", ".join(f"{n} {s:.0f}" for n, s in arm["built_on_cpu_seconds"].items() if arm["images_seen"]) or "-"
            )
            rows.append(f"| {' | '.join([name, *scores, *cost, below])} |")
    return rows


def with_interval(scores: Mapping[str, float], key: str) -> str:
    """``31.2 ± 0.9``: 1.96 standard errors of a share of the test images."""
    if key not in scores:
        return "-"
    share = scores[key] / 100
    return f"{scores[key]:.1f} ± {196 * math.sqrt(share * (1 - share) / scores['test_images']):.1f}"


def _made(arms: Arms, names: Mapping[str, str]) -> list[str]:
    rows = ["| arm | Frechet distance | kernel distance | CPU s of making and scoring |", "|---|---|---|---|"]
    for stage, name in names.items():
        if stage in arms:
            cells = [name, spread(arms[stage], "frechet"), _kernel(arms, stage), f"{_seconds(arms, stage):.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _probed(arms: Arms, stages: Iterable[str]) -> list[str]:
    rows = ["| arm | linear probe | CPU s |", "|---|---|---|"]
    for stage in stages:
        if stage in arms:
            score = spread(arms[stage], "linear_probe_50")
            rows.append(f"| {ABLATED[stage]} | {score} | {_seconds(arms, stage):.1f} |")
    return rows


def _kernel(arms: Arms, stage: str) -> str:
    values = [a["scores"]["kernel"] for a in arms[stage].values()]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _seconds(arms: Arms, stage: str) -> float:
    return statistics.mean(a["cpu_seconds"] for a in arms[stage].values())


def _pairs(arms: Arms, pairs: Pairs, key: str) -> list[str]:
    rows = ["| comparison | difference (lowest to highest seed) |", "|---|---|"]
    for one, other, words in pairs:
        found = paired(arms, one, other, key)
        if found:
            rows.append(f"| {words} | {statistics.mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f}) |")
    return rows
