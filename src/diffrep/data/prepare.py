"""Checking a data set before a run needs it, and bringing official archives and folders into a form runs can read.

Nothing is fetched. An archive is unpacked only after its md5 was found to be an official one.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrep import files
from diffrep.console import progress
from diffrep.data import cifar, dense_check
from diffrep.data.archives import unpack
from diffrep.data.containers import existing
from diffrep.data.datasets import split_positions
from diffrep.data.dense_check import DenseReport
from diffrep.data.imagenet import classes_without_image
from diffrep.data.images import Part, UnreadableError, decoded, fingerprint
from diffrep.data.reference import NAME as VAL256
from diffrep.data.reference import Prepared, prepare_reference
from diffrep.data.sources import Source, read_source
from diffrep.errors import UserError, nearest

CHECKED = (  # NAMEs of `data check`
    "ade20k", "celebahq", "celebamask-hq", "cifar10", "cifar100", "coco", "dmkd", "flowers102", "folder", "imagenet",
    "parquet", "tiny-imagenet", "wflw",
)  # fmt: skip
_OFFICIAL_ARCHIVES = {  # md5 of the binary and the python version, from https://www.cs.toronto.edu/~kriz/cifar.html
    "cifar10": ("c32a1d4ab5d03f1284b67883e8d87530", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": ("03b5dce01913d631647c71ecec9e9cb8", "eb9058c3a382ffc7106e4002c42a8d85"),
}
_OFFICIAL_COUNTS = {
    "celebahq": {"train": 24_183, "validation": 2_993, "test": 2_824},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "imagenet": {"train": 1_281_167, "test": 50_000},
    "tiny-imagenet": {"train": 100_000, "test": 10_000},
}
_VAL_IMAGES_PER_CLASS = 50  # of ImageNet
_ROWS_PER_GROUP = 256


@dataclass(frozen=True)
class Report:
    """What is there, and what is not."""

    source: str  # data reference, for data.source
    parts: dict[str, int]  # images of each official part
    splits: dict[str, int]  # images of each split a run gets
    classes: tuple[str, ...]  # names in label order
    fingerprints: dict[str, str]  # hex SHA-256 over sizes, pixels and labels of each official part
    missing: tuple[str, ...]  # files, parts or images that are not there, one sentence each
    unreadable: tuple[str, ...]  # images that cannot be decoded, with the reason
    licence: str

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing and every image can be read."""
        return not self.missing and not self.unreadable

    def lines(self) -> list[str]:
        """The report for a terminal."""
        parts = [f"{p}: {n} images, sha256 {self.fingerprints[p][:16]}" for p, n in self.parts.items()]
        splits = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        classes = [f"classes: {len(self.classes)} ({shown})"] if self.classes else ["classes: none, unlabelled"]
        body = [*parts, *classes, f"splits of a run: {splits}"] if parts else []
        faults = [f"missing: {m}" for m in self.missing] + [f"unreadable: {u}" for u in self.unreadable]
        return [f"source: {self.source}", *body, f"licence: {self.licence}", *faults]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**asdict(self), "classes": list(self.classes), "missing": list(self.missing),
                "unreadable": list(self.unreadable), "is_complete": self.is_complete}  # fmt: skip


def check(name: str, path: str | Path) -> Report | DenseReport:
    """Read everything once and say what is there; an archive is unpacked into a temporary folder.

    Args:
        name: one of ``CHECKED``.
        path: what follows the colon in a data reference; for CIFAR also an official archive.

    Raises:
        UserError: another name, a path that cannot be such a data set, an archive that is not the official one.
    """
    if name in dense_check.OFFICIAL_COUNTS:
        return dense_check.check(name, str(path))
    location = _location(name, path)
    if _is_archive(name, location):
        with tempfile.TemporaryDirectory() as folder:
            _unpack(name, location, Path(folder))
            return _renamed(_report(name, Path(folder)), f"{name}:{path}")
    return _report(name, location)


def prepare(name: str, path: str | Path, out: str | Path) -> Report | DenseReport | Prepared:
    """Unpack an official archive, or write one parquet file per part; ``out`` appears whole or not at all.

    Encoded images keep their bytes, decoded ones become PNG: no pixel changes. ``imagenet-val256`` is the exception:
    see :func:`diffrep.data.reference.prepare_reference`. Masks, points and objects are unpacked, masks also merged: see
    :func:`diffrep.data.dense_check.prepare`.

    Raises:
        UserError: as :func:`check`; anything missing or unreadable; ``out`` is there already.
    """
    if name == VAL256:
        return prepare_reference(path, out)
    if name in dense_check.OFFICIAL_COUNTS:
        return dense_check.prepare(name, str(path), out)
    location, target = _location(name, path, (*CHECKED, VAL256)), Path(out).expanduser()
    if target.exists():
        raise UserError(f"{out} exists; choose a new folder")
    if _is_archive(name, location):
        return _prepare_archive(name, location, target)
    report = _complete(_report(name, location))
    source = read_source(report.source)
    with files.folder_aside(target) as aside:
        for part_name, part in source.parts.items():
            _write_parquet(aside / f"{part_name}.parquet", part, source.classes)
    return _renamed(report, f"{name if name in _OFFICIAL_ARCHIVES else 'parquet'}:{target}")


def _prepare_archive(name: str, archive: Path, target: Path) -> Report:
    _verify_archive(name, archive)  # before the disk is touched
    with files.folder_aside(target) as aside:
        _unpack(name, archive, aside)
        report = _complete(_report(name, aside))
    return _renamed(report, f"{name}:{target}")


def _location(name: str, path: str | Path, known: tuple[str, ...] = CHECKED) -> Path:
    if name not in known:
        raise UserError(f"data set {name!r} is unknown here; {nearest(name, known)}")
    return existing(str(path)) if name in _OFFICIAL_ARCHIVES else Path(path)


def _is_archive(name: str, location: Path) -> bool:
    return name in _OFFICIAL_ARCHIVES and location.is_file() and location.suffix != ".parquet"


def _renamed(report: Report, source: str) -> Report:
    """The report of what was read in one place for where it will be found."""
    return Report(**{**vars(report), "source": source})


def _complete(report: Report) -> Report:
    if faults := [*report.missing, *report.unreadable]:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{report.source}: {faults[0]}{more}; nothing was written")
    return report


def _report(name: str, location: Path) -> Report:
    reference, foreign = f"{name}:{location}", []
    if name in cifar.SETS and not location.is_file() and not cifar.is_parquet(location):
        version = cifar.present_version(name, location)
        if missing := version.missing(location):
            return _nothing_read(reference, [f"{file} is missing" for file in missing])
        foreign = cifar.foreign_files(name, location) if version is cifar.SETS[name].python else []
    try:
        source = read_source(reference)
    except UserError as error:
        if not foreign:
            raise
        return _nothing_read(reference, [*foreign, str(error)])
    return _described(name, source, foreign)


def _nothing_read(reference: str, faults: list[str]) -> Report:
    return Report(reference, {}, {}, (), {}, tuple(faults), (), cifar.CIFAR_LICENCE)


def _described(name: str, source: Source, foreign: list[str]) -> Report:
    """The report of a source after one look at every image."""
    unreadable: list[str] = []
    prints = {n: fingerprint(_readable(n, part, unreadable), part.labels) for n, part in source.parts.items()}
    counts = {n: len(part) for n, part in source.parts.items()}
    missing = (*foreign, *_missing_images(name, source))
    return Report(
        source.reference, counts, _split_counts(source), source.classes, prints, missing, tuple(unreadable),
        source.licence,
    )  # fmt: skip


def _missing_images(name: str, source: Source) -> Iterator[str]:
    is_choice = name == "imagenet" and len(source.classes) < 1000  # a class list leaves no official number for train
    choice = {"test": _VAL_IMAGES_PER_CLASS * len(source.classes)}
    for part_name, official in (choice if is_choice else _OFFICIAL_COUNTS.get(name, {})).items():
        if (count := len(source.parts.get(part_name, ()))) != official:
            yield f"{part_name} has {count} of {official} images"
    for part_name, part in source.parts.items() if name in ("imagenet", "tiny-imagenet") else ():
        if absent := classes_without_image(part, source.classes):
            yield f"{part_name} has no image of {len(absent)} classes ({', '.join(absent[:5])}, ...)"


def _readable(label: str, part: Part, unreadable: list[str]) -> Iterator[np.ndarray]:
    """The images of a part; the names of those that cannot be decoded are added to ``unreadable``."""
    with progress(f"reading {label}") as report:
        for done, result in enumerate(decoded(part, range(len(part)), None)):
            report(done, len(part))
            if isinstance(result, UnreadableError):
                unreadable.append(f"{part.names[done]} ({result})")
            else:
                yield result


def _split_counts(source: Source) -> dict[str, int]:
    counts = {}
    for split in ("train", "validation", "test"):
        try:
            counts[split] = len(split_positions(source, split)[1])
        except UserError:
            counts[split] = 0
    return counts


def _verify_archive(name: str, archive: Path) -> None:
    with open(archive, "rb") as file:
        met = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if met not in _OFFICIAL_ARCHIVES[name]:
        binary, python = _OFFICIAL_ARCHIVES[name]
        official = f"the official {name} archives have {binary} (binary) and {python} (python)"
        raise UserError(f"{archive}: md5 is {met}, {official}; get it anew")


def _unpack(name: str, archive: Path, folder: Path) -> None:
    _verify_archive(name, archive)
    unpack(archive, folder)


def _write_parquet(path: Path, part: Part, classes: tuple[str, ...]) -> None:
    """One part in the Hugging Face image convention, class names in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features: dict[str, Any] = {"image": {"_type": "Image"}}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if part.labels is not None:
        features["label"] = {"_type": "ClassLabel", "names": list(classes)}
        fields.append(("label", pa.int64()))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    with pq.ParquetWriter(path, schema) as writer, progress(f"writing {path.stem}") as report:
        for start in range(0, len(part), _ROWS_PER_GROUP):
            report(start, len(part))
            rows = range(start, min(start + _ROWS_PER_GROUP, len(part)))
            writer.write_batch(pa.RecordBatch.from_pylist([_row(part, i) for i in rows], schema))


def _row(part: Part, position: int) -> dict[str, Any]:
    content = part.read(position)
    encoded = _png(content) if isinstance(content, np.ndarray) else content
    row: dict[str, Any] = {"image": {"bytes": encoded, "path": part.names[position]}}
    return row if part.labels is None else {**row, "label": int(part.labels[position])}


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
