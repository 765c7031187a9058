"""ADE20K as the scene parsing benchmark has it: 150 classes, 20,210 and 2,000 pictures of any size.

``ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_{train,val}_00000001.{jpg,png}`` and
``objectInfo150.txt``. An annotation has one channel: 0 = something else, ignored here, k = class k - 1.
The official validation pictures are our "test", as of ImageNet: the official test pictures have no public truth.
Source: CSAILVision/sceneparsing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrep.console import progress
from diffrep.data.containers import existing
from diffrep.data.dense import IGNORED, DensePart, DenseRead, Task
from diffrep.data.images import IMAGE_SUFFIXES, file_part
from diffrep.data.label_maps import NOTE, labels_in, size_of
from diffrep.data.lists import read_lines
from diffrep.errors import UserError

ROOT = "ADEChallengeData2016"
NAMES = "objectInfo150.txt"
CLASSES = 150
_PARTS = {"train": "training", "test": "validation"}
_FULL = ("ADE20K_2016_07_26", "ADE20K_2021_17_01")  # downloads with thousands of classes, in colours
_LABEL = np.array([IGNORED, *range(CLASSES)], np.uint8)  # of each value that an annotation may have


def read_ade20k(location: str, _task: Task) -> DenseRead:
    """``ADEChallengeData2016``, or the folder around it; one of the two parts may be missing.

    Raises:
        UserError: another layout, the full ADE20K, pictures without annotation or the other way round, a damaged list
            of names; later, when a mask is asked for, one that is unreadable, of another size than its picture, or
            with a value above 150.
    """
    origin, base = f"ade20k:{location}", existing(location)
    root = _root(origin, base)
    parts = {part: _part(origin, root, inner) for part, inner in _PARTS.items() if (root / "images" / inner).is_dir()}
    if not parts:
        wanted = f"images/{{training,validation}} and annotations/ are not in {root}"
        raise UserError(f"{origin}: {wanted}; have the folder as {ROOT}.zip unpacks")
    return DenseRead(_names(root / NAMES), parts)


def _root(origin: str, base: Path) -> Path:
    root = base / ROOT if (base / ROOT).is_dir() else base
    inner = [name for name in _FULL if (root / name).exists()]
    if inner or root.name in _FULL or any((root / name).exists() for name in ("images/ADE", "index_ade20k.mat")):
        found = f"this is the full ADE20K ({inner[0] if inner else root.name}), thousands of classes in colours"
        raise UserError(f"{origin}: {found}; take {ROOT}.zip of the scene parsing benchmark")
    return root


def pairs(root: Path, inner: str) -> tuple[dict[str, str], dict[str, str]]:
    """Stem -> file name of the pictures, and of the annotations, of ``training`` or ``validation``."""
    return _files(root / "images" / inner, IMAGE_SUFFIXES), _files(root / "annotations" / inner, (".png",))


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    names = (f.name for f in folder.iterdir() if f.suffix.lower() in endings and not f.name.startswith("."))
    return {Path(name).stem: name for name in sorted(names)}


def unpaired(root: Path, inner: str) -> list[str]:
    """Pictures that have no annotation and annotations that have no picture, a sentence each."""
    images, annotations = pairs(root, inner)
    bare = [f"images/{inner}/{images[stem]} has no annotation" for stem in images.keys() - annotations.keys()]
    lone = [f"annotations/{inner}/{annotations[stem]} has no picture" for stem in annotations.keys() - images.keys()]
    return sorted(bare) + sorted(lone)


def _part(origin: str, root: Path, inner: str) -> DensePart:
    if wrong := unpaired(root, inner):
        raise UserError(f"{origin}: {len(wrong)} files have no counterpart, first {wrong[0]}")
    images, annotations = pairs(root, inner)
    if not images:
        raise UserError(f"{origin}: images/{inner} holds no pictures")
    names = [f"images/{inner}/{name}" for name in images.values()]
    masks = [f"annotations/{inner}/{annotations[stem]}" for stem in images]
    found = file_part(origin, root, [*names, *masks], [-1] * 2 * len(names))
    return DensePart(names, found.read, lambda i: annotation(root / masks[i], root / names[i]), found.files)


def annotation(path: Path, picture: Path) -> Tensor:
    """The mask of one picture, (H, W) uint8, ``IGNORED`` where it has none of the classes.

    Raises:
        UserError: unreadable, not of one channel, a value above 150, another size than the picture's.
    """
    values, size = labels_in(path, CLASSES), size_of(picture)
    if values.shape != size:
        (h, w), (height, width) = values.shape, size
        raise UserError(f"{path} has {w}x{h} pixels, its picture {width}x{height}")
    return torch.from_numpy(_LABEL[values])


def _names(table: Path) -> tuple[str, ...]:
    """The first of the names that each class has; their numbers where the table is missing."""
    if not table.is_file():
        return tuple(str(k) for k in range(1, CLASSES + 1))
    rows = [[cell.strip() for cell in line.split("\t")] for line in read_lines(table)][1:]
    if [row[0] for row in rows] != [str(k) for k in range(1, CLASSES + 1)] or any(len(row) < 5 for row in rows):
        raise UserError(f"{table}: is no table of the classes 1 to {CLASSES}: Idx, Ratio, Train, Val, Name")
    return tuple(row[4].partition(",")[0].strip() for row in rows)


def faults(location: str) -> Iterator[str]:
    """What is wrong with the pairs of a set, a sentence each; one that begins with ``NOTE`` stops no run.

    Raises:
        UserError: the full ADE20K.
    """
    root = _root(f"ade20k:{location}", existing(location))
    for inner in _PARTS.values():
        yield from unpaired(root, inner)
        images, annotations = pairs(root, inner)
        both = sorted(images.keys() & annotations.keys())
        with progress(f"reading {inner}") as report:
            for done, stem in enumerate(both):
                report(done, len(both))
                path = root / "annotations" / inner / annotations[stem]
                try:
                    mask = annotation(path, root / "images" / inner / images[stem])
                except UserError as error:
                    yield str(error)
                else:
                    yield from [] if (mask != IGNORED).any() else [f"{NOTE}{path} has none of the {CLASSES} classes"]
