"""Reader of tar shards in the WebDataset layout: files that share a name up to the first dot are one sample."""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from diffrep.data.containers import by_part
from diffrep.data.images import Part, read_at
from diffrep.errors import UserError

_SHARD_IMAGES = ("png", "jpg", "jpeg", "webp")


def read_shards(location: str) -> tuple[tuple[str, ...], dict[str, Part]]:
    """WebDataset tars: an image and ``.cls`` or ``.json`` with "label" under one key.

    Files on disk are indexed and read in place; what comes from a URL is held in memory as encoded bytes.
    ``{000..012}`` in the location counts.
    """
    origin = f"shards:{location}"
    if location.startswith("pipe:"):
        raise UserError(f"{origin}: a data source runs no commands; name files or a URL")
    places = [p for text in _counted(location) for p in ([text] if "://" in text else sorted(glob.glob(text)))]
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


def shard_part(places: list[str]) -> Part:
    samples = [(f"{PurePosixPath(p).name}:{key}", fields) for p in places for key, fields in _samples(p).items()]
    images = [(name, fields) for name, fields in samples if any(e in fields for e in _SHARD_IMAGES)]
    names = [name for name, _ in images]
    reads = [next(fields[e] for e in _SHARD_IMAGES if e in fields) for _, fields in images]
    labels = torch.tensor([_shard_label(name, fields) for name, fields in images], dtype=torch.int64)
    sizes = tuple((PurePosixPath(p).name, os.path.getsize(p) if os.path.exists(p) else 0) for p in places)
    return Part(names, lambda i: reads[i](), labels, sizes)


def _shard_label(name: str, fields: dict[str, Callable[[], bytes]]) -> int:
    try:
        if "cls" in fields:
            return int(fields["cls"]())
        return int(json.loads(fields["json"]()).get("label", -1)) if "json" in fields else -1
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{name}: the label in .cls or .json is not a whole number") from None


def _samples(place: str) -> dict[str, dict[str, Callable[[], bytes]]]:
    """Key -> extension -> function that reads the bytes, for the regular members of one tar."""
    samples: dict[str, dict[str, Callable[[], bytes]]] = {}
    try:
        for member, read in _members(place):
            folder, _, base = member.rpartition("/")
            stem, _, extension = base.partition(".")
            samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[extension.lower()] = read
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{place} is not a readable tar file ({error})") from None
    return samples


def _members(place: str) -> Iterable[tuple[str, Callable[[], bytes]]]:
    if "://" in place:
        from webdataset.gopen import gopen

        with gopen(place) as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as tar:
            # bytes(content) is content itself: nothing is copied
            return [(m.name, partial(bytes, tar.extractfile(m).read())) for m in tar if m.isreg()]  # type: ignore
    with tarfile.open(place, "r:") as tar:  # uncompressed: members can be read in place
        return [(m.name, partial(read_at, Path(place), m.offset_data, m.size)) for m in tar if m.isreg()]
