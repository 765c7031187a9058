"""Which timesteps were chosen as training went on: by policies too wide for a column each in the log, and by rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from diffrep.report import pictures
from diffrep.report.page import Block, Folded, Notes, Picture, Section, Text
from diffrep.report.teachers import POLICY, looks
from diffrep.report.values import Entry

HALF = 0.5  # of the choices: the fewest neighbouring parts that hold it are named
CAPTION = (
    "The share of images for which a timestep was chosen, darker is more, from the beginning of training (left) to its "
    "end. Each picture has its own darkest."
)
RULE = "Not learned: a rule drew these timesteps, from a list or from a range that may change while training goes on."


def choices(entries: Sequence[Entry]) -> Section | None:
    """A heat map for each run that logged its choices; a policy whose probabilities are drawn already has its own."""
    found = [(e, one) for e in entries if looks(e) is None and (one := chosen(e)) is not None]
    learned = [(e, one) for e, one in found if _rule(e).get("select") == "policy"]
    drawn = [pair for pair in found if pair not in learned]
    blocks: list[Block] = [Text(POLICY), *_pictures(learned, "chosen-policy")] if learned else []
    if drawn:
        said = [Text(RULE), *_pictures(drawn, "chosen-rule")]
        blocks.append(Folded(f"Timesteps that a rule drew ({len(drawn)})", said))
    return Section("Which timesteps were chosen", blocks) if blocks else None


def _pictures(found: Sequence[tuple[Entry, pictures.Chosen]], name: str) -> list[Block]:
    said = [(entry.label, chosen_words(one)) for entry, one in found]
    alt = " ".join(f"{label}: {words}" for label, words in said)
    return [Picture(alt, CAPTION, pictures.chosen_chart([one for _, one in found], name)), Notes(said)]


def chosen(entry: Entry) -> pictures.Chosen | None:
    """Mean over seeds of the logged shares, at the steps all seeds logged; None without any."""
    logs = [{m["step"]: m["chosen_timesteps"] for m in run.metrics if m.get("chosen_timesteps")} for run in entry.runs]
    logs = [log for log in logs if log]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    total = entry.recipe.get("train", {}).get("steps") or max(steps, default=0)
    if not steps or not _rule(entry).get("values"):
        return None
    shares = {100 * s / total: [fmean(part) for part in zip(*(log[s] for log in logs), strict=True)] for s in steps}
    return pictures.Chosen(entry.label, _end(_rule(entry)), shares)


def _rule(entry: Entry) -> Mapping[str, Any]:
    return entry.recipe.get("method", {}).get("timestep", {})


def _end(rule: Mapping[str, Any]) -> int:
    """The timestep after the last that may be chosen: what the log's histogram is over."""
    last = max(rule["values"])
    return last if str(rule.get("select")).startswith("range") else last + 1


def chosen_words(one: pictures.Chosen) -> str:
    """Where the choices were at the start, in the middle and at the end: a tenth of the log each."""
    lines = list(one.shares.values())
    part = max(1, len(lines) // 10)
    middle = (len(lines) - part) // 2
    cuts = {"at the start": lines[:part], "in the middle": lines[middle : middle + part], "at the end": lines[-part:]}
    return f"{', '.join(f'{when} {_densest(few, one.end)}' for when, few in cuts.items())}."


def _densest(lines: Sequence[Sequence[float]], end: int) -> str:
    """The shortest stretch of timesteps with half of the choices: ``52 % on t = 0 to 62``."""
    shares = [fmean(column) for column in zip(*lines, strict=True)]
    bins = len(shares)
    spans = [(i, j) for i in range(bins) for j in range(i + 1, bins + 1) if sum(shares[i:j]) >= HALF * sum(shares)]
    first, last = min(spans, key=lambda span: (span[1] - span[0], -sum(shares[slice(*span)])))
    low, high = -(-first * end // bins), -(-last * end // bins) - 1
    return f"{100 * sum(shares[first:last]):.0f} % on t = {f'{low} to {high}' if high > low else low}"
