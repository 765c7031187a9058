"""The page of a study: one sentence, one chart, then everything behind them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from diffrep.report import pictures, sections
from diffrep.report.numbers import (
    MISSING,
    Paired,
    binomial_se,
    compact,
    labels_in,
    listed,
    paired,
    percent,
    score_words,
    shown,
)
from diffrep.report.page import Block, Commands, Notes, Page, Picture, Section, Table, Text
from diffrep.report.reading import NO_SCORE, Entry, Study, builds_on, role

RIVALS = ("uniform", "uniform_each", "fixed", "random", "untrained")  # what a policy is held against


def study_page(study: Study) -> Page:
    """Everything the folder knows, in the order a reader asks."""
    probes = [e for e in study.entries if e.kind == "probe"]
    taps = list(dict.fromkeys(str(e.recipe["method"]["tap"]) for e in study.arms if e.kind == "repfusion"))
    found = [
        Section("", [*headline(study), *_arms_picture(study)]),
        sections.samples(study.entries),
        *(sections.sweep(probe, taps) for probe in probes),
        sections.policies(study.entries, probes[0] if probes else None),
        _results(study),
        _findings(study),
        _labels(study),
        sections.curves(study.entries),
        sections.times(study.entries, (study.result or {}).get("cpu_seconds")),
        sections.licences(study.entries),
        _settings(study),
        _again(study),
        _fine_print(study),
    ]
    about = str(study.recipe.get("about") or "")
    return Page(str(study.recipe.get("name", study.path.name)), about, [s for s in found if s is not None])


def metric(study: Study) -> str | None:
    """The score the study is about; without one named, the first that an arm has."""
    names = [n for arm in study.arms for scores in arm.scores.values() for n in scores if n not in NO_SCORE]
    return study.recipe.get("headline") or next(iter(names), None)


def by_role(study: Study, student: str) -> dict[str, list[Entry]]:
    """One student's arms by what they are there for."""
    found: dict[str, list[Entry]] = {}
    for arm in study.arms:
        if arm.student == student:
            found.setdefault(role(arm, study.entries), []).append(arm)
    return found


def headline(study: Study) -> list[Block]:
    """A sentence per student, or what can be said so far."""
    students = list(dict.fromkeys(arm.student for arm in study.arms))
    said = [text for student in students if (text := _student_sentence(study, student))]
    blocks: list[Block] = [Text(text, "lead") for text in said]
    waiting = [e for e in study.entries if e.state() != "finished"]
    if study.result is None or waiting:
        left = "; ".join(f"{e.label} ({e.state()})" for e in waiting) or "only the study's own result is missing"
        blocks.insert(0, Text(f"This study is not finished. Still to come: {left}.", "warning"))
    return blocks


def _student_sentence(study: Study, student: str) -> str | None:
    name, roles = metric(study), by_role(study, student)
    scored = [arm for arms in roles.values() for arm in arms if name and arm.score(name)]
    if not name or not scored:
        return None
    hero = next((a for a in roles.get("policy", []) if a in scored), None) or max(scored, key=lambda a: _mean(a, name))
    labels = labels_in(name)
    opening = f"With {labels:,} labels, {_deed(hero, study)}" if labels else _deed(hero, study).capitalize()
    score = score_words(name).partition(",")[0]
    rest = [
        f"{words} {percent(list(arms[0].score(name).values()))}"
        for key, words in COMPARED.items()
        if (arms := [a for a in roles.get(key, []) if a in scored and a is not hero])
    ]
    seeds = f", mean of {len(hero.score(name))} seeds" if len(hero.score(name)) > 1 else ""
    tail = f" The same network {listed(rest)}." if rest else ""
    return f"{opening} scores {percent(list(hero.score(name).values()))} by {score}{seeds}.{tail}"


COMPARED = {
    "untrained": "untrained:",
    "scratch": "trained on those labels alone:",
    "uniform": "imitating at timesteps drawn evenly:",
    "fixed": "",
}
COMPARED.pop("fixed")  # several arms share this role; the chart shows them


def _deed(arm: Entry, study: Study) -> str:
    """``a CNN that imitated a diffusion model at the timestep a policy chose``."""
    student = f"a {arm.student}" if arm.student else "a student"
    did = {
        "policy": "that imitated a diffusion model at the timesteps a learned policy chose",
        "uniform": "that imitated a diffusion model at timesteps drawn evenly",
        "scratch": "trained on those labels alone",
    }.get(role(arm, study.entries))
    return f"{student} {did}" if did else arm.label


def _mean(arm: Entry, name: str) -> float:
    return fmean(arm.score(name).values())


def arm_rows(study: Study) -> list[pictures.Dots]:
    """The rows of the arms chart."""
    name = metric(study) or ""
    return [
        pictures.Dots(a.student, a.short, list(a.score(name).values()), role(a, study.entries) == "policy")
        for a in study.arms
    ]


def arms_alt(study: Study) -> str:
    """The arms chart in words."""
    name = metric(study) or ""
    scores = "; ".join(f"{arm.label} {shown(list(arm.score(name).values()))}" for arm in study.arms)
    return f"Score of each arm in percent ({score_words(name)}). {scores}."


def _arms_picture(study: Study) -> list[Block]:
    name = metric(study)
    if not name:
        return []
    explained = {
        "linear_probe": "The score is a linear probe: the trained network is frozen, and the simplest classifier there is "
        "learns from its output with the labelled images; what is shown is the share of test images it names correctly.",
    }.get(name.rpartition("_")[0], f"The score is {score_words(name)}, in percent of the test images.")
    blocks: list[Block] = [Text(f"{explained} Each row is one way of training, an arm.")]
    chart = pictures.arms_chart(arm_rows(study), f"% correct, {score_words(name)}")
    return [*blocks, Picture(arms_alt(study), _arms_caption(study, name), chart)]


def _arms_caption(study: Study, name: str) -> str:
    several = "Small dots are seeds, bars one standard deviation. " if len(study.seeds) > 1 else "One seed. "
    diamonds = any(role(arm, study.entries) == "policy" for arm in study.arms)
    marked = "Orange diamonds: the learned policy. " if diamonds else ""
    error = _standard_error(study, name)
    close = f" With {error[1]:,} test images a score is only sure to about ± {error[0]:.1f} points." if error else ""
    return f"{several}{marked}The axis does not begin at zero.{close}"


def _standard_error(study: Study, name: str) -> tuple[float, int] | None:
    """Of one score, and the number of test images behind it."""
    images = test_images(study)
    values = [v for arm in study.arms for v in arm.score(name).values()]
    return (binomial_se(fmean(values), images), images) if values and images else None


def test_images(study: Study) -> int:
    counts = [s["test_images"] for arm in study.arms for s in arm.scores.values() if s.get("test_images")]
    return int(min(counts)) if counts else 0


def _results(study: Study) -> Section | None:
    """Scores and costs, an arm a row."""
    if not study.arms:
        return None
    names = _score_names(study)
    rows: list[Sequence[str]] = []
    for student in dict.fromkeys(arm.student for arm in study.arms):
        rows += [[student]] if student else []
        rows += [_row(arm, names, study) for arm in study.arms if arm.student == student]
    shared = [e for e in study.entries if e not in study.arms]
    rows += [["What several arms build on"]] if shared else []
    rows += [_row(entry, names, study) for entry in shared]
    head = ["", *map(score_words, names), "steps", "images seen", "multiply-adds", "with what it builds on"]
    several = " Several seeds: mean ± standard deviation (number of seeds)." if len(study.seeds) > 1 else ""
    caption = f"Scores in percent; costs per seed.{several}"
    return Section("All results", [Table(caption, [*head, "CPU seconds", "labels seen"], rows), Text(READ, "note")])


READ = (
    "k-NN: the class of the most similar labelled image. Top-1: the network's own last layer names the image. "
    "Multiply-adds count training, forward and backward (k, M, G, T: thousand to million million); the column after "
    "it adds the diffusion model and the stored features an arm learned from, which several arms share."
)


def _score_names(study: Study) -> list[str]:
    first = metric(study)
    names = [n for arm in study.arms for scores in arm.scores.values() for n in scores if n not in NO_SCORE]
    return list(dict.fromkeys([first, *names] if first else names))


def _row(entry: Entry, names: Sequence[str], study: Study) -> list[str]:
    steps, images, added, seconds = sections.budget_cells(entry)
    whole = [entry, *builds_on(entry, study.entries)]
    sums = [fmean(v) for e in whole if (v := e.values("multiply_adds"))]
    total = compact(sum(sums)) if len(sums) == len(whole) else MISSING
    scores = [shown(list(entry.score(name).values())) for name in names]
    label = entry.short if entry.state() == "finished" else f"{entry.short} ({entry.state()})"
    return [label, *scores, steps, images, added, total, seconds, labels_text(entry)]


def labels_text(entry: Entry) -> str:
    """``50: task head, policy``; ``none``."""
    results = entry.results()
    if not results:
        return MISSING
    by_count: dict[int, list[str]] = {}
    for part, count in (results[0].get("labels_seen") or {}).items():
        by_count.setdefault(count, []).append(part)
    return "; ".join(f"{count:,}: {', '.join(parts)}" for count, parts in by_count.items()) or "none"


def _findings(study: Study) -> Section | None:
    """The policy against its rivals, fine-tuning against scratch: differences seed by seed."""
    rows: list[Sequence[str]] = []
    for student in dict.fromkeys(arm.student for arm in study.arms):
        found = _student_findings(study, student)
        rows += [[student or "All"], *found] if found else []
    if not rows:
        return None
    head = ("", "difference, points", "reading")
    note = (
        f"{sum(len(r) > 1 for r in rows)} comparisons stand here; of twenty without any true difference, one would "
        f"look like one. Differences are taken within a seed: same labelled images, same diffusion model."
    )
    caption = "First arm minus second; ± is the standard deviation over seeds"
    return Section("What beats what", [Notes(_verdicts(study)), Table(caption, head, rows, True), Text(note, "note")])


def _pairs(study: Study, student: str) -> list[tuple[str, Entry, Entry, str]]:
    """(question, ours, rival, score name) of one student."""
    roles, name = by_role(study, student), metric(study) or ""
    pairs = [("policy", p, r, name) for p in roles.get("policy", []) for key in RIVALS for r in roles.get(key, [])]
    scores = list(dict.fromkeys([name, "top1"]))
    tuned = [("tuned", t, s, n) for n in scores for t in roles.get("tuned", []) for s in roles.get("scratch", [])]
    return pairs + tuned


def _student_findings(study: Study, student: str) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for _, ours, rival, name in _pairs(study, student):
        found = paired(ours.score(name), rival.score(name), test_images(study))
        if found is not None:
            which = "" if name == metric(study) else f" ({score_words(name)})"
            rows.append([f"{ours.short} − {rival.short}{which}", found.shown(), found.reading()])
    return rows


def _verdicts(study: Study) -> list[str]:
    """In plain sentences: the policy against uniform t, and fine-tuning against scratch, for every student."""
    said: list[str] = []
    for student in dict.fromkeys(arm.student for arm in study.arms):
        who = f"{student}: " if student else ""
        for question, ours, rival, name in _pairs(study, student):
            found = paired(ours.score(name), rival.score(name), test_images(study))
            asked = question == "tuned" or role(rival, study.entries) in ("uniform", "uniform_each")
            if found is not None and asked:
                said.append(f"{who}{_verdict(ours, rival, name, found)}")
    return said


def _verdict(ours: Entry, rival: Entry, name: str, found: Paired) -> str:
    what = f"“{ours.short}” {_beats(found)} “{rival.short}” by {score_words(name).partition(',')[0]}"
    return f"{what} ({found.shown()} points)."


def _beats(found: Paired) -> str:
    half = found.half_width()
    if half is None:
        sure = " clearly" if abs(found.mean) >= 2 * found.noise else ""
        return f"scores{sure} {'higher than' if found.mean > 0 else 'lower than' if found.mean < 0 else 'the same as'}"
    if abs(found.mean) <= half:
        return "does not clearly beat, nor lose to,"
    return "beats" if found.mean > 0 else "does not beat but loses to"


def _labels(study: Study) -> Section | None:
    """Which training looked at labels, directly or through what it started from."""
    owners: dict[tuple[str, str], list[str]] = {}
    for entry in study.entries:
        if entry.kind in ("probe", "features") or not entry.results():
            continue
        before = [f"{e.label}: {labels_text(e)}" for e in builds_on(entry, study.entries) if labels_text(e) != "none"]
        owners.setdefault((labels_text(entry), "; ".join(before) or "none"), []).append(entry.label)
    if not owners:
        return None
    rows = [(listed(names), own, before) for (own, before), names in owners.items()]
    head = ("Trained", "labels seen in training", "labels behind what it started from")
    return Section(
        "Which model saw which labels",
        [Table("Labels that training looked at", head, rows, True), *(Text(t) for t in _judges(study))],
    )


def _judges(study: Study) -> list[str]:
    """Labels that only the measuring uses."""
    counts = sorted({n for arm in study.arms for n in arm.recipe.get("evaluate", {}).get("probe_labels", [])})
    said = []
    if counts:
        said.append(
            f"To be scored, every arm's linear probe and k-NN get {listed([f'{n:,}' for n in counts])} labelled training "
            f"images, the arms that saw none before included. Test labels are only used to count what is right."
        )
    draws = {
        (a.recipe["data"].get("label_seed"), a.recipe["data"].get("labels")) for a in study.arms if "data" in a.recipe
    }
    if len(draws) == 1 and counts == [next(iter(draws))[1]]:
        said.append(f"Within a seed these are always the same {counts[0]:,} images, in training and in scoring.")
    return said


def _settings(study: Study) -> Section:
    seeds = f"Seeds: {listed([str(s) for s in study.seeds])}. A seed fixes everything that is drawn by chance."
    hash_ = (study.result or {}).get("recipe_hash")
    settings = f" Recipe {hash_}: the hash of all settings." if hash_ else ""
    machine = sections.environments([(study.path.name, study.environment)])
    return Section("Settings and machine", [Text(seeds + settings), *sections.differences(study.entries), *machine])


def _again(study: Study) -> Section:
    folder = study.path.resolve().name
    again = [f"diffrep run {folder}/recipe.yaml --out {folder}-again", f"diffrep report {folder} --out report.html"]
    blocks: list[Block] = [Text("The same again, and this page:"), Commands(again)]
    if ideas := study.recipe.get("next_commands"):
        blocks += [Text("What to try next:"), Commands(list(map(str, ideas)))]
    return Section("Run it yourself", blocks)


def _fine_print(study: Study) -> Section | None:
    error = _standard_error(study, metric(study) or "")
    if error is None:
        return None
    text = (
        f"All scores are measured on the same {error[1]:,} test images. Were these drawn anew, a score near the average "
        f"would vary by {error[0]:.1f} points (binomial standard error), so two scores closer than about "
        f"{2 * 2**0.5 * error[0]:.0f} points may change places, seeds aside. For one seed, “within the noise of the "
        f"test set” means less than twice the standard error of a difference, the two scores taken as independent. For "
        f"several seeds, “better” and “worse” mean that the 95 % interval of the mean difference (Student's t) leaves "
        f"out zero."
    )
    return Section("Fine print", [Text(text, "note")])
