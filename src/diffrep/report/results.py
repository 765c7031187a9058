"""The tables of a study: scores, what they cost, and which training looked at labels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from diffrep.report import sections
from diffrep.report.numbers import MISSING, compact, listed
from diffrep.report.page import Block, Section, Table, Text
from diffrep.report.scores import meanings, printed, score_words, unit_words
from diffrep.report.sections import labels_text
from diffrep.report.values import Entry, Study, builds_on, role, score_names

Group = tuple[str, list[Entry]]  # a heading, and what stands under it


def results(study: Study) -> Section | None:
    """A table of scores for each contest, then one of costs."""
    if not study.arms:
        return None
    blocks: list[Block] = [*(_scores(study, contest) for contest in study.contests()), *_aside(study)]
    names = score_names([*study.arms, *_unjudged(study)])
    return Section("All results", [*blocks, Text(meanings(names), "note"), _costs(study), Text(COUNTING, "note")])


COUNTING = (
    "Multiply-adds count training, forward and backward, or making images (k, M, G, T: thousand to million million); "
    "the column after it adds all that an arm builds on: diffusion model, teacher, drawn images, stored features and "
    "answers, networks of tokens, and who judges; several arms share these."
)


def _groups(study: Study, entries: Sequence[Entry]) -> list[Group]:
    """Arms by their student, then the stages that are no arms."""
    arms = [e for e in study.arms if e in entries]
    found = [(student, [a for a in arms if a.student == student]) for student in study.students]
    return [*found, ("Other stages", [e for e in entries if e not in arms])]


def _rows(study: Study, groups: Sequence[Group], row: dict[str, list[str]]) -> list[Sequence[str]]:
    """Each entry's row under the heading of its group; ``row`` holds them by name."""
    rows: list[Sequence[str]] = []
    waiting = {entry.name: f" ({entry.state()})" for entry in study.unfinished()}
    for title, entries in groups:
        rows += [[title]] if title and entries else []
        rows += [[f"{entry.short}{waiting.get(entry.name, '')}", *row[entry.name]] for entry in entries]
    return rows


def _scores(study: Study, contest: Study) -> Table:
    rest = [e for e in study.entries if e not in study.arms and e.scores and study.judged_by(e) == contest.metric()]
    entries = [*contest.arms, *(e for e in rest if score_names([e]))]
    first = contest.metric()
    names = list(dict.fromkeys([*([first] if first else []), *score_names(contest.arms)]))
    cells = {e.name: [printed(name, list(e.score(name).values())) for name in names] for e in entries}
    rows = _rows(study, _groups(contest, entries), cells)
    which = f"Arms judged by {score_words(first or '')}: scores" if len(study.contests()) > 1 else "Scores"
    return Table(f"{which}{unit_words(names)}.{_several(study)}", ["", *map(score_words, names)], rows)


def _several(study: Study) -> str:
    return " Several seeds: mean ± standard deviation (number of seeds)." if len(study.seeds) > 1 else ""


def _unjudged(study: Study) -> list[Entry]:
    """Stages with scores of a kind that no arm is judged by."""
    arms, judged = study.arms, {contest.metric() for contest in study.contests()}
    return [e for e in study.entries if e not in arms and score_names([e]) and study.judged_by(e) not in judged]


def _aside(study: Study) -> list[Block]:
    """What these score: beside the point of the study, and measured all the same."""
    found = _unjudged(study)
    names = score_names(found)
    if not found:
        return []
    rows = [[e.label, *(printed(name, list(e.score(name).values())) for name in names)] for e in found]
    caption = f"What the other stages score{unit_words(names)}.{_several(study)}"
    return [Table(caption, ["", *map(score_words, names)], rows)]


def _costs(study: Study) -> Table:
    cells = {entry.name: _cost_cells(entry, study) for entry in study.entries}
    rows = _rows(study, _groups(study, study.entries), cells)
    head = ["", "steps", "images seen", "multiply-adds", "the same with shared stages", "CPU seconds", "labels seen"]
    return Table("Costs per seed.", head, rows)


def _cost_cells(entry: Entry, study: Study) -> list[str]:
    steps, images, added, seconds = sections.budget_cells(entry)
    learned = any(entry.values("steps")) or entry.kind in sections.NO_TRAINING
    whole = [entry, *(builds_on(entry, study.entries) if learned else [])]
    sums = [fmean(v) for e in whole if (v := e.values("multiply_adds"))]
    total = compact(sum(sums)) if len(sums) == len(whole) else MISSING
    return [steps, images, added, total, seconds, sections.label_counts(entry)]


def labels(study: Study) -> Section | None:
    """Which training looked at labels, directly or through what it started from."""
    owners: dict[tuple[str, str], list[str]] = {}
    for entry in study.entries:
        if entry.kind not in sections.NO_TRAINING and entry.results():
            before = dict.fromkeys(_labels_of(e, study) for e in builds_on(entry, study.entries))
            through = "; ".join(text for text in before if text not in ("none", MISSING)) or "none"
            owners.setdefault((labels_text(entry), through), []).append(entry.label)
    if not owners:
        return None
    rows = [(own, before, sections.grouped(names)) for (own, before), names in owners.items()]
    head = ("Labels seen in training", "before, by what it started from", "who")
    table = Table("How many labels training looked at, and which part of it", head, rows, True)
    return Section("Which model saw which labels", [table, *(Text(t) for t in _judges(study))])


def _labels_of(entry: Entry, study: Study) -> str:
    """Labels of something that others build on. A classifier that teaches was the student of its own training."""
    text = labels_text(entry)
    return text.replace(": student", ": teacher") if role(entry, study.entries) == "teacher" else text


def _judges(study: Study) -> list[str]:
    """Labels that only the measuring uses."""
    recipes = [arm.recipe for arm in study.arms if "data" in arm.recipe]
    recipes = [recipe for recipe in recipes if recipe.get("evaluate", {}).get("protocol") != "classifier"]
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
