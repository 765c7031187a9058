"""The tables of ILSVRC-2012: its 1,000 classes, a choice of them, and which class each validation image is of."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from diffrep.data.lists import labelled_lines, read_lines
from diffrep.errors import UserError
from diffrep.wordnet import official_ids

DEVKIT = "ILSVRC2012_devkit_t12"
_DEVKIT_FILES = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")


def read_classes(path: Path) -> tuple[str, ...]:
    """A file with one WordNet id per line -> the ids, sorted: the position here is the label.

    Raises:
        UserError: a line that is none of the 1,000 ids, or one that repeats.
    """
    lines = read_lines(path)
    if wrong := next((line for line in lines if line not in official_ids()), None):
        raise UserError(f"{path}: {wrong!r} is none of the 1,000 WordNet ids of ILSVRC-2012; have one id per line")
    if len(set(lines)) < len(lines):
        raise UserError(f"{path}: {next(line for line in lines if lines.count(line) > 1)} stands there more than once")
    return tuple(sorted(lines))


def read_val_labels(base: Path) -> dict[str, str]:
    """File name of a validation image -> WordNet id, from the first of these tables in ``base``.

    - ``val.txt`` (or ``val/val.txt``): ``path label``, a label being the position of the class in the sorted WordNet
      ids, or the id itself;
    - ``LOC_val_solution.csv``, as Kaggle gives it;
    - ``ILSVRC2012_devkit_t12.tar.gz``, its folder, or its two files: line i is the class of image i, in a numbering
      of its own that ``meta.mat`` explains.

    Raises:
        UserError: there is none of them, or it is damaged.
    """
    readers: dict[str, Callable[[Path], dict[str, str]]] = {
        "val.txt": _read_list, "val/val.txt": _read_list, "LOC_val_solution.csv": _read_kaggle,
        f"{DEVKIT}/data/{_DEVKIT_FILES[0]}": _read_devkit_folder, _DEVKIT_FILES[0]: _read_devkit_folder,
        f"{DEVKIT}.tar.gz": _read_devkit_archive,
    }  # fmt: skip
    for name, read in readers.items():
        if (base / name).is_file():
            return read(base / name)
    tables = f"val.txt (`path label`), LOC_val_solution.csv, {DEVKIT}.tar.gz"
    raise UserError(f"{base}: the images of val are in no class folders and have no labels; add one of {tables}")


def _read_list(path: Path) -> dict[str, str]:
    return {PurePosixPath(name).name: _wordnet_id(path, name, label) for name, label in labelled_lines(path)}


def _wordnet_id(path: Path, name: str, label: str | None) -> str:
    ids = official_ids()
    if label in ids:
        return str(label)
    if label is None or not label.isdecimal() or int(label) >= len(ids):
        raise UserError(f"{path}: {name!r} has label {label!r}; valid: 0 to {len(ids) - 1}, or a WordNet id of them")
    return ids[int(label)]


def _read_kaggle(path: Path) -> dict[str, str]:
    """``ILSVRC2012_val_00000001,n01751748 111 108 441 193``: image, then class and box of each object; after a head."""
    rows = [line.partition(",") for line in read_lines(path)[1:]]
    return {f"{image}.JPEG": _wordnet_id(path, image, objects.partition(" ")[0]) for image, _, objects in rows}


def _read_devkit_folder(path: Path) -> dict[str, str]:
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(f"{path}: numbers the classes in its own way; put the development kit's meta.mat beside it")
    return _read_devkit(path, path.read_bytes(), meta.read_bytes())


def _read_devkit_archive(path: Path) -> dict[str, str]:
    try:
        with tarfile.open(path, "r:gz") as tar:
            members = [tar.extractfile(f"{DEVKIT}/data/{name}") for name in _DEVKIT_FILES]
            truth, meta = (member.read() for member in members if member is not None)
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not the development kit ({error})") from None
    return _read_devkit(path, truth, meta)


def _read_devkit(path: Path, truth: bytes, meta: bytes) -> dict[str, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        ids = {int(n): str(i) for n, i in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        named = [ids[int(line)] for line in truth.split()]
    except Exception as error:  # damaged files make the reader raise nearly anything
        raise UserError(f"{path}: the development kit cannot be read ({type(error).__name__}: {error})") from None
    return {f"ILSVRC2012_val_{k:08d}.JPEG": _wordnet_id(path, f"line {k}", i) for k, i in enumerate(named, 1)}
