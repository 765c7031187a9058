"""Studies whose arms differ in a setting that is a number: the score against it, read from the arms' names.

``student: s = 1, T = 20`` is a point at s = 1 and T = 20; arms with the same names belong to one picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from diffrep.report import pictures
from diffrep.report.numbers import listed
from diffrep.report.page import Picture, Section, Text
from diffrep.report.scores import average_of, axis_words, best, printed, score_words, unit_words
from diffrep.report.values import Entry, Study, role

PAIR = re.compile(r"\s*([^=,]*[^=,\s])\s*=\s*([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*")
FEWEST = 2  # values of a setting that make a line

Lines = dict[str, dict[float, list[float]]]


def settings_in(label: str) -> dict[str, float] | None:
    """``s = 1, T = 20`` -> {"s": 1, "T": 20}; None for any other text."""
    found = [PAIR.fullmatch(part) for part in label.split(",")]
    return {m[1]: float(m[2]) for m in found if m} if all(found) else None


def sweeps(study: Study) -> list[Section]:
    """A picture for every group of arms that differ in the same named numbers."""
    return [section for one in study.contests() for section in _of_contest(one)]


def _of_contest(study: Study) -> list[Section]:
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for arm in study.arms:
        if (found := settings_in(arm.short)) and arm.score(study.metric() or ""):
            groups.setdefault(tuple(sorted(found)), []).append(arm)
    return [one for arms in groups.values() if (one := _section(study, arms)) is not None]


def _section(study: Study, arms: Sequence[Entry]) -> Section | None:
    points = {arm.name: settings_in(arm.short) or {} for arm in arms}
    names = list(points[arms[0].name])
    x = max(names, key=lambda name: len({point[name] for point in points.values()}))
    if len({point[x] for point in points.values()}) < FEWEST:
        return None
    score = study.metric() or ""
    lines = _lines(arms, points, x, score)
    level = _level(study, arms, score)
    chart = pictures.settings_chart(lines, level, (x, axis_words(score)), f"settings-{'-'.join(names)}")
    title = f"How the score depends on {listed(names)}"
    return Section(
        title, [Picture(_alt(lines, x, score), _caption(study, arms, level, score), chart), Text(WARNING, "note")]
    )


WARNING = (
    "Measured on the test images: choosing a setting from this picture and then reporting its score on the same images "
    "would flatter it."
)


def _lines(arms: Sequence[Entry], points: Mapping[str, Mapping[str, float]], x: str, score: str) -> Lines:
    """A line per student and other settings."""
    students = {arm.student for arm in arms}
    lines: Lines = {}
    for arm in arms:
        others = [f"{name} = {value:g}" for name, value in points[arm.name].items() if name != x]
        label = ", ".join([*([arm.student] if len(students) > 1 else []), *others]) or arm.student or score_words(score)
        lines.setdefault(label, {})[points[arm.name][x]] = list(arm.score(score).values())
    return lines


def _level(study: Study, arms: Sequence[Entry], score: str) -> tuple[str, float] | None:
    """The same student taught on real images, where there is just one."""
    real = [
        a for a in study.arms if role(a, study.entries) == "real" and a.student == arms[0].student and a.score(score)
    ]
    return (real[0].short, real[0].mean(score)) if len(real) == 1 and real[0] not in arms else None


def _alt(lines: Lines, x: str, score: str) -> str:
    said = [
        f"{label}: " + ", ".join(f"{x} = {v:g} {printed(score, s)}" for v, s in points.items())
        for label, points in lines.items()
    ]
    return f"{score_words(score)}{unit_words([score])} against {x}. {'; '.join(said)}."


def _caption(study: Study, arms: Sequence[Entry], level: tuple[str, float] | None, score: str) -> str:
    top = best(arms, score)
    several = " Points are means over seeds, bars one standard deviation." if len(study.seeds) > 1 else " One seed."
    dashed = f" Dashed: {level[0]}, {average_of(score, [level[1]])}." if level else ""
    height = average_of(score, [top.mean(score)])
    return f"Best of {len(arms)} points: {top.short}, {height}.{several}{dashed}"
