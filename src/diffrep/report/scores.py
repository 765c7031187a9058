"""What a score is called, what it means, and which way it is better."""

from __future__ import annotations

from collections.abc import Iterable

from diffrep.report.values import Entry

COUNTED = {"linear_probe": "linear probe", "knn": "k-NN"}  # names that end in a number of labels
WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "agreement": "agreement with the teacher",
    "ece": "calibration error",
    "best_top1": "top-1 of the held-out choice",
}
MEANING = {
    "linear_probe": "Linear probe: the network is frozen and the simplest classifier learns from its output.",
    "knn": "k-NN: the class of the most similar labelled image.",
    "top1": "Top-1: the network's own last layer names the image.",
    "top5": "Top-5: the right name is among its first five.",
    "agreement": "Agreement: how often it gives the name that its teacher gives, right or wrong.",
    "ece": "Calibration error: how far the certainty it claims is from how often it is right; lower is better.",
    "best_top1": (
        "Top-1 of the held-out choice: of the checkpoint that agreed best with the teacher on images held out from "
        "those the student learned from (drawn ones, if it learned from drawn ones); no label is read to choose it."
    ),
}
LOW = ("ece",)  # lower is better, and no share of images


def score_words(name: str) -> str:
    """``linear_probe_50`` -> ``linear probe, 50 labels``."""
    head, _, count = name.rpartition("_")
    if head in COUNTED and count.isdigit():
        return f"{COUNTED[head]}, {int(count):,} labels"
    return WORDS.get(name, name.replace("_", " "))


def short_words(name: str) -> str:
    """The same without the number of labels."""
    return score_words(name).partition(",")[0]


def axis_words(name: str) -> str:
    """What stands under the axis of a chart."""
    if name in LOW:
        return f"{score_words(name)} in %, lower is better"
    return f"% {'alike' if name == 'agreement' else 'correct'}, {score_words(name)}"


def meanings(names: Iterable[str]) -> str:
    """A sentence for each kind of score."""
    kinds = dict.fromkeys(n.rpartition("_")[0] if labels_in(n) else n for n in names)
    return " ".join(MEANING[kind] for kind in kinds if kind in MEANING)


def labels_in(name: str) -> int | None:
    """How many labels a score's name says it was fitted with."""
    count = name.rpartition("_")[2]
    return int(count) if count.isdigit() else None


def best(entries: Iterable[Entry], name: str) -> Entry:
    """The one with the best mean; all of them have the score."""
    return (min if name in LOW else max)(entries, key=lambda entry: entry.mean(name))
