"""The page of a study: one sentence, one chart, then everything behind them."""

from __future__ import annotations

from diffrep.report import choices, made, networks, predictions, results, sections, sets, sweeps, teachers, worth
from diffrep.report.arms import arms_blocks, middle_noise
from diffrep.report.findings import findings
from diffrep.report.headline import headline
from diffrep.report.numbers import listed
from diffrep.report.page import Block, Commands, Folded, Page, Section, Text
from diffrep.report.scores import short_words
from diffrep.report.values import Study


def study_page(study: Study) -> Page:
    """Everything the folder knows, in the order a reader asks."""
    probes = [e for e in study.entries if e.kind == "probe"]
    taps = list(dict.fromkeys(str(e.recipe["method"]["tap"]) for e in study.arms if e.kind == "repfusion"))
    first, *others = study.contests() or [study]
    found = [
        Section("", [*_waiting(study), *headline(first), *arms_blocks(first, "arms")]),
        *(_contest(one) for one in others),
        *sweeps.sweeps(study),
        worth.worth((study.result or {}).get("worth_labels") or (), {arm.name: arm.label for arm in study.arms}),
        predictions.predictions(study.arms),
        teachers.samples(study.entries),
        sets.drawn_sets(study.entries),
        made.made_images([*study.arms, *(e for e in study.entries if e not in study.arms)], study.entries),
        networks.networks(study.entries),
        *(teachers.sweep(probe, taps) for probe in probes),
        teachers.policies(study.entries, probes[0] if probes else None),
        choices.choices(study.entries),
        results.results(study),
        findings(study),
        results.labels(study),
        sections.curves(study.entries),
        sections.times(study.entries, (study.result or {}).get("cpu_seconds")),
        sections.licences(study.entries),
        _settings(study),
        _again(study),
        _fine_print(study),
    ]
    return Page(study.name, str(study.recipe.get("about") or ""), [s for s in found if s is not None])


def _contest(study: Study) -> Section:
    """Arms that another score than the study's own judges: their sentence and their chart."""
    name = study.metric() or ""
    return Section(f"Judged by {short_words(name)}", [*headline(study), *arms_blocks(study, f"arms-{name}")])


def _waiting(study: Study) -> list[Block]:
    """What is still to come, while something is."""
    if study.result is not None:
        return []
    left = "; ".join(f"{e.label} ({e.state()})" for e in study.unfinished())
    left = left or "only the study's own result is missing"
    return [Text(f"This study is not finished. Still to come: {left}.", "warning")]


def _settings(study: Study) -> Section:
    seeds = f"Seeds: {listed([str(s) for s in study.seeds])}. A seed fixes everything that is drawn by chance."
    hash_ = (study.result or {}).get("recipe_hash")
    settings = f" Recipe {hash_}: the hash of all settings." if hash_ else ""
    machine = sections.environments([(study.path.name, study.environment)])
    folded = Folded("All settings, and where they differ", sections.differences(study.entries))
    return Section("Settings and machine", [Text(seeds + settings), folded, *machine])


def _again(study: Study) -> Section:
    folder = study.path.resolve().name
    again = [f"diffrep run {folder}/recipe.yaml --out {folder}-again", f"diffrep report {folder} --out report.html"]
    blocks: list[Block] = [Text("The same again, and this page:"), Commands(again)]
    if ideas := study.recipe.get("next_commands"):
        blocks += [Text("What to try next:"), Commands(list(map(str, ideas)))]
    return Section("Run it yourself", blocks)


def _fine_print(study: Study) -> Section | None:
    found = [(one, noise) for one in study.contests() if (noise := middle_noise(one)) is not None]
    if not found:
        return None
    said = [
        f"All scores by {short_words(one.metric() or '')} are measured on the same {one.test_images():,} test images. "
        f"Were these drawn anew, one near the middle ({middle:.0f} %) would vary by {error:.1f} points (binomial "
        f"standard error); two such scores of one seed are told apart from {2 * 2**0.5 * error:.1f} points on."
        for one, (middle, error) in found
    ]
    reading = (
        "For one seed, “within the noise” means that a difference is less than twice its own standard error, the two "
        "scores taken as independent. For several seeds, “better” and “worse” mean that the 95 % interval of the mean "
        "difference (Student's t) leaves out zero."
    )
    return Section("Fine print", [*(Text(text, "note") for text in said), Text(reading, "note")])
