"""What beats what, seed by seed: the policy against its rivals, fine-tuning against scratch, drawn images against real
ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffrep.report.numbers import MINUS, Paired, paired, sentence
from diffrep.report.page import Folded, Notes, Section, Table, Text
from diffrep.report.scores import LOW, score_words, short_words
from diffrep.report.sweeps import settings_in
from diffrep.report.values import Entry, Study, role

RIVALS = {  # whom the arms of a role are held against
    "policy": ("uniform", "uniform_each", "fixed", "random", "untrained"),
    "drawn": ("real", "scratch", "drawn_labels", "photographs", "one_image", "noise", "random", "untrained"),
}
ASKED = ("uniform", "uniform_each", "fixed", "scratch", "real", "drawn_labels")  # rivals worth a sentence
ALL = "All comparisons, one by one"


@dataclass(frozen=True)
class Pair:
    """One comparison: ``ours`` minus ``rival`` by one score."""

    student: str
    ours: Entry
    rival: Entry
    score: str
    found: Paired

    def title(self, sign: str) -> str:
        return f"{self.ours.short} {sign} {self.rival.short}"


def pairs(study: Study) -> list[Pair]:
    """Every comparison the arms allow, student by student; arms that different scores judge never meet."""
    return [pair for one in study.contests() for student in one.students for pair in _pairs(one, student)]


def _pairs(study: Study, student: str) -> list[Pair]:
    roles, name = study.by_role(student), study.metric() or ""
    wanted = [
        (ours, rival, name)
        for hero, rivals in RIVALS.items()
        for ours in roles.get(hero, [])
        for key in rivals
        for rival in roles.get(key, [])
    ]
    for score in dict.fromkeys([name, "top1"]):
        wanted += [(t, s, score) for t in roles.get("tuned", []) for s in roles.get("scratch", [])]
    images = study.test_images()
    return [
        Pair(student, ours, rival, score, found)
        for ours, rival, score in wanted
        if (found := paired(ours.score(score), rival.score(score), 0 if score in LOW else images, score in LOW))
    ]


def findings(study: Study) -> Section | None:
    """Sentences for the questions that matter, and all comparisons behind them."""
    found = pairs(study)
    if not found:
        return None
    seeds = min(len(pair.found.differences) for pair in found)
    opening = (
        "One seed hints; it does not decide. Differences in points of the score:"
        if seeds == 1
        else "Mean difference in points over the seeds, ± its standard deviation (number of seeds):"
    )
    note = (
        f"{len(found)} comparisons stand here; of twenty without any true difference, one would look like one. "
        f"Differences are taken within a seed: same labelled images, same diffusion model, same teacher."
    )
    table = Table("First arm minus second, in points", ("", "difference", "reading"), _rows(study, found), True)
    said = verdicts(study)
    notes = [Notes(said)] if said else []
    return Section("What beats what", [Text(opening), *notes, Folded(ALL, [table]), Text(note, "note")])


def _rows(study: Study, found: Sequence[Pair]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for student in study.students:
        rows += [[student]] if student else []
        for pair in (p for p in found if p.student == student):
            which = "" if pair.score == study.metric() else f" ({score_words(pair.score)})"
            rows.append([pair.title(MINUS) + which, pair.found.shown(), pair.found.reading()])
    return rows


def verdicts(study: Study) -> list[tuple[str, str]]:
    """(question, answer) each, with the answer of every student."""
    answers: dict[str, list[str]] = {}
    found = pairs(study)
    several = len({pair.student for pair in found}) > 1
    for pair in found:
        if role(pair.rival, study.entries) in ASKED and not settings_in(pair.ours.short):  # a sweep has its picture
            question = f"{sentence(pair.title('against'))} ({short_words(pair.score)})"
            who = f"{pair.student} " if pair.student and several else ""
            answers.setdefault(question, []).append(f"{who}{pair.found.shown()} ({pair.found.word()})")
    return [(question, f"{'; '.join(said)}.") for question, said in answers.items()]
