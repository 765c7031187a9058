"""What a page says first: for each student a sentence with its score, and what the same network scores otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from diffrep.report.findings import pairs
from diffrep.report.made import made_headline
from diffrep.report.numbers import listed, sentence
from diffrep.report.page import Block, Text
from diffrep.report.scores import average_of, best, labels_in, short_words, valued
from diffrep.report.values import DENSE, Entry, Study, references, role


def headline(study: Study) -> list[Block]:
    """Of one contest: what can be said of its students so far."""
    return [block for student in study.students for block in _of_student(study, student)]


def _of_student(study: Study, student: str) -> list[Block]:
    name, roles = study.metric() or "", study.by_role(student)
    scored = [arm for arms in roles.values() for arm in arms if arm.score(name)]
    if not scored or set(roles) == {"teacher"}:  # a teacher's score stands beside its students'
        return []
    if any(arm.kind == "generation" for arm in scored):
        return made_headline(scored, name, study.entries)
    drawn = [arm for arm in scored if arm in roles.get("drawn", [])]
    if drawn:
        return _unseen(study, student, drawn)
    hero = next((arm for arm in scored if role(arm, study.entries) == "policy"), best(scored, name))
    labels, seeds = labels_in(name), len(hero.score(name))
    opening = f"With {labels:,} labels, {_deed(hero, study)}" if labels else _deed(hero, study)
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    score = f"scores {_percent(hero, name)} by {short_words(name)}{over}."
    return [Text(f"{sentence(opening)} {score}{_others(study, student, hero)}", "lead")]


def _others(study: Study, student: str, hero: Entry) -> str:
    """The same network in the other roles."""
    name, roles = study.metric() or "", study.by_role(student)
    said = []
    for key, words in OTHERS.items():
        arms = [arm for arm in roles.get(key, []) if arm is not hero]
        if arms and all(arm.score(name) for arm in arms):
            arm = best(arms, name)
            said.append(f"{_percent(arm, name)} {words.format(short=arm.short, labels=_labels(arm, name))}")
    return f" The same network scores {listed(said)}." if said else ""


OTHERS = {
    "untrained": "untrained",
    "real": "taught on real images",
    "scratch": "trained on {labels} alone",
    "uniform": "when the timesteps are drawn evenly",
    "fixed": "at the best single timestep tried (“{short}”)",
    "noise": "taught on noise",
}


def _deed(arm: Entry, study: Study) -> str:
    """``the CNN that imitated a diffusion model at the timesteps a learned policy chose``."""
    student = f"the {arm.student}" if arm.student else "the student"
    did = {
        "policy": "that imitated a diffusion model at the timesteps a learned policy chose",
        "uniform": "that imitated a diffusion model at timesteps drawn evenly",
        "scratch": f"trained on {_labels(arm, study.metric() or '')} alone",
        "real": "taught on real images",
    }.get(role(arm, study.entries))
    return f"{student} {did}" if did else f"“{arm.label}”"


def _labels(arm: Entry, name: str) -> str:
    """``those labels`` where the score has named a number, else how many the arm itself learned from."""
    if labels_in(name):
        return "those labels"
    count, what = _counted(arm, "labels_seen"), "pictures" if arm.kind in DENSE else "real labels"
    return f"{count:,} {what}" if count else what


def _percent(arm: Entry, name: str) -> str:
    return average_of(name, list(arm.score(name).values()))


def _unseen(study: Study, student: str, drawn: Sequence[Entry]) -> list[Block]:
    """Of a student of drawn images: its score, who did see real images, and the difference to its twin."""
    name, hero = study.metric() or "", drawn[0]
    seeds = len(hero.score(name))
    over = f" (mean of {seeds} seeds ± standard deviation)" if seeds > 1 else ""
    who = f"the {student or 'student'} that never saw a real image"
    low, high = (_spread(pick(drawn, key=lambda arm: arm.mean(name)), name) for pick in (min, max))
    score, where = (
        (_spread(hero, name), "") if len(drawn) == 1 else (f"from {low} to {high}", SETTINGS.format(len(drawn)))
    )
    lead = f"{sentence(who)} scores {score} by {short_words(name)}{over}{where}.{_others(study, student, hero)}"
    said = [_who_saw(hero), _twin(study, hero) if len(drawn) == 1 else CHOSEN]
    return [Text(lead + _teacher(study, hero), "lead"), Text(" ".join(filter(None, said)))]


SETTINGS = ", over {} settings"
CHOSEN = "The test images tell which setting is the highest, so its score flatters a little."


def _spread(arm: Entry, name: str) -> str:
    """``98.1 ± 0.3 %``."""
    return valued(name, list(arm.score(name).values()))


def _teacher(study: Study, hero: Entry) -> str:
    named = references(hero.recipe.get("method", {}).get("teacher"))
    name = study.metric() or ""
    scores = [v for entry in study.entries if entry.name in named for v in entry.score(name).values()]
    return f" Its teacher scores {average_of(name, scores)}." if scores else ""


def _who_saw(hero: Entry) -> str:
    """Who had learned from real images before, in numbers where they are recorded."""
    behind = (hero.results() or [{}])[0].get("labels_behind") or {}
    counts = [
        max((n for key, n in behind.items() if key.startswith(who)), default=0) for who in ("teacher:", "generator:")
    ]
    teacher, generator = (f"{n:,} labelled ones" if n else "real ones, how many is not recorded" for n in counts)
    labels = _counted(hero, "labels_seen")
    own = f"of labels it was given those of {labels:,} drawn images" if labels else "and no label"
    return (
        f"Real images do stand behind it: its teacher learned from {teacher}, the generator that drew for it from "
        f"{generator}. The student itself was shown none of them, {own}."
    )


def _counted(arm: Entry, key: str) -> int:
    """The largest number of labels that a finished run notes under ``key``."""
    return max(((arm.results() or [{}])[0].get(key) or {}).values(), default=0)


def _twin(study: Study, hero: Entry) -> str:
    """The difference to the same student taught on real images, and whether it says anything."""
    found = [p.found for p in pairs(study) if p.ours is hero and role(p.rival, study.entries) == "real"]
    if not found:
        return ""
    return f"Drawn instead of real images change its score by {found[0].shown()} points ({found[0].reading()})."
