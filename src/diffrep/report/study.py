"""The page of a study: one sentence, one chart, then everything behind them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from diffrep.report import pictures, sections, teachers
from diffrep.report.findings import findings
from diffrep.report.numbers import (
    MISSING,
    binomial_se,
    compact,
    labels_in,
    listed,
    percent,
    score_words,
    sentence,
    shown,
)
from diffrep.report.page import Block, Commands, Folded, Notes, Page, Picture, Section, Table, Text
from diffrep.report.sections import labels_text
from diffrep.report.values import NO_SCORE, Entry, Study, builds_on, role


def study_page(study: Study) -> Page:
    """Everything the folder knows, in the order a reader asks."""
    probes = [e for e in study.entries if e.kind == "probe"]
    taps = list(dict.fromkeys(str(e.recipe["method"]["tap"]) for e in study.arms if e.kind == "repfusion"))
    found = [
        Section("", [*_headline(study), *_arms_picture(study)]),
        teachers.samples(study.entries),
        *(teachers.sweep(probe, taps) for probe in probes),
        teachers.policies(study.entries, probes[0] if probes else None),
        _results(study),
        findings(study),
        _labels(study),
        sections.curves(study.entries),
        sections.times(study.entries, (study.result or {}).get("cpu_seconds")),
        sections.licences(study.entries),
        _settings(study),
        _again(study),
        _fine_print(study),
    ]
    return Page(study.name, str(study.recipe.get("about") or ""), [s for s in found if s is not None])


def _headline(study: Study) -> list[Block]:
    """A sentence per student, or what can be said so far."""
    said = [text for student in study.students if (text := _student_sentence(study, student))]
    blocks: list[Block] = [Text(text, "lead") for text in said]
    if study.result is None:
        left = "; ".join(f"{e.label} ({e.state()})" for e in study.unfinished())
        left = left or "only the study's own result is missing"
        blocks.insert(0, Text(f"This study is not finished. Still to come: {left}.", "warning"))
    return blocks


def _student_sentence(study: Study, student: str) -> str | None:
    name, roles = study.metric() or "", study.by_role(student)
    scored = [arm for arms in roles.values() for arm in arms if arm.score(name)]
    if not scored:
        return None
    best = max(scored, key=lambda arm: _mean(arm, name))
    hero = next((arm for arm in scored if role(arm, study.entries) == "policy"), best)
    labels, seeds = labels_in(name), len(hero.score(name))
    opening = f"With {labels:,} labels, {_deed(hero, study)}" if labels else _deed(hero, study)
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    score = f"scores {_percent(hero, name)} by {score_words(name).partition(',')[0]}{over}."
    return f"{sentence(opening)} {score}{_others(study, student, hero)}"


def _others(study: Study, student: str, hero: Entry) -> str:
    """The same network in the other roles."""
    name, roles = study.metric() or "", study.by_role(student)
    said = []
    for key, words in OTHERS.items():
        arms = [arm for arm in roles.get(key, []) if arm is not hero]
        if arms and all(arm.score(name) for arm in arms):
            arm = max(arms, key=lambda a: _mean(a, name))
            said.append(f"{_percent(arm, name)} {words.format(arm.short)}")
    return f" The same network scores {listed(said)}." if said else ""


OTHERS = {
    "untrained": "untrained",
    "scratch": "trained on those labels alone",
    "uniform": "when the timesteps are drawn evenly",
    "fixed": "at the best single timestep tried (“{}”)",
}


def _deed(arm: Entry, study: Study) -> str:
    """``the CNN that imitated a diffusion model at the timesteps a learned policy chose``."""
    student = f"the {arm.student}" if arm.student else "the student"
    did = {
        "policy": "that imitated a diffusion model at the timesteps a learned policy chose",
        "uniform": "that imitated a diffusion model at timesteps drawn evenly",
        "scratch": "trained on those labels alone",
    }.get(role(arm, study.entries))
    return f"{student} {did}" if did else f"“{arm.label}”"


def _mean(arm: Entry, name: str) -> float:
    return fmean(arm.score(name).values())


def _percent(arm: Entry, name: str) -> str:
    return percent(list(arm.score(name).values()))


def arm_rows(study: Study) -> list[pictures.Dots]:
    """The rows of the arms chart."""
    name = study.metric() or ""
    return [
        pictures.Dots(a.student, a.short, list(a.score(name).values()), role(a, study.entries) == "policy")
        for a in study.arms
    ]


def arms_alt(study: Study) -> str:
    """The arms chart in words."""
    name = study.metric() or ""
    scores = "; ".join(f"{arm.label} {shown(list(arm.score(name).values()))}" for arm in study.arms)
    return f"Score of each arm in percent ({score_words(name)}). {scores}."


PROBE = (
    "The score is a linear probe: the trained network is frozen, the simplest classifier there is learns from its "
    "output with the labelled images, and what counts is the share of test images it then names correctly. "
)
IDEA = (
    "The idea: a diffusion model, trained without any label, is the teacher. A small network, the student, learns to "
    "produce the same inner features for the same image. This is called distillation. Then one asks how good the "
    "student's own features are. "
)
ROLES = {
    "untrained": "as it was initialised; nothing was learned",
    "random": "imitates a diffusion model that was never trained: what imitating alone brings",
    "fixed": "always the same timestep of the diffusion model, named in the recipe",
    "uniform": "a timestep drawn evenly from the list for each image",
    "uniform_each": "the same, with the features of each timestep brought to one scale first",
    "policy": "a small network chooses the timestep for each image, and learns to choose",
    "scratch": "no teacher; learns from the labelled images alone",
    "tuned": "imitates first, then learns from the labelled images",
}


def _arms_picture(study: Study) -> list[Block]:
    name = study.metric()
    if not name or not study.arms:
        return []
    idea = IDEA if any(arm.kind == "repfusion" for arm in study.arms) else ""
    score = PROBE if name.startswith("linear_probe") else f"The score is {score_words(name)}, in percent. "
    chart = pictures.arms_chart(arm_rows(study), f"% correct, {score_words(name)}")
    picture = Picture(arms_alt(study), _arms_caption(study, name), chart)
    said = _rows_explained(study)
    return [Text(f"{idea}{score}Each row of the chart is one way of training, an arm."), picture, *said]


def _rows_explained(study: Study) -> list[Block]:
    """What each role is, under the names its arms have here."""
    names: dict[str, list[str]] = {}
    for arm in study.arms:
        names.setdefault(role(arm, study.entries), []).append(arm.short)
    said = [(" / ".join(dict.fromkeys(names[key])), f"{text}.") for key, text in ROLES.items() if key in names]
    return [Text("What the rows mean:"), Notes(said)] if said else []


def _arms_caption(study: Study, name: str) -> str:
    several = "Small dots are seeds, bars one standard deviation. " if len(study.seeds) > 1 else "One seed. "
    diamonds = any(role(arm, study.entries) == "policy" for arm in study.arms)
    marked = "Orange diamonds: the learned policy. " if diamonds else ""
    error, images = _standard_error(study, name) or 0.0, study.test_images()
    close = f"With {images:,} test images one score is sure to about ± {error:.1f} points (standard error)."
    return f"{several}{marked}The axis does not begin at zero. {close if error else ''}".strip()


def _standard_error(study: Study, name: str) -> float | None:
    """Of one score near the average, from the number of test images."""
    values = [v for arm in study.arms for v in arm.score(name).values()]
    return binomial_se(fmean(values), study.test_images()) if values and study.test_images() else None


def _results(study: Study) -> Section | None:
    """Scores and costs, an arm a row."""
    if not study.arms:
        return None
    names = _score_names(study)
    groups = [(student, [arm for arm in study.arms if arm.student == student]) for student in study.students]
    groups.append(("Other stages", [e for e in study.entries if e not in study.arms]))
    rows: list[Sequence[str]] = []
    for title, entries in groups:
        rows += [[title]] if title and entries else []
        rows += [_row(entry, names, study) for entry in entries]
    head = ["", *map(score_words, names), "steps", "images seen", "multiply-adds", "the same with shared stages"]
    several = " Several seeds: mean ± standard deviation (number of seeds)." if len(study.seeds) > 1 else ""
    caption = f"Scores in percent; costs per seed.{several}"
    return Section("All results", [Table(caption, [*head, "CPU seconds", "labels seen"], rows), Text(READ, "note")])


READ = (
    "k-NN: the class of the most similar labelled image. Top-1: the network's own last layer names the image. "
    "Multiply-adds count training, forward and backward (k, M, G, T: thousand to million million); the column after "
    "it adds the diffusion model and the stored features an arm learned from, which several arms share."
)


def _score_names(study: Study) -> list[str]:
    first = study.metric()
    names = [n for arm in study.arms for scores in arm.scores.values() for n in scores if n not in NO_SCORE]
    return list(dict.fromkeys([first, *names] if first else names))


def _row(entry: Entry, names: Sequence[str], study: Study) -> list[str]:
    steps, images, added, seconds = sections.budget_cells(entry)
    learned = any(entry.values("steps")) or entry.kind in ("probe", "features")
    whole = [entry, *(builds_on(entry, study.entries) if learned else [])]
    sums = [fmean(v) for e in whole if (v := e.values("multiply_adds"))]
    total = compact(sum(sums)) if len(sums) == len(whole) else MISSING
    scores = [shown(list(entry.score(name).values())) for name in names]
    label = f"{entry.short} ({entry.state()})" if entry in study.unfinished() else entry.short
    return [label, *scores, steps, images, added, total, seconds, labels_text(entry)]


def _labels(study: Study) -> Section | None:
    """Which training looked at labels, directly or through what it started from."""
    owners: dict[tuple[str, str], list[str]] = {}
    for entry in study.entries:
        if entry.kind not in ("probe", "features") and entry.results():
            before = dict.fromkeys(labels_text(e) for e in builds_on(entry, study.entries))
            through = "; ".join(text for text in before if text not in ("none", MISSING)) or "none"
            owners.setdefault((labels_text(entry), through), []).append(entry.label)
    if not owners:
        return None
    rows = [(own, before, sections.grouped(labels)) for (own, before), labels in owners.items()]
    head = ("Labels seen in training", "before, by what it started from", "who")
    table = Table("How many labels training looked at, and which part of it", head, rows, True)
    return Section("Which model saw which labels", [table, *(Text(t) for t in _judges(study))])


def _judges(study: Study) -> list[str]:
    """Labels that only the measuring uses."""
    recipes = [arm.recipe for arm in study.arms if "data" in arm.recipe]
    counts = sorted({n for recipe in recipes for n in recipe.get("evaluate", {}).get("probe_labels", [])})
    if not counts:
        return []
    said = (
        f"To be scored, every arm's linear probe and k-NN get {listed([f'{n:,}' for n in counts])} labelled training "
        f"images, also those of arms that saw none. Test labels serve only to count what is right."
    )
    draws = {(recipe["data"].get("label_seed"), recipe["data"].get("labels")) for recipe in recipes}
    if {labels for _, labels in draws} != set(counts) or len(draws) > 1:
        return [said]
    return [said, f"Within a seed these are always the same {counts[0]:,} images, in training and in scoring."]


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
    error = _standard_error(study, study.metric() or "")
    if error is None:
        return None
    text = (
        f"All scores are measured on the same {study.test_images():,} test images. Were these drawn anew, a score near "
        f"the average would vary by {error:.1f} points (binomial standard error). For one seed, “within the noise” "
        f"means that a difference is less than twice its own standard error, the two scores taken as independent; here "
        f"that is about {2 * 2**0.5 * error:.1f} points. For several seeds, “better” and “worse” mean that the 95 % "
        f"interval of the mean difference (Student's t) leaves out zero."
    )
    return Section("Fine print", [Text(text, "note")])
