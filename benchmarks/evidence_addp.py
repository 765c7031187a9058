"""The page docs/results/addp.md: what images of tokens are worth on digits, from recorded arms alone."""

from __future__ import annotations

import statistics

from benchmarks.evidence import Arms, paired, recorded, spread
from diffrep.recipes.addp import addp_digits

PAIRS = (
    ("one_step", "alternation", "all tokens at once against tokens and pixels in turn"),
    ("alternation", "predictor_alone", "tokens and pixels in turn against the token predictor alone"),
)


def addp_page() -> str:
    """The three ways of making digits, in one feature space."""
    study = addp_digits()
    arms = recorded(study)
    if not arms:
        return ""
    seeds = sorted(arms["alternation"])
    rows = [
        f"| {name} | {spread(arms[stage], 'frechet')} | {_kernel(arms, stage)} | {_seconds(arms, stage):.1f} |"
        for stage, name in study.arms.items()
    ]
    return "\n".join(
        [
            "# ADDP: measured",
            "",
            f"Made by `make evidence-addp` (`diffrep run addp_digits --seeds {','.join(map(str, seeds))}`), one thread "
            f"per process on a CPU. A seed trains tokenizer, token predictor, ADDP and the judging classifier anew. "
            "1,000 images of each arm against all 1,797 digits, in the pooled features of that classifier (D = 128): a "
            "Frechet distance of this space and this N, which is no FID and compares within this page alone. Mean ± "
            "standard deviation over the seeds; lower is better.",
            "",
            "| arm | Frechet distance | kernel distance | CPU s of making and scoring |",
            "|---|---|---|---|",
            *rows,
            "",
            *_reading(arms),
            "",
            "All tokens at once means that each is drawn for itself from what is known of its place: independent "
            "marginals. That the walk matters is the finding. The way through pixels gains nothing for images of "
            "digits (it costs a little), and no gain in recognition was seen or is to be expected at 8 pixels.",
            "",
        ]
    )


def _kernel(arms: Arms, stage: str) -> str:
    values = [a["scores"]["kernel"] for a in arms[stage].values()]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _seconds(arms: Arms, stage: str) -> float:
    return statistics.mean(a["cpu_seconds"] for a in arms[stage].values())


def _reading(arms: Arms) -> list[str]:
    rows = ["| comparison | difference (lowest to highest seed) |", "|---|---|"]
    for one, other, words in PAIRS:
        found = paired(arms, one, other, "frechet")
        if found:
            rows.append(f"| {words} | {statistics.mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f}) |")
    return rows
