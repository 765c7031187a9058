"""The page that lays runs side by side: scores with their spread, costs, curves, and what was set differently."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from diffrep.report import choices, made, networks, pictures, predictions, sections, sets, teachers, worth
from diffrep.report.numbers import binomial_se, listed, sentence
from diffrep.report.page import Block, Page, Picture, Section, Table, Text
from diffrep.report.scores import axis_words, labels_in, meanings, measure, printed, score_words, unit_words
from diffrep.report.sections import labels_text
from diffrep.report.values import SILENT, Entry, Run, Study, entry_of, is_score, settings


def compare_page(found: Sequence[Run | Study], valuer: worth.Valuer | None = None) -> Page:
    """Runs of one recipe share a row, whatever their seeds; a study among them brings its arms.

    Args:
        valuer: tells what scores are worth in labels; this room computes nothing of the kind.
    """
    entries = _entries(found)
    blocks = [
        Section("", _overview(entries)),
        _scores(entries),
        predictions.predictions(entries),
        worth.worth_of(entries, valuer) if valuer else None,
        _budget(entries),
        _published(entries),
        networks.networks(entries),
        sections.curves(entries),
        *(teachers.sweep(e) for e in entries if e.kind == "probe"),
        teachers.policies(entries, next((e for e in entries if e.kind == "probe"), None)),
        choices.choices(entries),
        teachers.samples(entries),
        sets.drawn_sets(entries),
        made.made_images(entries),
        Section("What was set differently" if len(entries) > 1 else "Settings", _settings(entries)),
        sections.licences(entries),
        Section("Machine", sections.environments([(e.label, r.environment) for e in entries for r in e.runs])),
    ]
    title = entries[0].label if len(entries) == 1 else f"{len(entries)} recipes compared"
    about = str(entries[0].recipe.get("about") or "") if len(entries) == 1 else ""
    return Page(title, about, [s for s in blocks if s is not None and s.blocks])


def _entries(found: Sequence[Run | Study]) -> list[Entry]:
    groups: dict[str, list[Run]] = {}
    for run in (r for r in found if isinstance(r, Run)):
        same = {k: v for k, v in settings(run).items() if k == "name" or k not in SILENT}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    names = [str(runs[0].recipe.get("name", runs[0].path.name)) for runs in groups.values()]
    entries = [
        entry_of(name if names.count(name) == 1 else _told_apart(name, runs), runs)
        for name, runs in zip(names, groups.values(), strict=True)
    ]
    studies = [study for study in found if isinstance(study, Study)]
    return entries + [a for study in studies for a in (study.arms if len(studies) == 1 else _named_arms(study))]


def _labels(entry: Entry) -> str:
    """What training read, and what the networks it started from had read before."""
    results = entry.results()
    behind = (results[0].get("labels_behind") or {}) if results else {}
    before = ", ".join(f"{part}: {count:,}" for part, count in behind.items())
    return f"{labels_text(entry)} (builds on {before})" if before else labels_text(entry)


def _named_arms(study: Study) -> list[Entry]:
    """Arms of one study among several: its folder stands beside the student."""
    folder = study.path.resolve().name
    return [replace(arm, label=f"{arm.student or 'arms'} ({folder}): {arm.short}") for arm in study.arms]


def _told_apart(name: str, runs: Sequence[Run]) -> str:
    """Recipes of one name: their folders, without the seed in them, tell them apart."""
    folders = [re.sub(r"-s\d+(?=-|$)", "", run.path.resolve().name) for run in runs]
    return f"{name} ({listed(list(dict.fromkeys(folders)))})"


def _overview(entries: Sequence[Entry]) -> list[Block]:
    waiting = [f"{e.label} ({e.state()})" for e in entries if e.state() != "finished"]
    blocks: list[Block] = [Text(f"Not finished: {listed(waiting)}.", "warning")] if waiting else []
    name = next((n for n in _names(entries) if any(e.score(n) for e in entries)), None)
    if name is None:
        return blocks
    digits = measure(name).digits
    rows = [
        pictures.Dots(e.student, e.short, list(e.score(name).values()), digits=digits) for e in entries if e.score(name)
    ]
    alt = "; ".join(f"{e.label} {printed(name, list(e.score(name).values()))}" for e in entries if e.score(name))
    marks = "large dots are means, small dots seeds, bars one standard deviation"
    caption = f"{sentence(score_words(name))}: {marks}. The axis does not begin at zero. {_noise(entries, name)}"
    chart = pictures.arms_chart(rows, axis_words(name))
    return [*blocks, Picture(f"Score{unit_words([name])} ({score_words(name)}). {alt}.", caption, chart)]


def _noise(entries: Sequence[Entry], name: str) -> str:
    """How sure one score is, given the test set."""
    images = [s["test_images"] for e in entries for s in e.scores.values() if s.get("test_images")]
    if not images or not measure(name).is_share:
        return ""
    error = binomial_se(fmean(v for e in entries for v in e.score(name).values()), min(images))
    return (
        f"With {min(images):,} test images one score is sure to about ± {error:.1f} points (binomial standard error)."
    )


def _names(entries: Sequence[Entry]) -> list[str]:
    """Score names, those that most entries have first."""
    found = [n for e in entries for n in dict.fromkeys(k for s in e.scores.values() for k in s) if is_score(n)]
    return sorted(dict.fromkeys(found), key=lambda n: -found.count(n))


def _scores(entries: Sequence[Entry]) -> Section:
    names = _names(entries)
    head = ["", "kind", "seeds", "state", *map(score_words, names), "labels seen in training"]
    rows = [
        [e.label, e.kind, _seeds(e), e.state(), *(printed(n, list(e.score(n).values())) for n in names), _labels(e)]
        for e in entries
    ]
    caption = f"Scores{unit_words(names)}; over several seeds: mean ± standard deviation (number of seeds)"
    notes: list[Block] = [Text(meanings(names), "note")] if names else []
    if any(labels_in(n) for n in names):
        notes.append(Text("A score with a number of labels was fitted with that many labelled images.", "note"))
    return Section("Results", [Table(caption, head, rows), *notes])


def _seeds(entry: Entry) -> str:
    return ", ".join(str(s) for s in sorted({run.seed for run in entry.runs} | entry.scores.keys()))


def _budget(entries: Sequence[Entry]) -> Section:
    head = ("", "steps", "images seen", "multiply-adds", "CPU seconds", "parameters")
    rows = [[e.label, *sections.budget_cells(e), sections.average(e.values("parameters"))] for e in entries]
    note = (
        "Multiply-adds count forward and backward of what is trained, forward of what is not (k, M, G, T: thousand to "
        "million million)."
    )
    return Section("What it cost", [Table("Per seed", head, rows), Text(note, "note")])


def _published(entries: Sequence[Entry]) -> Section | None:
    """Numbers from papers beside ours, where a recipe aims at one."""
    rows = []
    for entry in entries:
        if paper := entry.recipe.get("published"):
            value = "not found" if paper.get("value") is None else f"{paper['value']:g}"
            rows.append([entry.label, value, str(paper.get("metric", "")), str(paper.get("source", ""))])
    head = ("", "published", "what", "source")
    return Section("Published numbers", [Table("Named by the recipes", head, rows, True)]) if rows else None


def _settings(entries: Sequence[Entry]) -> list[Block]:
    kinds = {e.kind for e in entries}
    if len(entries) > 1 and len(kinds) > 1:
        note = "Recipes of different kinds have different settings; only those of one kind are compared."
        return [Text(note, "note"), *sections.differences(entries)]
    return sections.differences(entries)
