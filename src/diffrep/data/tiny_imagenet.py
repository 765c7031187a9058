"""Tiny-ImageNet as the course CS231N publishes it: the folder of its zip file, or the zip file unopened.

- ``wnids.txt``: the WordNet ids of its 200 classes; a label is the position of the id among them sorted;
- train: ``train/WNID/images/*.JPEG``, listed in ``train/WNID/WNID_boxes.txt``;
- test:  ``val/images/*.JPEG``, their classes in ``val/val_annotations.txt``.
The official validation images are our "test", as of ImageNet: the official test images have no labels and are not read.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from diffrep.data.containers import existing
from diffrep.data.images import IMAGE_SUFFIXES, Part, Read
from diffrep.errors import UserError
from diffrep.wordnet import is_wordnet_id

ROOT = "tiny-imagenet-200"  # what the zip file unpacks to
_CLASSES, _VAL_TABLE = "wnids.txt", "val/val_annotations.txt"


@dataclass(frozen=True)
class _Tree:
    """The files of the set, wherever they are."""

    origin: str  # what a message calls the set
    sizes: dict[str, int]  # path below the root -> bytes
    read: Callable[[str], bytes]

    def rows(self, name: str) -> list[list[str]]:
        """The lines of a table that hold something, cut at their blanks.

        Raises:
            UserError: it is not there, is not text, or holds nothing.
        """
        if name not in self.sizes:
            raise UserError(f"{self.origin}: {name} is missing; have the folder as {ROOT}.zip unpacks, or the zip file")
        try:
            rows = [line.split() for line in self.read(name).decode("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.origin}: {name} is not a readable table ({error})") from None
        if not any(rows):
            raise UserError(f"{self.origin}: {name} is empty")
        return [row for row in rows if row]

    def refuse(self, wrong: Iterable[str], whole: int, what: str) -> None:
        """An error that counts and names what is wrong, if anything is: "3 of 50 WHAT, first NAME"."""
        if found := sorted(wrong):
            raise UserError(f"{self.origin}: {len(found)} of {whole} {what}, first {found[0]}")

    def part(self, labels: dict[str, int]) -> Part:
        """Path of an image -> label, as a part in this order."""
        names = list(labels)
        self.refuse(labels.keys() - self.sizes.keys(), len(names), "images are listed and missing")
        files = tuple((name, self.sizes[name]) for name in names)
        return Part(names, lambda i: self.read(names[i]), torch.tensor(list(labels.values()), dtype=torch.int64), files)


def read_tiny_imagenet(location: str) -> Read:
    """The folder that holds ``wnids.txt``, the one around it, or ``tiny-imagenet-200.zip``.

    Raises:
        UserError: a table is missing or damaged; images listed and missing, without a class, or elsewhere; a class
            that ``wnids.txt`` lacks.
    """
    origin, path = f"tiny-imagenet:{location}", existing(location)
    tree = _folder(origin, path) if path.is_dir() else _zip(origin, path)
    classes = _classes(tree)
    images = {name for name in tree.sizes if name.lower().endswith(IMAGE_SUFFIXES)}
    elsewhere = "images lie in neither train/WNID/images nor val/images (folder: reads class folders)"
    tree.refuse((name for name in images if not _in_place(name)), len(images), elsewhere)
    number = {wordnet_id: label for label, wordnet_id in enumerate(classes)}
    found = {"train": _train(tree, images, number), "test": _val(tree, images, number)}
    return classes, {part: tree.part(labels) for part, labels in found.items() if labels}


def _folder(origin: str, path: Path) -> _Tree:
    base = path / ROOT if (path / ROOT).is_dir() else path
    found = [base / _CLASSES]
    for part in ("train", "val"):
        found += [Path(at, name) for at, _, names in os.walk(base / part, followlinks=True) for name in names]
    plain = [file for file in found if file.is_file() and not file.name.startswith(".")]
    sizes = {file.relative_to(base).as_posix(): file.stat().st_size for file in plain}
    return _Tree(origin, sizes, lambda name: (base / name).read_bytes())


def _zip(origin: str, path: Path) -> _Tree:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{origin}: is no folder and no readable zip file ({error})") from None
    root = f"{ROOT}/" if f"{ROOT}/{_CLASSES}" in archive.namelist() else ""
    files = {m.filename.removeprefix(root): m.file_size for m in archive.infolist() if not m.is_dir()}
    plain = [name for name in files if name.startswith(("train/", "val/")) and "/." not in name]
    sizes = {name: files[name] for name in (_CLASSES, *plain) if name in files}
    return _Tree(origin, sizes, lambda name: archive.read(root + name))


def _classes(tree: _Tree) -> tuple[str, ...]:
    """The ids of wnids.txt, sorted."""
    ids = [row[0] for row in tree.rows(_CLASSES)]
    tree.refuse((f"{text!r}" for text in ids if not is_wordnet_id(text)), len(ids), f"lines of {_CLASSES} are no ids")
    tree.refuse(_repeated(ids), len(ids), f"lines of {_CLASSES} stand there more than once")
    return tuple(sorted(ids))


def _repeated(names: list[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _in_place(name: str) -> bool:
    folders = name.split("/")[:-1]
    return folders == ["val", "images"] or (len(folders) == 3 and folders[0] == "train" and folders[2] == "images")


def _class_of(name: str) -> str:
    """train/n01443537/images/n01443537_0.JPEG -> n01443537"""
    return name.split("/")[1]


def _train(tree: _Tree, images: set[str], number: dict[str, int]) -> dict[str, int]:
    """Path -> label of the training images that are there or that a table of boxes lists, sorted by path."""
    named = {name for name in images if name.startswith("train/")}
    for table in [name for name in tree.sizes if name.startswith("train/") and name.endswith("_boxes.txt")]:
        named |= {f"{PurePosixPath(table).parent}/images/{row[0]}" for row in tree.rows(table)}
    classes = {_class_of(name) for name in named}
    tree.refuse(classes - number.keys(), len(classes), f"classes of train are not in {_CLASSES}")
    return {name: number[_class_of(name)] for name in sorted(named)}


def _val(tree: _Tree, images: set[str], number: dict[str, int]) -> dict[str, int]:
    """Path -> label of the validation images, sorted by path; empty where there is no val."""
    present = {name for name in images if name.startswith("val/")}
    if not present and _VAL_TABLE not in tree.sizes:
        return {}
    rows = tree.rows(_VAL_TABLE)
    tree.refuse((row[0] for row in rows if len(row) < 2), len(rows), f"lines of {_VAL_TABLE} name no class")
    tree.refuse(_repeated([row[0] for row in rows]), len(rows), f"lines of {_VAL_TABLE} stand there more than once")
    named = {f"val/images/{row[0]}": row[1] for row in rows}
    tree.refuse(present - named.keys(), len(present), f"images of val have no line in {_VAL_TABLE}")
    strange = [f"{text!r} of {name}" for name, text in named.items() if text not in number]
    tree.refuse(strange, len(rows), f"lines of {_VAL_TABLE} name classes that are not in {_CLASSES}")
    return {name: number[wordnet_id] for name, wordnet_id in sorted(named.items())}
