"""Where images come from: one reference syntax, ``KIND[:LOCATION]``, and one reader per kind.

A reader answers with the official parts of its source, nothing held out and nothing decoded before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from diffrep.data.celebahq import read_celebahq
from diffrep.data.cifar import CIFAR_LICENCE, read_cifar
from diffrep.data.containers import PART_WORDS, existing, read_hub, read_parquet, torchvision_set
from diffrep.data.controls import read_noise, read_one_image, read_photographs
from diffrep.data.flowers import read_flowers
from diffrep.data.generated import generated_licence, read_generated
from diffrep.data.imagenet import read_imagenet
from diffrep.data.images import IMAGE_SUFFIXES, Part, Read, array_part, file_part
from diffrep.data.lists import read_dmkd
from diffrep.data.shards import read_synthetic, set_licence
from diffrep.data.tars import read_shards
from diffrep.data.tiny_imagenet import read_tiny_imagenet
from diffrep.errors import UserError, nearest

_MAX_CLASSES = 1 << 16  # without class names, a larger label is taken for a mistake


@dataclass(frozen=True)
class Source:
    """A source as it was found: ``parts`` has keys among "train", "validation" and "test"."""

    reference: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    licence: str


@dataclass(frozen=True)
class Kind:
    """One kind of source. ``location`` says in words what stands after the colon; None = nothing."""

    read: Callable[[str], Read]
    location: str | None
    licence: str | Callable[[str], str]  # or what finds it at a location


def parse(text: str) -> tuple[str, str]:
    """Split ``KIND[:LOCATION]`` into its two sides (location "" if there is none); the disk is not touched.

    Raises:
        UserError: an unknown kind, a missing location, or one too many.
    """
    kind = text.partition(":")[0]
    if kind not in KINDS and kind in DENSE_TASKS:
        tasks = " and ".join(DENSE_TASKS[kind])
        raise UserError(f"data source {text!r}: holds no classes of whole images, but truth for the task {tasks}")
    return parse_any(text)


def parse_any(text: str) -> tuple[str, str]:
    """:func:`parse`, sources of masks, points and objects (:mod:`diffrep.data.dense`) included."""
    kind, _, location = text.partition(":")
    if kind not in KINDS and kind not in DENSE_TASKS:
        raise UserError(f"data source {text!r}: no kind {kind!r}; {nearest(kind, [*KINDS, *DENSE_TASKS], limit=1)}")
    wanted = KINDS[kind].location if kind in KINDS else "FOLDER"
    if bool(location) != (wanted is not None):
        form = kind if wanted is None else f"{kind}:{wanted}"
        raise UserError(f"data source {text!r}: the form is {form!r}")
    return kind, location


def read_source(text: str) -> Source:
    """Find the parts of a source and check their labels.

    Raises:
        UserError: location missing or empty, a damaged container, a label outside the classes.
    """
    kind, location = parse(text)
    classes, parts = KINDS[kind].read(location)
    if not parts or not all(map(len, parts.values())):
        raise UserError(f"{text}: holds no images")
    if not classes:
        classes = _numbered(parts)
    told = KINDS[kind].licence
    licence = told if isinstance(told, str) else told(location)
    return Source(text, classes, {n: _checked(p, classes, text) for n, p in parts.items()}, licence)


def _numbered(parts: dict[str, Part]) -> tuple[str, ...]:
    highest = max((int(p.labels.max()) for p in parts.values() if p.labels is not None), default=-1)
    return tuple(str(k) for k in range(min(highest + 1, _MAX_CLASSES)))


def _checked(part: Part, classes: tuple[str, ...], origin: str) -> Part:
    """A part whose labels all name a class; hidden everywhere = unlabelled."""
    if part.labels is None or bool((part.labels == -1).all()):
        return replace(part, labels=None)
    wrong = ((part.labels < -1) | (part.labels >= len(classes))).nonzero()
    if len(wrong):
        name, label = part.names[int(wrong[0])], int(part.labels[wrong[0]])
        raise UserError(f"{origin}: image {name!r} has label {label}; valid: 0 to {len(classes) - 1}, or -1 = hidden")
    return part


def _read_digits(_: str) -> Read:
    """1,797 grey 8x8 digits inside scikit-learn; values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return tuple(map(str, range(10))), {"train": array_part(images, data.target, "train")}


def _read_mnist(name: str, location: str) -> Read:
    path, dataset = existing(location), torchvision_set(name)
    try:
        found = {part: dataset(path, train=part == "train", download=False) for part in ("train", "test")}
    except Exception as error:  # torchvision raises RuntimeError, ValueError, AssertionError, ... on damaged files
        reason = str(error).splitlines()[0].split(" You can use")[0]
        raise UserError(f"{location}: {reason} The files are expected in {path / name / 'raw'}") from None
    parts = {part: array_part(d.data.numpy(), d.targets.reshape(len(d), -1)[:, 0], part) for part, d in found.items()}
    return tuple(dataset.classes), parts


def _read_folder(location: str) -> Read:
    """PATH/{train,val,test}/CLASS/image, PATH/CLASS/image, or images directly in PATH (unlabelled)."""
    path = existing(location)
    if not path.is_dir():
        raise UserError(f"folder:{location} is a file; a folder of images is needed")
    folders = [f.name for f in _visible_folders(path)]
    named = [f for f in folders if f in PART_WORDS]
    has_parts = len(named) > 1 or (named and named == folders)  # a lone class may well be called "train"
    roots = {PART_WORDS[f]: path / f for f in named} if has_parts else {"train": path}
    found = {part: _labelled_files(root) for part, root in roots.items()}
    classes = tuple(sorted({label for files in found.values() for _, label in files if label is not None}))
    number = {name: k for k, name in enumerate(classes)}
    parts = {}
    for part, files in found.items():
        names = [str(file.relative_to(path)) for file, _ in files]
        labels = [-1 if label is None else number[label] for _, label in files]
        parts[part] = file_part(f"folder:{location}", path, names, labels)
    return classes, parts


def _visible_folders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images_below(path: Path, pattern: str) -> list[Path]:
    return sorted(f for f in path.glob(pattern) if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def _labelled_files(root: Path) -> list[tuple[Path, str | None]]:
    """Every image of one part with its class name, sorted by class and then by path."""
    folders, loose = _visible_folders(root), _images_below(root, "*")
    if loose and folders:
        raise UserError(f"{root}: holds images beside the folders {folders[0].name}, ...; have only one of the two")
    if [f.name for f in folders] == ["images"]:  # Tiny-ImageNet: one folder, the classes in a table beside it
        table = _annotations(root)
        return [(file, table.get(file.name)) for file in _images_below(folders[0], "*")]
    if loose:
        return [(file, None) for file in loose]
    by_class = {folder: _images_below(folder, "**/*") for folder in folders}
    empty = next((f.name for f, files in by_class.items() if not files), None)
    if empty is not None or not by_class:
        what = "holds no images" if empty is None else f"class folder {empty!r} holds no images"
        raise UserError(f"{root}: {what} ({' '.join(IMAGE_SUFFIXES)})")
    return [(file, folder.name) for folder, files in by_class.items() for file in files]


def _annotations(root: Path) -> dict[str, str]:
    """File name -> class name from ``*_annotations.txt`` (tab-separated); empty without such a file."""
    lines = [line.split("\t") for table in root.glob("*_annotations.txt") for line in table.read_text().splitlines()]
    return {line[0]: line[1] for line in lines if len(line) > 1}


# Read by diffrep.data.dense: kind -> the tasks it has truth for.
DENSE_TASKS = {
    "celebamask-hq": ("segment",),
    "wflw": ("landmark",),
    "ade20k": ("segment",),
    "coco": ("detect",),
    "placed": ("segment", "landmark", "detect"),
}

_OWN = "unknown: yours"
_IMAGENET = "ImageNet's terms: non-commercial research and education"
_CELEBAHQ = "CelebAMask-HQ's terms: non-commercial research; no image, nor data derived from one, may be passed on"
_PHOTOGRAPHS = "CC BY 2.0 (sample images of scikit-learn)"

KINDS: dict[str, Kind] = {
    "digits": Kind(_read_digits, None, "CC BY 4.0 (UCI, by way of scikit-learn)"),
    "mnist": Kind(partial(_read_mnist, "MNIST"), "FOLDER", "CC BY-SA 3.0"),
    "fashion_mnist": Kind(partial(_read_mnist, "FashionMNIST"), "FOLDER", "MIT"),
    "kmnist": Kind(partial(_read_mnist, "KMNIST"), "FOLDER", "CC BY-SA 4.0"),
    "qmnist": Kind(partial(_read_mnist, "QMNIST"), "FOLDER", "none stated here; cite Yadav and Bottou 2019"),
    "cifar10": Kind(partial(read_cifar, "cifar10"), "FOLDER", CIFAR_LICENCE),
    "cifar100": Kind(partial(read_cifar, "cifar100"), "FOLDER", CIFAR_LICENCE),
    "flowers102": Kind(read_flowers, "FOLDER", "none stated by the authors; cite Nilsback and Zisserman 2008"),
    "imagenet": Kind(read_imagenet, "FOLDER[@CLASS_LIST]", _IMAGENET),
    "tiny-imagenet": Kind(read_tiny_imagenet, "FOLDER_OR_ZIP", _IMAGENET),
    "celebahq": Kind(read_celebahq, "FOLDER", _CELEBAHQ),
    "dmkd": Kind(read_dmkd, "FOLDER_OR_LIST", "not stated for the released sets; else that of the generator"),
    "folder": Kind(_read_folder, "FOLDER", _OWN),
    "parquet": Kind(read_parquet, "FILE_OR_FOLDER", _OWN),
    "hf": Kind(read_hub, "NAME_OR_FOLDER", "unknown: see the page of the data set"),
    "shards": Kind(read_shards, "URL_OR_GLOB", _OWN),
    "synthetic": Kind(read_synthetic, "FOLDER", set_licence),
    "generated": Kind(read_generated, "FOLDER", generated_licence),
    "noise": Kind(read_noise, "COUNTxSIZE", "none needed"),
    "photographs": Kind(read_photographs, "COUNTxSIZE", _PHOTOGRAPHS),
    "one_image": Kind(read_one_image, "COUNTxSIZE", _PHOTOGRAPHS),
}
