"""The page docs/results/dense.md: what features of digits are worth to segmentation and landmarks."""

from __future__ import annotations

import statistics

from benchmarks.evidence import Arms, paired, recorded, spread, verdict
from diffrep.recipes.dense_digits import BATCH, PICTURES, STEPS, TASKS, dense_digits
from diffrep.words import amount

SCORES = {  # task -> score -> heading
    "masks": {"miou": "mIoU", "miou_parts": "mIoU of the digits", "pixel_accuracy": "pixels right"},
    "points": {"nme": "NME", "fr10": "beyond 10 %", "auc10": "AUC to 10 %"},
}
PAIRS = (
    ("conv_distilled", "conv_scratch", "CNN: distilled against scratch"),
    ("conv_distilled", "conv_random", "CNN: a trained teacher against an untrained one"),
    ("conv_random", "conv_scratch", "CNN: an untrained teacher against scratch"),
    ("vit_addp", "vit_scratch", "ViT: ADDP's encoder against scratch"),
)


def dense_page() -> str:
    """Empty where nothing is recorded."""
    arms = recorded(dense_digits())
    if "masks_conv_scratch" not in arms:
        return ""
    return "\n".join([*_opening(arms), *_tables(arms), *_pairs(arms), "", *WORDS, ""])


def _opening(arms: Arms) -> list[str]:
    seeds = sorted(arms["masks_conv_scratch"])
    return [
        "# Dense tasks on digits: measured",
        "",
        f"Made by `make evidence-dense` (`diffrep run dense_digits --seeds {','.join(map(str, seeds))}`), one thread "
        f"per process on a CPU. A digit lies on a 16-pixel canvas among pieces of others; training reads the truth of "
        f"{PICTURES} canvases and takes {STEPS:,} steps of {BATCH}. All numbers in percent on 539 test canvases, mean "
        "± standard deviation over the seeds; a seed draws the pictures, trains every teacher and every arm anew. "
        "The arms behind the tables: `docs/results/data/dense_digits-*.json`.",
        "",
    ]


def _tables(arms: Arms) -> list[str]:
    lines: list[str] = []
    for task, what in TASKS.items():
        columns = [*SCORES[task].values(), "multiply-adds", "CPU s"]
        lines += [f"## {HEADINGS[task]}", "", f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, words in dense_digits().arms.items():
            if name.startswith(task) and name in arms:
                lines.append(f"| {words.removesuffix(f', {what}')} | {' | '.join(_cells(arms, name, task))} |")
        lines.append("")
    return lines


HEADINGS = {
    "masks": "Which pixels, and what digit they are (higher is better)",
    "points": "Where the corners are, in percent of the frame's diagonal (NME: lower is better)",
}


def _cells(arms: Arms, name: str, task: str) -> list[str]:
    first = next(iter(arms[name].values()))
    seconds = statistics.mean(arm["cpu_seconds"] for arm in arms[name].values())
    return [*(spread(arms[name], key) for key in SCORES[task]), amount(first["multiply_adds"]), f"{seconds:.0f}"]


def _pairs(arms: Arms) -> list[str]:
    rows = [
        "## Pair by pair",
        "",
        "| task | comparison | gain in points (lowest to highest seed) | verdict |",
        "|---" * 4 + "|",
    ]
    for task, sign, key in (("masks", 1, "miou"), ("points", -1, "nme")):
        for one, other, words in PAIRS:
            if found := [sign * d for d in paired(arms, f"{task}_{one}", f"{task}_{other}", key)]:
                span = f"{statistics.mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f})"
                rows.append(f"| {TASKS[task]}, {key} | {words} | {span} | {verdict(found)} |")
    return rows


WORDS: tuple[str, ...] = ()
