"""What beats what, seed by seed: the policy against its rivals, fine-tuning against scratch, drawn images against real
ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffrep.report.numbers import MINUS, Paired, paired, sentence
from diffrep.report.page import Folded, Notes, Section, Table, Text
from diffrep.report.scores import measure, score_words, short_words
from diffrep.report.sweeps import settings_in
from diffrep.report.values import Entry, Study, role

RIVALS = {  # whom the arms of a role are held against
    "policy": ("uniform", "uniform_each", "fixed", "random", "untrained"),
    "alternation": ("at_once", "predictor"),
    "drawn": ("real", "scratch", "drawn_labels", "photographs", "one_image", "noise", "random", "untrained"),
}
ASKED = (
    "uniform",
    "uniform_each",
    "fixed",
    "scratch",
    "real",
    "drawn_labels",
    "at_once",
    "predictor",
)  # rivals worth a sentence
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
        if (found := _difference(ours, rival, score, images))
    ]


def _difference(ours: Entry, rival: Entry, score: str, images: int) -> Paired | None:
    kind = measure(score)
    known = images if kind.is_share else 0
    return paired(ours.score(score), rival.score(score), known, kind.is_low_better, kind.digits)


def findings(study: Study) -> Section | None:
    """Sentences for the questions that matter, and all comparisons behind them."""
    found = pairs(study)
    if not found:
        return None
    units = _units(found)
    seeds = min(len(pair.found.differences) for pair in found)
    opening = (
        f"One seed hints; it does not decide. Differences{units} of the score:"
        if seeds == 1
        else f"Mean difference{units} over the seeds, ± its standard deviation (number of seeds):"
    )
    note = (
        f"{len(found)} comparisons stand here; of twenty without any true difference, one would look like one. "
        f"Differences are taken within a seed: {_same(found)}."
    )
    table = Table(f"First arm minus second{units}", ("", "difference", "reading"), _rows(study, found), True)
    said = verdicts(study)
    notes = [Notes(said)] if said else []
    return Section("What beats what", [Text(opening), *notes, Folded(ALL, [table]), Text(note, "note")])


def _same(found: Sequence[Pair]) -> str:
    return "; ".join(SAME[kind] for kind in dict.fromkeys(measure(pair.score).is_percent for pair in found))


SAME = {
    True: "same labelled images, same diffusion model, same teacher",
    False: "same networks, same features to judge by; where a lower score is better, so is a negative difference",
}


def _units(found: Sequence[Pair]) -> str:
    """`` in points`` of percentages; nothing where a score has no unit."""
    kinds = {measure(pair.score).is_percent for pair in found}
    return " in points" if kinds == {True} else " (in points where the score is in percent)" if len(kinds) > 1 else ""


def _rows(study: Study, found: Sequence[Pair]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for student in study.students:
        rows += [[student]] if student else []
        for pair in (p for p in found if p.student == student):
            which = "" if pair.score == study.metric() else f" ({score_words(pair.score)})"
            rows.append([pair.title(MINUS) + which, pair.found.shown(), pair.found.reading()])
    return rows


def _named(score: str) -> str:
    return f"{short_words(score)}{', lower is better' if measure(score).is_low_better else ''}"


def verdicts(study: Study) -> list[tuple[str, str]]:
    """(question, answer) each, with the answer of every student."""
    answers: dict[str, list[str]] = {}
    found = pairs(study)
    several = len({pair.student for pair in found}) > 1
    for pair in found:
        if role(pair.rival, study.entries) in ASKED and not settings_in(pair.ours.short):  # a sweep has its picture
            question = f"{sentence(pair.title('against'))} ({_named(pair.score)})"
            who = f"{pair.student} " if pair.student and several else ""
            answers.setdefault(question, []).append(f"{who}{pair.found.shown()} ({pair.found.word()})")
    return [(question, f"{'; '.join(said)}.") for question, said in answers.items()]
