"""What a dense task's network finds, beside the truth: pictures, worst first, and scores by class, subset and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.report.card_pictures import sheet
from diffrep.report.generated import address
from diffrep.report.numbers import MISSING, SPACE, shown
from diffrep.report.page import Block, Folded, Notes, Picture, Section, Table, Text
from diffrep.report.scores import score_words, valued
from diffrep.report.values import DENSE, Entry, Run

OPEN, MOST = 4, 20  # pictures of one entry that stand open, and with the folded ones; of one among several: OPEN
HEADLINES = {
    "segment": ("miou", "miou_parts", "pixel_accuracy"),
    "landmark": ("nme", "fr10", "auc10"),
    "detect": ("box_ap", "box_ap50", "mask_ap"),
}
TITLE = "Predictions, worst first"
LOOK = {
    "segment": "Left the picture, then the truth and the prediction in one table of colours. Below, the classes of "
    "the picture, the largest first: a missed one is not in the prediction, one that is not there is not in the "
    "truth. Dark pixels belong to no class and count nowhere.",
    "landmark": "Blue discs are the truth, orange crosses the predictions; a line joins the two.",
    "detect": "Left the truth, right the predictions with their score. A colour is a class. Predictions of a low "
    "score are not drawn, but they count in the average precision.",
}
PER_CLASS = {"segment": "Intersection over union", "detect": "Average precision"}
SUBSETS = {"largepose": "large pose", "makeup": "make-up"}  # where a subset's name is none to read
SIZES = {  # name in a score -> head of a column; detection
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "small",
    "ap_medium": "medium",
    "ap_large": "large",
}


def predictions(entries: Sequence[Entry]) -> Section | None:
    """Of all dense entries with a finished run; None without one.

    Raises:
        UserError: ``samples/`` names pictures that are not there or not readable.
    """
    found = [e for e in entries if e.kind in DENSE and e.results()]
    blocks = [
        *_headlines(found),
        *_pictures(found),
        *_subsets([e for e in found if e.kind == "landmark"]),
        *_sizes([e for e in found if e.kind == "detect"]),
        *(block for task in PER_CLASS for block in _classes(task, [e for e in found if e.kind == task])),
    ]
    return Section(TITLE, blocks) if blocks else None


def _headlines(entries: Sequence[Entry]) -> list[Block]:
    """The numbers that papers print."""
    rows: list[tuple[str, str]] = []
    for entry in entries:
        names = [name for name in HEADLINES[entry.kind] if entry.score(name)]
        said = [f"{score_words(name)} {valued(name, list(entry.score(name).values()))}" for name in names]
        rows += [(entry.label, f"{'; '.join(said)}.")] if said else []
    return [Notes(rows)] if rows else []


# Pictures


def _pictures(entries: Sequence[Entry]) -> list[Block]:
    """A few of one entry stand open; those of several are folded under their names."""
    shown_by = {entry.label: _panels(entry) for entry in entries}
    shown_by = {label: panels for label, panels in shown_by.items() if panels}
    if not shown_by:
        return []
    said: list[Block] = [Text(LOOK[kind]) for kind in dict.fromkeys(e.kind for e in entries if e.label in shown_by)]
    if len(shown_by) > 1:
        return [*said, *(Folded(label, panels[:OPEN]) for label, panels in shown_by.items())]
    (panels,) = shown_by.values()
    rest = panels[OPEN:]
    return [*said, *panels[:OPEN], *([Folded(f"The next {len(rest)}", rest)] if rest else [])]


def _panels(entry: Entry) -> list[Block]:
    """Those of the first seed that has some."""
    for run in entry.runs:
        if rows := _listed(run):
            return [_panel(run, number, row) for number, row in enumerate(rows[:MOST], 1)]
    return []


def _listed(run: Run) -> list[Mapping[str, Any]]:
    """What ``samples/predictions.json`` names."""
    index = run.path / "samples" / "predictions.json"
    if not index.exists():
        return []
    rows = read_json(index)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_plain(row.get("file")) for row in rows):
        raise UserError(f"{index} holds no list of predictions; it was not written by diffrep")
    return rows


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file in the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and PurePath(name).name == name


def _panel(run: Run, number: int, row: Mapping[str, Any]) -> Picture:
    name = str(row.get("name", row["file"]))
    data, aspect = _address(run.path / "samples" / row["file"])
    value = row.get("score")
    told = f"{_metric(str(row.get('metric', 'score')), value)}" if isinstance(value, int | float) else "no score"
    drawing = sheet([("", data)], 1, aspect, False)
    return Picture(f"Truth and prediction of {name}: {told}.", f"{number}. {name}: {told}", drawing)


def _address(path: Path) -> tuple[str, float]:
    try:
        return address(path)
    except OSError:
        raise UserError(f"{path} is missing or no readable picture; run the recipe again in another --out") from None


def _metric(name: str, value: float) -> str:
    """``NME 4.61 %``; scores of pictures are percentages."""
    return f"{name.removesuffix('%').strip()} {value:.2f}{SPACE}%"


# Tables


def _subsets(entries: Sequence[Entry]) -> list[Block]:
    """Landmarks: all test faces, then those that are hard for one reason."""
    rows: list[Sequence[str]] = []
    names = ("nme", "fr10", "auc10")
    for entry in entries:
        ends = dict.fromkeys(
            name.removeprefix("nme_") for scores in entry.scores.values() for name in scores if name.startswith("nme_")
        )
        found = [
            [SUBSETS.get(end, end) or "all", *(shown(list(entry.score(key).values()), 2) for key in _keys(names, end))]
            for end in ("", *ends)
            if entry.score(_keys(names, end)[0])
        ]
        rows += [[entry.label]] if found and len(entries) > 1 else []
        rows += found
    caption = f"Landmarks by subset of the test pictures, in percent.{_several(entries)}"
    return [Table(caption, ["", *map(score_words, names)], rows)] if rows else []


def _keys(names: Sequence[str], subset: str) -> list[str]:
    return [f"{name}_{subset}" if subset else name for name in names]


def _sizes(entries: Sequence[Entry]) -> list[Block]:
    """Detection: average precision of boxes and masks, by overlap and by size of the object."""
    rows: list[Sequence[str]] = []
    for entry in entries:
        found = [
            [what, *(shown(list(entry.score(f"{key}_{end}").values())) for end in SIZES)]
            for key, what in (("box", "boxes"), ("mask", "masks"))
            if entry.score(f"{key}_ap")
        ]
        rows += [[entry.label]] if found and len(entries) > 1 else []
        rows += found
    told = "Average precision (AP) in percent: of all overlaps, of 0.50 and 0.75 alone, and by the object's size."
    caption = f"{told}{_several(entries)}"
    return [Table(caption, ["", *SIZES.values()], rows)] if rows else []


def _classes(task: str, entries: Sequence[Entry]) -> list[Block]:
    """A row per class, the best found first, a column per entry and score."""
    several = len(entries) > 1
    columns = {
        f"{entry.label}: {words}" if several else words: values
        for entry in entries
        for words, values in _by_class(entry).items()
    }
    if not columns:
        return []
    first = next(iter(columns.values()))
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    names.sort(key=lambda name: -fmean(first[name]) if first.get(name) else 1)
    rows = [[name, *(shown(values.get(name, [])) for values in columns.values())] for name in names]
    told = f"{PER_CLASS[task]} of each class, in percent, the best first; {MISSING} where there is none to be found."
    table = Table(f"{told}{_several(entries)}", ["", *columns], rows)
    return [Folded(f"{PER_CLASS[task]} of all {len(names)} classes", [table])]


def _by_class(entry: Entry) -> dict[str, dict[str, list[float]]]:
    """{what a score is called: {class: its scores over the seeds}}; of objects several scores stand under a class."""
    found: dict[str, dict[str, list[float]]] = {}
    for scores in entry.scores.values():
        for name, value in (scores.get("classes") or {}).items():
            for key, one in (value if isinstance(value, Mapping) else {"IoU": value}).items():
                kept = found.setdefault(score_words(key), {}).setdefault(str(name), [])
                kept += [one] if isinstance(one, int | float) else []
    return found


def _several(entries: Sequence[Entry]) -> str:
    return (
        " Several seeds: mean ± standard deviation (number of seeds)." if any(e.num_seeds > 1 for e in entries) else ""
    )
