"""CIFAR-10 and CIFAR-100 in every form their authors publish, and as parquet files.

The python version is read by ``pickles``, which runs nothing, so a file need not be the official one to be safe; that
its md5 is another says ``data check``. Labels of CIFAR-100 are the 100 fine ones.
Source: the authors' page, https://www.cs.toronto.edu/~kriz/cifar.html. Letters: N images of a file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.data.containers import existing, read_parquet, torchvision_set
from diffrep.data.images import Part, Read, array_part
from diffrep.data.pickles import read_plain
from diffrep.errors import UserError

_PIXELS = 3 * 32 * 32
CIFAR_LICENCE = "none stated by the authors; cite Krizhevsky 2009"
_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class _Version:
    """One published form: its folder, the files of each part, the file of class names."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.names)

    def root(self, path: Path) -> Path:
        """Where the files are, whether the user names their folder or the one around it."""
        return path / self.folder if (path / self.folder).is_dir() else path

    def missing(self, path: Path) -> list[str]:
        return [name for name in self.files if not (self.root(path) / name).is_file()]


@dataclass(frozen=True)
class _Set:
    python: _Version
    binary: _Version
    labels: str  # the key of the labels in the pickles
    names: str  # the key of the class names
    coarse: int  # superclasses; their labels stand first in a record of the binary version


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
SETS = {
    "cifar10": _Set(
        _Version("cifar-10-batches-py", _BATCHES, ("test_batch",), "batches.meta"),
        _Version("cifar-10-batches-bin", tuple(f"{b}.bin" for b in _BATCHES), ("test_batch.bin",), "batches.meta.txt"),
        "labels", "label_names", 0,
    ),
    "cifar100": _Set(
        _Version("cifar-100-python", ("train",), ("test",), "meta"),
        _Version("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt"),
        "fine_labels", "fine_label_names", 20,
    ),
}  # fmt: skip


def is_parquet(path: Path) -> bool:
    """Whether the set is there as parquet files."""
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def read_cifar(name: str, location: str) -> Read:
    """Parquet files, else the python version, else the binary version.

    Raises:
        UserError: files missing, damaged, or holding something else.
    """
    path, known = existing(location), SETS[name]
    if is_parquet(path):
        return read_parquet(location)
    if path.is_file():
        raise UserError(f"{location} is a file; `diffrep data prepare {name}` makes a folder of the archive")
    version = present_version(name, path)
    if missing := version.missing(path):
        raise UserError(f"{version.root(path)}: {missing[0]} is missing; get the official archive from {_PAGE}")
    read = _read_pickles if version is known.python else _read_binary
    return read(known, version.root(path))


def present_version(name: str, path: Path) -> _Version:
    """The published form of which the folder lacks least; the python one of two equals."""
    return min(SETS[name].python, SETS[name].binary, key=lambda version: len(version.missing(path)))


def foreign_files(name: str, path: Path) -> list[str]:
    """Which files of the python version do not have the md5 that torchvision lists, with both sums."""
    dataset = torchvision_set(name.upper())
    official = dict([*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])])
    root, met = SETS[name].python.root(path), {}
    for file in official:
        met[file] = hashlib.md5((root / file).read_bytes(), usedforsecurity=False).hexdigest()
    return [f"{f} has md5 {met[f]}, the official file has {md5}" for f, md5 in official.items() if met[f] != md5]


def _read_pickles(known: _Set, root: Path) -> Read:
    names = read_plain(root / known.python.names).get(known.names)
    if not isinstance(names, list) or not all(isinstance(n, str | bytes) for n in names):
        raise UserError(f"{root / known.python.names}: holds no list {known.names!r}")
    classes = tuple(n.decode() if isinstance(n, bytes) else n for n in names)
    parts = {"train": known.python.train, "test": known.python.test}
    return classes, {part: _joined(part, [_batch(root / f, known) for f in files]) for part, files in parts.items()}


def _batch(path: Path, known: _Set) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) uint8 and labels (N,) of one pickle."""
    found = read_plain(path)
    pixels, labels = np.asarray(found.get("data")), _integers(found.get(known.labels))
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise UserError(f"{path}: 'data' is {pixels.dtype} {pixels.shape}, an official file has uint8 (N, {_PIXELS})")
    if labels is None or labels.shape != pixels.shape[:1]:
        raise UserError(f"{path}: {known.labels!r} is not a list of {len(pixels)} whole numbers")
    return pixels, labels


def _integers(found: Any) -> np.ndarray | None:
    if isinstance(found, list) and not all(isinstance(k, int) and abs(k) < 2**31 for k in found):
        return None
    array = np.asarray(found)
    return array.astype(np.int64) if array.dtype.kind in "iu" else None


def _read_binary(known: _Set, root: Path) -> Read:
    lines = (root / known.binary.names).read_text(encoding="utf-8", errors="replace").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    parts = {"train": known.binary.train, "test": known.binary.test}
    return classes, {part: _joined(part, [_records(root / f, known) for f in files]) for part, files in parts.items()}


def _records(path: Path, known: _Set) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of records (coarse label, if any; label; planes R, G, B), one byte each."""
    before = 2 if known.coarse else 1
    content = np.fromfile(path, dtype=np.uint8)
    count, rest = divmod(len(content), before + _PIXELS)
    if rest or not count:
        where = f"after {count} records of {before + _PIXELS} bytes"
        raise UserError(f"{path}: {rest} bytes stand {where}; the file is truncated or another")
    records = content.reshape(count, -1)
    if known.coarse and (highest := int(records[:, 0].max())) >= known.coarse:
        row = int(records[:, 0].argmax())
        raise UserError(f"{path}: record {row} has coarse label {highest}; valid: 0 to {known.coarse - 1}")
    return records[:, before:], records[:, before - 1]


def _joined(part: str, files: list[tuple[np.ndarray, np.ndarray]]) -> Part:
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*files, strict=True))
    return array_part(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, part)
