"""Checking and preparing sets of masks, points and objects: ``diffrep data check`` and ``diffrep data prepare``.

A set's own page says what is wrong with its files, a sentence each (``faults``). Sentences that are alike but for names
and numbers are one kind of fault: it is counted, and its first ones are shown.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from diffrep import files
from diffrep.console import progress
from diffrep.data import ade20k, celebamask, coco, wflw
from diffrep.data.archives import unpack
from diffrep.data.celebamask import FIRST_ORDER, place_and_order, write_merged
from diffrep.data.containers import existing
from diffrep.data.dense import DenseRead, DenseSet, Task
from diffrep.data.dense_kinds import DENSE_KINDS
from diffrep.data.images import Part, UnreadableError, decoded
from diffrep.data.label_maps import NOTE
from diffrep.data.sources import DENSE_TASKS
from diffrep.errors import UserError

OFFICIAL_COUNTS = {  # pictures; of WFLW faces
    "ade20k": {"train": 20_210, "test": 2_000},
    "celebamask-hq": {"train": 24_183, "validation": 2_993, "test": 2_824},
    "coco": {"train": 118_287, "test": 5_000},
    "wflw": {"train": 7_500, "test": 2_500},
}
ARCHIVES = {  # official names; of several that are there, all are unpacked into one folder
    "ade20k": ("ADEChallengeData2016.zip",),
    "celebamask-hq": ("CelebAMask-HQ.zip",),
    "coco": ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip"),
    "wflw": ("WFLW_images.tar.gz", "WFLW_annotations.tar.gz"),
}
FAULTS: dict[str, Callable[[str], Iterator[str]]] = {
    "ade20k": ade20k.faults,
    "celebamask-hq": celebamask.faults,
    "coco": coco.faults,
    "wflw": wflw.faults,
}
_SHOWN = 3  # sentences of one kind
_OWN_WORDS = re.compile(r"'[^']*'|\S*[\d/_]\S*")  # of a sentence: names, paths, numbers


@dataclass(frozen=True)
class Alike:
    """Sentences that differ in names and numbers only."""

    count: int
    first: tuple[str, ...]

    def line(self) -> str:
        """All in one line; how many are not shown stands at its end."""
        more = self.count - len(self.first)
        return "; ".join(self.first) + (f"; and {more} more like these" if more else "")


@dataclass(frozen=True)
class DenseReport:
    """What is there, and what is wrong with it."""

    source: str  # data reference, for data.source
    parts: dict[str, int]  # pictures, or faces, of each part
    classes: tuple[str, ...]  # or names of points
    facts: dict[str, Any]  # what belongs beside every score: the label order
    fingerprints: dict[str, str]  # hex SHA-256 of each part, as a run that takes the whole of it records it
    faults: tuple[Alike, ...]
    notes: tuple[Alike, ...]
    licence: str

    @property
    def is_complete(self) -> bool:
        """Whether all can be read and the counts are the official ones."""
        return not self.faults

    def lines(self) -> list[str]:
        """The report for a terminal."""
        shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return [
            f"source: {self.source}",
            *(f"{part}: {count:,}, sha256 {self.fingerprints[part][:16]}" for part, count in self.parts.items()),
            *([f"classes: {len(self.classes)} ({shown})"] if self.classes else []),
            *(f"{name.replace('_', ' ')}: {value}" for name, value in self.facts.items()),
            f"licence: {self.licence}",
            *(f"fault: {fault.line()}" for fault in self.faults),
            *(f"note: {note.line()}" for note in self.notes),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "classes": list(self.classes), "is_complete": self.is_complete}


def gathered(sentences: Iterable[str]) -> tuple[Alike, ...]:
    """Sentences by their kind, in the order in which the kinds appear."""
    counts: dict[str, int] = {}
    first: dict[str, list[str]] = {}
    for sentence in sentences:
        kind = _OWN_WORDS.sub("*", sentence)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= _SHOWN:
            first.setdefault(kind, []).append(sentence)
    return tuple(Alike(counts[kind], tuple(shown)) for kind, shown in first.items())


def check(name: str, location: str) -> DenseReport:
    """Read every picture and every truth once, and say what is wrong.

    Raises:
        UserError: a place that does not exist, or is a file.
    """
    place, _ = _split(name, location)
    if existing(place).is_file():
        archive = place if len(ARCHIVES[name]) == 1 else "THE_ARCHIVES'_FOLDER"
        raise UserError(f"{place} is a file; `diffrep data prepare {name} {archive} FOLDER` makes a folder of archives")
    try:
        found = _read(name, location)
    except UserError as error:
        return _report(name, location, DenseRead((), {}), _said(name, location) or [str(error)])
    sentences = itertools.chain(_miscounted(name, found), _said(name, location), _unreadable(found))
    return _report(name, location, found, sentences)


def prepare(name: str, location: str, out: str | Path) -> DenseReport:
    """Unpack the official archives, merge the masks of CelebAMask-HQ; ``out`` appears whole or not at all.

    Args:
        location: an archive, or the folder with all that belong to the set. Of CelebAMask-HQ also the unpacked set,
            whose photographs are linked; ``@ORDER`` behind it is the label order of the merged masks.

    Raises:
        UserError: ``out`` is there already, no archive is, a damaged one; what comes out cannot be read as this set.
    """
    target = Path(out).expanduser()
    if target.exists():
        raise UserError(f"{out} exists; choose a new folder")
    place, order = _split(name, location)
    archives = _archives(name, existing(place))
    with files.folder_aside(target) as aside:
        try:
            for archive in archives:
                unpack(archive, aside)
            if name == "celebamask-hq":
                write_merged(f"{aside if archives else place}{order}", aside)
            found = _read(name, f"{aside}{order}")
        except UserError as error:
            raise UserError(str(error).replace(str(aside), place)) from None
    return _report(name, f"{target}{order}", found, [NOTE + told for told in _miscounted(name, found)])


def _read(name: str, location: str) -> DenseRead:
    return DENSE_KINDS[name].read(location, cast(Task, DENSE_TASKS[name][0]))


def _split(name: str, location: str) -> tuple[str, str]:
    """``PATH`` and ``@ORDER``, "" where it is the first one or the set has none."""
    if name != "celebamask-hq":
        return location, ""
    place, order = place_and_order(location)
    return place, "" if order == FIRST_ORDER else f"@{order}"


def _archives(name: str, place: Path) -> list[Path]:
    """Those that a location means; none where it is an unpacked CelebAMask-HQ."""
    official = ARCHIVES[name]
    if place.is_file():
        if len(official) > 1:
            raise UserError(f"{name} comes as {' and '.join(official)}; name the folder that holds them")
        return [place]
    found = [place / archive for archive in official if (place / archive).is_file()]
    if not found and name != "celebamask-hq":
        told = f"holds none of {', '.join(official)}; what is unpacked already is read as it is"
        raise UserError(f"{place} {told}: diffrep data check {name} {place}")
    return found


def _said(name: str, location: str) -> list[str]:
    """What the set's own page finds, as far as it comes."""
    said = []
    try:
        for sentence in FAULTS[name](location):
            said.append(sentence)
    except UserError as error:
        said.append(str(error))
    return said


def _miscounted(name: str, found: DenseRead) -> Iterator[str]:
    for part, official in OFFICIAL_COUNTS[name].items():
        if name == "coco" and part in found.parts:
            continue  # its page counts what is listed: a training part is without the pictures that hold no object
        if (count := len(found.parts.get(part, ()))) != official:
            yield f"{part} has {count:,} of {official:,} {'faces' if name == 'wflw' else 'pictures'}"


def _unreadable(found: DenseRead) -> Iterator[str]:
    for name, part in found.parts.items():
        pictures = Part(part.names, part.image, None, part.files)
        with progress(f"reading {name}") as report:
            for i, result in enumerate(decoded(pictures, range(len(part)), None)):
                report(i, len(part))
                if isinstance(result, UnreadableError):
                    yield f"picture {part.names[i]!r} is unreadable ({result})"


def _report(name: str, location: str, found: DenseRead, sentences: Iterable[str]) -> DenseReport:
    kind, said = DENSE_KINDS[name], list(sentences)
    faults = gathered(told for told in said if not told.startswith(NOTE))
    notes = gathered(told.removeprefix(NOTE) for told in said if told.startswith(NOTE))
    counts = {part: len(pictures) for part, pictures in found.parts.items()}
    licence = kind.licence if isinstance(kind.licence, str) else kind.licence(location)
    source = f"{name}:{location}"
    prints = {
        part: DenseSet(source, part, found, pictures, torch.arange(len(pictures)), licence).fingerprint
        for part, pictures in found.parts.items()
    }
    return DenseReport(source, counts, found.classes, found.facts, prints, faults, notes, licence)
