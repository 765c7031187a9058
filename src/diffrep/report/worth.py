"""What a score is worth in labels: the table of a study or of a comparison, and the words around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffrep.report.numbers import MISSING, listed
from diffrep.report.page import Block, Section, Table, Text
from diffrep.report.scores import axis_words, printed, short_words, valued
from diffrep.report.values import Entry

Arm = tuple[Mapping[str, Any], Mapping[int, Mapping[str, Any]]]  # a recipe, and its results by seed
Valuer = Callable[[Mapping[str, Arm]], list[dict[str, Any]]]  # evaluation/label_value.py's worth
TITLE = "What it is worth in labels"
OWN = (
    "Its own labels are those of real images that its training read, in all its stages; what its teacher or a "
    "generator had read before is not among them. Linear probes do not stand here: from-scratch networks are scored by "
    "their own last layer."
)


def worth(found: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Section | None:
    """A table for each scale of from-scratch networks; None where there is no scale.

    Args:
        found: as ``worth_labels`` of a study's result holds it.
        labels: name -> what the arm is called.
    """
    blocks = [block for scale in found for block in _of_scale(scale, labels)]
    return Section(TITLE, [*blocks, Text(OWN, "note")]) if blocks else None


def worth_of(entries: Sequence[Entry], valuer: Valuer) -> Section | None:
    """The same among runs that lie side by side."""
    numbered = {str(number): entry for number, entry in enumerate(entries)}
    arms = {n: (e.recipe, {run.seed: run.result for run in e.runs if run.result}) for n, e in numbered.items()}
    return worth(valuer(arms), {n: e.label for n, e in numbered.items()})


def _of_scale(scale: Mapping[str, Any], labels: Mapping[str, str]) -> list[Block]:
    name = str(scale["score"])
    points = [f"{valued(name, [v])} with {int(n):,}" for n, v in scale["scale"].items()]
    explained = (
        f"How many labelled real images would the same network need, trained on them from scratch, to score as high? "
        f"That was measured: by {short_words(name)}, {scale['student']} from scratch scores {listed(points)} labels. "
        f"Between two counts a straight line over the logarithm of the count is read; beyond them nothing is said."
    )
    head = ("", axis_words(name), "worth so many labels", "95 % interval", "times its own labels")
    rows = [[labels.get(arm, arm), *_cells(name, one)] for arm, one in scale["arms"].items()]
    caption = f"Labels with which {scale['student']} from scratch scores the same"
    return [Text(explained), Table(caption, head, rows, True), Text(_covered(scale), "note")]


def _cells(name: str, one: Mapping[str, Any]) -> list[str]:
    own = f"{one['times']} (of {one['own_labels']:,})" if one["own_labels"] else "it has none"
    return [printed(name, [one["score"]]), one["words"], one["interval_words"] or MISSING, own]


def _covered(scale: Mapping[str, Any]) -> str:
    """What the interval is made of."""
    seeds, images = scale["seeds"], scale["test_images"]
    test = f"the drawing of the {images:,} test images" if images else ""
    if seeds > 1:
        parts = [f"the spread over seeds ({seeds} at least, resampled, with the care that so few ask for)", test]
        return f"The interval covers {' and '.join(filter(None, parts))}."
    alone = f"covers {test} alone" if test else "is not known"
    return f"Where a score has one seed, the interval {alone}: other seeds may differ by more."
