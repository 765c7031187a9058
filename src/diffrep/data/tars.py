"""Reader of tar shards in the WebDataset layout: files that share a name up to the first dot are one sample.

A shard is indexed once by its headers and its labels; of a file on disk the images stay where they are, so that a set
may be larger than memory. What is kept of a sample is its name and three numbers: about 200 bytes.
"""

from __future__ import annotations

import bisect
import glob
import io
import itertools
import json
import os
import re
import tarfile
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch

from diffrep.data.containers import by_part
from diffrep.data.images import Part, read_at
from diffrep.errors import UserError

_SHARD_IMAGES = ("png", "jpg", "jpeg", "webp")
_SCHEMES = ("http", "https", "file", "ftps", "sftp", "scp", "gs", "hf", "ais")  # of webdataset; none of them a command
REMOTE_BYTES = 8 * 2**30  # at most, that URLs may bring into memory
_LARGEST_LABEL = 2**31
Span = tuple[int, int]  # offset and bytes of a file inside a tar


def read_shards(location: str) -> tuple[tuple[str, ...], dict[str, Part]]:
    """WebDataset tars: an image and ``.cls`` or ``.json`` with "label" under one key.

    Files on disk are indexed and read in place; what comes from a URL is held in memory as encoded bytes.
    ``{000..012}`` in the location counts.

    Raises:
        UserError: nothing there, no tar file, a label that is none, more from URLs than memory is spent on.
    """
    origin = f"shards:{location}"
    places = [p for text in _counted(location) for p in ([text] if "://" in text else sorted(glob.glob(text)))]
    if location.startswith("pipe:") or any("://" in p and p.partition("://")[0] not in _SCHEMES for p in places):
        raise UserError(f"{origin}: a data source runs no commands; name files or a URL of {', '.join(_SCHEMES)}")
    if not places:
        raise UserError(f"{origin}: no file matches")
    parts = by_part([(PurePosixPath(place).name, place) for place in places], origin)
    return (), {part: shard_part(chosen) for part, chosen in parts.items()}


def _counted(text: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar"""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        return [os.path.expanduser(text)]
    numbers = range(int(found[1]), int(found[2]) + 1)
    if len(found[2]) > 7:
        raise UserError(f"shards:{text}: {found[0]} are more files than any set has")
    return [t for n in numbers for t in _counted(f"{text[: found.start()]}{n:0{len(found[1])}d}{text[found.end() :]}")]


@dataclass(frozen=True)
class _Shard:
    """One tar and its N samples, in the order of the tar."""

    place: str
    content: bytes | None  # of a URL; None: read in place
    size: int  # bytes of the tar
    keys: list[str]
    spans: np.ndarray  # (N, 2) int64, see Span: the image of each sample
    labels: np.ndarray  # (N,) int64, -1 = none

    def read(self, row: int) -> bytes:
        offset, size = map(int, self.spans[row])
        return read_at(Path(self.place), offset, size) if self.content is None else self.content[offset : offset + size]


# The splits of a set are read one after the other: a shard that one of them holds is not indexed again.
_held: weakref.WeakValueDictionary[Hashable, _Shard] = weakref.WeakValueDictionary()


def shard_part(places: list[str]) -> Part:
    """The images of these tars as one part, labels from beside them."""
    shards: list[_Shard] = []
    for place in places:
        shards.append(_shard(place, REMOTE_BYTES - sum(len(shard.content or b"") for shard in shards)))
    starts = [0, *itertools.accumulate(len(shard.keys) for shard in shards)]

    def read(row: int) -> bytes:
        number = bisect.bisect_right(starts, row) - 1
        return shards[number].read(row - starts[number])

    bases = [PurePosixPath(place).name for place in places]
    names = [f"{base}:{key}" for base, shard in zip(bases, shards, strict=True) for key in shard.keys]
    labels = torch.from_numpy(np.concatenate([shard.labels for shard in shards]))
    return Part(names, read, labels, tuple((base, shard.size) for base, shard in zip(bases, shards, strict=True)))


def _shard(place: str, room: int) -> _Shard:
    """The index of one tar; of a URL at most ``room`` bytes are fetched."""
    try:
        stat = None if "://" in place else os.stat(place)
        key = (place, stat and (stat.st_size, stat.st_mtime_ns))
        found = _held.get(key)
        if found is None:
            found = _held[key] = _local(place, stat.st_size) if stat else _remote(place, room)
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, ImportError) as error:
        raise UserError(f"{place} is not a readable tar file ({error}); shards are uncompressed") from None
    return found


def _local(place: str, size: int) -> _Shard:
    with open(place, "rb") as file:
        return _Shard(place, None, size, *_indexed(place, file))


def _remote(place: str, room: int) -> _Shard:
    from webdataset.gopen import gopen

    with gopen(place) as stream:
        content = stream.read(room + 1)
    if len(content) > room:
        told = (
            f"is held in memory, at most {REMOTE_BYTES / 2**30:.0f} GiB; copy the shards to a disk and name the files"
        )
        raise UserError(f"{place}: what comes from URLs {told}")
    return _Shard(place, content, len(content), *_indexed(place, io.BytesIO(content)))


def _indexed(place: str, file: IO[bytes]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, spans and labels of the samples that have an image; in an uncompressed tar they lie as they are."""
    samples: dict[str, dict[str, Span]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header that it has read
            if member.isreg():
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                fields = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})
                fields[extension.lower()] = (member.offset_data, member.size)
    images = {key: fields for key, fields in samples.items() if any(e in fields for e in _SHARD_IMAGES)}
    spans = [next(fields[e] for e in _SHARD_IMAGES if e in fields) for fields in images.values()]
    labels = [_label(f"{PurePosixPath(place).name}:{key}", fields, file) for key, fields in images.items()]
    return list(images), np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(labels, dtype=np.int64)


def _label(name: str, fields: dict[str, Span], file: IO[bytes]) -> int:
    field = next((field for field in ("cls", "json") if field in fields), None)
    if field is None:
        return -1
    offset, size = fields[field]
    file.seek(offset)
    content = file.read(size)
    try:
        # str: a number with a fraction would lose it
        label = int(content) if field == "cls" else int(str(json.loads(content).get("label", -1)))
        if abs(label) < _LARGEST_LABEL:
            return label
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{name}: the label in .cls or .json is not a whole number")
