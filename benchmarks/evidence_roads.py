"""The page docs/results/roads.md: what the three roads give each other on digits, from recorded arms alone."""

from __future__ import annotations

import statistics

from benchmarks.evidence import Arms, paired, recorded, spread, verdict
from diffrep.recipes.base import Recipe, Study, references
from diffrep.recipes.quickstart import LABELS
from diffrep.recipes.roads import ARMS, roads_digits
from diffrep.words import amount

ALL = 1_078  # training images of digits, all of whose labels the wider classifier reads
PAIRS = (
    ("addp_hint_tuned", "scratch", "ADDP encoder's features, tuned, against 50 labels alone"),
    ("addp_hint_tuned", "untrained_hint_tuned", "ADDP encoder's features against those of the untrained encoder"),
    ("addp_hint_tuned", "conv_finetune_best", "ADDP encoder's features against the diffusion model's at best t"),
    ("conv_finetune_best", "scratch", "RepFusion (best t) against 50 labels alone"),
    ("few_addp", "classifier_few", "DM-KD on ADDP's images against its own teacher of 50 labels"),
    ("few_addp", "few_drawn", "teacher of 50 labels: ADDP's images against drawn ones"),
    ("few_drawn", "few_real", "teacher of 50 labels: drawn images against real ones"),
    ("few_addp_on", "few_addp", "ADDP's images, teacher of 50 labels: begun with RepFusion against alone"),
    ("few_drawn_on", "few_drawn", "drawn images, teacher of 50 labels: begun with RepFusion against alone"),
    ("few_drawn_on", "conv_finetune", "RepFusion, then DM-KD, against RepFusion, then the 50 labels themselves"),
    ("all_addp", "all_drawn", "teacher of all labels: ADDP's images against drawn ones"),
    ("all_addp", "all_real", "teacher of all labels: ADDP's images against real ones"),
    ("all_addp_on", "all_addp", "ADDP's images, teacher of all labels: begun with RepFusion against alone"),
    ("all_drawn_on", "all_drawn", "drawn images, teacher of all labels: begun with RepFusion against alone"),
)


def roads_page() -> str:
    """Empty where nothing is recorded."""
    study = roads_digits()
    found = recorded(study)
    if "scratch" not in found:
        return ""
    # Of an arm that another study has measured with more seeds, those that all arms share.
    arms = {name: {k: v for k, v in by_seed.items() if k in found["scratch"]} for name, by_seed in found.items()}
    return "\n".join([*_opening(arms), *_table(study, arms), "", *_pairs(arms), "", *WORDS, ""])


def _opening(arms: Arms) -> list[str]:
    seeds = sorted(arms["scratch"])
    tested = arms["scratch"][seeds[0]]["scores"]["test_images"]
    return [
        "# The three roads combined: measured",
        "",
        f"Made by `make evidence-roads` (`diffrep run roads_digits --seeds {','.join(map(str, seeds))}`), one thread "
        f"per process on a CPU. Percent correct on {tested} test digits; mean ± standard deviation over the seeds. A "
        f"seed draws the {LABELS} labels and trains every network anew; within a seed all arms share them, so compare "
        "arms seed by seed. The arms behind the table: `docs/results/data/roads_digits-*.json`.",
        "",
        "Every student is the same CNN (58,474 parameters) and is shown 66,200 images in all, first stage included; "
        "the rows in italics are other networks, and are no students of the comparison. Cost is that of both stages of "
        "an arm, with the frozen pass of a teacher that is asked at every step; stored answers and hints, images and "
        "teachers are shared by the arms and come on top. Labels: the most that anything behind the arm has read; "
        "where it is 50, these are the same 50 images.",
        "",
    ]


OTHERS = ("addp_tuned", "classifier", "classifier_few")


def _table(study: Study, arms: Arms) -> list[str]:
    head = ("arm", "top-1", "first stage, frozen: linear probe", "images", "multiply-adds", "CPU s", "labels")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, words in ARMS.items():
        if name in arms and "top1" in next(iter(arms[name].values()))["scores"]:
            shown = f"*{words}*" if name in OTHERS else words
            rows.append(f"| {shown} | {' | '.join(_cells(study, arms, name))} |")
    return rows


def _cells(study: Study, arms: Arms, name: str) -> list[str]:
    """Scores, and the cost of both stages where there are two."""
    task = study.stages[name]
    assert isinstance(task, Recipe)
    first = (getattr(task.method, "init", None) or "").removeprefix("stage:")
    both = [arms[stage] for stage in (first, name) if stage in arms]
    images, added = (sum(next(iter(part.values()))[key] for part in both) for key in ("images_seen", "multiply_adds"))
    seconds = sum(statistics.mean(arm["cpu_seconds"] for arm in part.values()) for part in both)
    labels = ALL if name == "classifier" or "classifier" in _below(study, name) else LABELS
    frozen = spread(arms[first], f"linear_probe_{LABELS}") if first in arms else "-"
    return [spread(arms[name], "top1"), frozen, f"{images:,}", amount(added), f"{seconds:.1f}", f"{labels:,}"]


def _below(study: Study, name: str) -> set[str]:
    """All that a stage builds on."""
    needs = references(study.stages[name])
    return {*needs, *(deeper for needed in needs for deeper in _below(study, needed))}


def _pairs(arms: Arms) -> list[str]:
    rows = ["| comparison | difference in points (lowest to highest seed) | verdict |", "|---|---|---|"]
    for one, other, words in PAIRS:
        found = paired(arms, one, other, "top1")
        if found:
            span = f"{statistics.mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f})"
            rows.append(f"| {words} | {span} | {verdict(found)} |")
    return rows


WORDS = (
    "What the budget leaves out. It counts images that the student is shown, not what stands behind them: the "
    "diffusion model, ADDP with its tokenizer and predictor, 2,200 images of each, and two classifiers are trained or "
    "made once a seed. A start from RepFusion takes 51,200 of the 66,200 images, so DM-KD has 15,000 left, 300 steps: "
    "the rows say what a start is worth when it must be paid for, not what it adds to a full DM-KD.",
    "",
    "What is not claimed. Images of either generator have no class, so no set is balanced, and nothing is said of "
    "labels for them. No row with 1,078 labels is a few-label result, although its student read none: they come in "
    "by its teacher's answers.",
)
