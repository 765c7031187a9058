"""Write docs/results/*.md from the recorded arms: what is committed is made by a command, never by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from diffrep.recipes import addp
from diffrep.recipes.base import Study
from diffrep.recipes.quickstart import LABELS, quickstart
from diffrep.report.build import write_figure
from diffrep.studies import instances
from diffrep.words import amount

RESULTS = Path("docs/results")
COMMAND = "make evidence"

Arms = dict[str, dict[int, dict[str, Any]]]  # stage -> seed -> recorded arm


def recorded(study: Study) -> Arms:
    """Every recorded arm of ``study``, whichever study wrote it, its own first; its own by another recipe: refused."""
    arms: Arms = {}
    hashes = {instance.name: instance.hash for instance in instances(study, Path("."))}
    for file in sorted((RESULTS / "data").glob("*.json")):
        arm = json.loads(file.read_text())
        fits = hashes.get(arm["stage"]) == arm["hash"]
        if arm["study"] == study.name and not fits:
            raise SystemExit(f"{file} was made by another recipe: delete it and run make evidence again")
        known = arms.setdefault(arm["stage"], {}) if fits else {}
        if arm["study"] == study.name or arm["seed"] not in known:
            known[arm["seed"]] = arm
    return arms


def quickstart_page() -> str:
    """The table with spread, then in words what beats what, computed from paired seeds."""
    arms = recorded(quickstart())
    names = {n: words for n, words in quickstart().arms.items() if n not in addp.ARMS}  # these have their own page
    linear, neighbour = f"linear_probe_{LABELS}", f"knn_{LABELS}"
    columns = (
        "arm | linear probe | nearest neighbour | top-1 | steps | images | multiply-adds | CPU s | labels trained on"
    )
    head = f"| {columns} |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for stage, name in names.items():
        by_seed = arms[stage]
        first = next(iter(by_seed.values()))
        scores = [spread(by_seed, key) for key in (linear, neighbour, "top1")]
        cost = [first["steps"], amount(first["images_seen"]), amount(first["multiply_adds"])]
        seconds = statistics.mean(a["cpu_seconds"] for a in by_seed.values())
        read = ", ".join(f"{part}: {count}" for part, count in first["labels_seen"].items()) or "none"
        rows.append(f"| {name} | {' | '.join(scores)} | {' | '.join(map(str, cost))} | {seconds:.1f} | {read} |")
    seeds = sorted(arms["conv_policy"])
    tested = next(iter(arms["conv_policy"].values()))["scores"]["test_images"]
    return "\n".join([_opening(seeds, tested), *rows, "", *_reading(arms, linear), ""])


def spread(by_seed: dict[int, dict[str, Any]], key: str) -> str:
    """``91.2 ± 0.8``: mean and standard deviation over the seeds."""
    values = [a["scores"][key] for a in by_seed.values() if key in a["scores"]]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _opening(seeds: list[int], tested: int) -> str:
    error = 100 * (0.9 * 0.1 / tested) ** 0.5
    return f"""# Quickstart: measured

Made by `{COMMAND}` (`diffrep run quickstart --seeds {",".join(map(str, seeds))}`), one thread per process on a CPU.
Percent correct on {tested} test digits that nothing else reads; mean ± standard deviation over {len(seeds)} seeds.
A seed draws the {LABELS} labels, the diffusion model, all students and the order of images anew; within a seed all
arms share them. One score near 90 % has a binomial standard error of {error:.1f} points, so compare arms seed by seed,
as below.
The arms behind the table: `docs/results/data/quickstart-*.json`.

The cost is each arm's own: the diffusion model (600 steps, about 40 CPU s) and the stored hints (about 30 CPU s) come
on top of every distilled arm and are shared by them.
"""


PAIRS = (
    ("policy", "untrained", "learned policy against the untrained student"),
    ("policy", "random", "learned policy against a random frozen teacher"),
    ("policy", "worst", "learned policy against the worst fixed t"),
    ("policy", "uniform", "learned policy against uniform t"),
    ("policy", "best", "learned policy against the best fixed t"),
    ("uniform", "uniform_joint", "uniform t: each timestep standardised by itself against all jointly"),
    ("best", "worst", "best fixed t against worst fixed t"),
)
TOP1 = (
    ("finetune", "scratch", "policy, then fine-tuned, against from scratch (top-1)"),
    ("finetune_best", "scratch", "best fixed t, then fine-tuned, against from scratch (top-1)"),
)


def _reading(arms: Arms, linear: str) -> list[str]:
    """Paired differences: mean, range, and in how many seeds the sign is the same."""
    lines = [
        "## Pair by pair",
        "",
        "| student | comparison | difference in points (lowest to highest seed) | verdict |",
        "|---|---|---|---|",
    ]
    for prefix, student in (("conv", "CNN"), ("mlp", "MLP")):
        for pairs, key in ((PAIRS, linear), (TOP1, "top1")):
            for better, other, words in pairs:
                differences = paired(arms, f"{prefix}_{better}", f"{prefix}_{other}", key)
                if differences:
                    low, high = min(differences), max(differences)
                    mean = statistics.mean(differences)
                    lines.append(
                        f"| {student} | {words} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {verdict(differences)} |"
                    )
    return lines


def paired(arms: Arms, one: str, other: str, key: str) -> list[float]:
    shared = sorted(arms.get(one, {}).keys() & arms.get(other, {}).keys())
    pairs = [(arms[one][s]["scores"], arms[other][s]["scores"]) for s in shared]
    return [a[key] - b[key] for a, b in pairs if key in a and key in b]


def verdict(differences: list[float]) -> str:
    """In words: a sign that every one of three or more seeds shares is a finding, anything else is not."""
    if len(differences) < 3:
        return f"{['one seed', 'two seeds'][len(differences) - 1]}: undecided"
    above = sum(d > 0 for d in differences)
    if above == len(differences):
        return "better in every seed"
    if not any(d > 0 for d in differences):
        return "not better in any seed"
    return f"better in {above} of {len(differences)} seeds: undecided"


def benchmarks_page(found: dict[str, Any]) -> str:
    """The rows that each room of ``make bench`` printed last."""
    measured = [entry for rows in found["rooms"].values() for entry in rows]
    head = "| ours | rival | our cost | its cost | ratio | unit |\n|---|---|---|---|---|---|"
    rows = [
        f"| {e['name']} | {e['rival']} | {e['ours']:.3f} | {e['theirs']:.3f} | {e['ratio']:.2f}x | {e['unit']} |"
        for e in measured
    ]
    shares = [
        f"- {e['name']}: {100 * e['multiply_adds_share']:.1f} % of the multiply-adds ({amount(e['multiply_adds'])} of "
        f"{amount(e['multiply_adds_full'])}), {100 * e['cpu_share']:.1f} % of the CPU time"
        for e in measured
        if "multiply_adds_share" in e
    ]
    words = "Made by `make bench`: one process, one thread, process CPU time, minimum of several repeats taken in turn."
    return "\n".join(
        ["# Benchmarks: measured", "", words, "", head, *rows, "", "Counted by torch's own counter:", "", *shares, ""]
    )


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "quickstart.md").write_text(quickstart_page())
    from benchmarks.evidence_addp import addp_page  # which build on this page
    from benchmarks.evidence_dense import dense_page
    from benchmarks.evidence_dmkd import dmkd_page
    from benchmarks.evidence_probe import probe_page
    from benchmarks.evidence_repfusion import repfusion_page
    from benchmarks.evidence_roads import roads_page

    made = {
        "repfusion": repfusion_page, "dmkd": dmkd_page, "addp": addp_page, "probe": probe_page, "roads": roads_page,
        "dense": dense_page,
    }  # fmt: skip
    pages = {name: page() for name, page in made.items()}
    for name, page in pages.items():
        if page:
            (RESULTS / f"{name}.md").write_text(page)
    study = Path("runs/evidence-quickstart")
    if (study / "result.json").exists():
        write_figure(study, Path("docs/figures/quickstart.svg"))
    benchmarks = Path("runs/benchmarks.json")
    if benchmarks.exists():
        (RESULTS / "benchmarks.md").write_text(benchmarks_page(json.loads(benchmarks.read_text())))
    print(f"wrote {RESULTS}/quickstart.md" + (f", {RESULTS}/benchmarks.md" if benchmarks.exists() else ""))


if __name__ == "__main__":
    main()
