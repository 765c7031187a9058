"""Checking a data set before a run needs it, and bringing official archives and folders into a form runs can read.

Nothing is fetched. An archive is unpacked, and a pickle read, only after its md5 was found to be the official one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffrep import files
from diffrep.data.containers import existing
from diffrep.data.datasets import split_positions
from diffrep.data.images import Part, UnreadableError, decoded, fingerprint
from diffrep.data.sources import KINDS, Source, cifar_faults, cifar_root, read_source, torchvision_set
from diffrep.errors import UserError, nearest

CHECKED = ("cifar10", "cifar100", "folder", "parquet")  # the NAMEs of `diffrep data check`
_OFFICIAL_ARCHIVES = {  # md5 as on the authors' page, https://www.cs.toronto.edu/~kriz/cifar.html
    "cifar10": "c58f30108f718f92721af3b95e74349a",
    "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
}
_TORCHVISION_NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_OFFICIAL_COUNTS = {"train": 50_000, "test": 10_000}  # of both
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


def check(name: str, path: str | Path) -> Report:
    """Read everything once and say what is there; an archive is unpacked into a temporary folder.

    Args:
        name: "cifar10", "cifar100", "folder" or "parquet".
        path: an official archive, its extracted folder, a folder of images, or parquet files.

    Raises:
        UserError: another name, a path that cannot be such a data set, an archive that is not the official one.
    """
    location = _checked_location(name, path)
    if _is_archive(name, location):
        with tempfile.TemporaryDirectory() as folder:
            _unpack(name, location, Path(folder))
            return _renamed(_report(name, Path(folder)), f"{name}:{path}")
    return _report(name, location)


def prepare(name: str, path: str | Path, out: str | Path) -> Report:
    """Unpack an official archive, or write one parquet file per part; ``out`` appears whole or not at all.

    Encoded images keep their bytes, decoded ones become PNG: no pixel changes.

    Raises:
        UserError: as :func:`check`; anything missing or unreadable; ``out`` is there already.
    """
    location, target = _checked_location(name, path), Path(out).expanduser()
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


def _checked_location(name: str, path: str | Path) -> Path:
    if name not in CHECKED:
        raise UserError(f"data set {name!r} is unknown here; {nearest(name, CHECKED)}")
    return existing(str(path))


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
    reference = f"{name}:{location}"
    if faults := _cifar_faults(name, location):
        return Report(reference, {}, {}, (), {}, tuple(faults), (), KINDS[name].licence)
    source = read_source(reference)
    unreadable: list[str] = []
    prints = {n: fingerprint(_readable(part, unreadable), part.labels) for n, part in source.parts.items()}
    counts = {n: len(part) for n, part in source.parts.items()}
    missing = tuple(_missing_images(name, counts))
    return Report(
        reference, counts, _split_counts(source), source.classes, prints, missing, tuple(unreadable), source.licence
    )


def _cifar_faults(name: str, location: Path) -> list[str]:
    """Missing or foreign files of an extracted official folder; empty for every other kind of location."""
    if name not in _OFFICIAL_ARCHIVES or location.is_file() or any(location.glob("*.parquet")):
        return []
    dataset = torchvision_set(_TORCHVISION_NAMES[name])
    return cifar_faults(dataset, cifar_root(dataset, location))


def _missing_images(name: str, counts: dict[str, int]) -> Iterator[str]:
    for part, official in _OFFICIAL_COUNTS.items() if name in _OFFICIAL_ARCHIVES else ():
        if counts.get(part, 0) != official:
            yield f"{part} has {counts.get(part, 0)} of {official} images"


def _readable(part: Part, unreadable: list[str]) -> Iterator[np.ndarray]:
    """The images of a part; the names of those that cannot be decoded are added to ``unreadable``."""
    for name, result in zip(part.names, decoded(part, range(len(part)), None), strict=True):
        if isinstance(result, UnreadableError):
            unreadable.append(f"{name} ({result})")
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
    if met != _OFFICIAL_ARCHIVES[name]:
        official = _OFFICIAL_ARCHIVES[name]
        raise UserError(f"{archive}: md5 is {met}, that of the official {name} archive is {official}; get it anew")


def _unpack(name: str, archive: Path, folder: Path) -> None:
    """Verify, then write the archive's regular files below ``folder``; any other member refuses the whole archive."""
    _verify_archive(name, archive)
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            if member.isdir():
                continue
            target = folder / _safe_name(archive, member)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as written:
                shutil.copyfileobj(tar.extractfile(member), written)  # type: ignore[arg-type]


def _safe_name(archive: Path, member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    if not member.isreg() or name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise UserError(f"{archive}: member {member.name!r} is not a plain file below the folder; nothing was written")
    return member.name


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
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(part), _ROWS_PER_GROUP):
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
