"""A synthetic set on disk: tar shards in the WebDataset layout, and a manifest over them, written last.

FOLDER/shard-000000.tar   per sample KEY.png (or .webp, lossless), KEY.cls, KEY.json
FOLDER/manifest.json      settings, generator, counts, SHA-256 of every shard; their hash is the set's name
FOLDER/.shards/000000.json  what is known of a finished shard until the manifest takes it over

The same samples give the same bytes: times, owners and order inside a tar are fixed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffrep.data.images import Part
from diffrep.data.tars import shard_part
from diffrep.errors import UserError
from diffrep.files import located, read_json, sha256_of, short_hash, write_atomic, write_json

MANIFEST, NOTES = "manifest.json", ".shards"
FORMAT = 1  # of manifests
HELD_OUT = 0.1  # share of a set kept for choosing between students; the real test set stays unread until the end

ImageFormat = Literal["png", "webp"]


@dataclass(frozen=True)
class Sample:
    """One image of a shard. pixels (3, H, W) uint8; label -1 where it has none; note: what else is known of it."""

    key: str
    pixels: np.ndarray
    label: int
    note: dict[str, Any]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, samples: Iterable[Sample], image_format: ImageFormat) -> dict[str, Any]:
    """Write one shard whole, then its note; returns the note."""
    kept, buffer = list(samples), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in kept:
            fields = {image_format: encoded(sample.pixels, image_format), "json": _json(sample.note)}
            if sample.label >= 0:
                fields["cls"] = str(sample.label).encode()
            for extension, content in sorted(fields.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0, names empty
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path = folder / shard_name(number)
    write_atomic(path, buffer.getvalue())
    labels = [sample.label for sample in kept]
    counts = {str(label): labels.count(label) for label in sorted(set(labels))}
    note = {"name": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size, "images": len(kept)}
    write_json(_note_path(folder, number), note | {"counts": counts})
    return note | {"counts": counts}


def _json(note: dict[str, Any]) -> bytes:
    return json.dumps(note, sort_keys=True).encode()


def encoded(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """(3, H, W) uint8 -> the bytes of a lossless image file."""
    from PIL import Image

    file = io.BytesIO()
    options = {"png": {}, "webp": {"lossless": True, "exact": True}}[image_format]
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, image_format.upper(), **options)
    return file.getvalue()


def _note_path(folder: Path, number: int) -> Path:
    return folder / NOTES / f"{number:06d}.json"


def finished_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """The note of a shard that is there, whole and unchanged; None where it has to be made."""
    path, note_path = folder / shard_name(number), _note_path(folder, number)
    if not path.exists() or not note_path.exists():
        return None
    note = read_json(note_path)
    return note if path.stat().st_size == note["bytes"] and sha256_of(path) == note["sha256"] else None


def content_hash(settings: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    """64 hex digits over the settings and the bytes of all shards: two sets with one hash are the same set."""
    return short_hash([settings, [[s["name"], s["sha256"]] for s in shards]], 64)


def write_manifest(
    folder: Path, settings: dict[str, Any], notes: list[dict[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """Write the manifest over finished shards and return it.

    Args:
        settings: all that decides about pixels: the hash covers it.
        about: what else should be known (generator's name and licence, class names, machine); outside the hash.
    """
    counts: dict[str, int] = {}
    for note in notes:
        for label, count in note["counts"].items():
            counts[label] = counts.get(label, 0) + count
    shards = [{k: note[k] for k in ("name", "sha256", "bytes", "images")} for note in notes]
    manifest = {
        "format": FORMAT,
        "content_hash": content_hash(settings, shards),
        "images": sum(s["images"] for s in shards),
        "counts": counts,
        "settings": settings,
        **about,
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(location: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a set and its manifest; ``location`` is either.

    Raises:
        UserError: no manifest, another format, or one that does not belong to its own shards.
    """
    path = located(location)
    path = path / MANIFEST if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{location} is no finished synthetic set (no {MANIFEST}): run diffrep synthesize to its end")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.get("shards"):
        raise UserError(f"{path} is no manifest of a synthetic set of format {FORMAT}")
    if content_hash(manifest["settings"], manifest["shards"]) != manifest["content_hash"]:
        raise UserError(f"{path} was changed after it was written: its content hash does not fit")
    return path.parent, manifest


def check_shards(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The paths of all shards, after every byte of them was found to be as it was written.

    Raises:
        UserError: a shard is missing, cut off or changed.
    """
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        again = "the command that made the set makes this shard again"
        if not path.exists():
            raise UserError(f"{path} is missing: {again}")
        if path.stat().st_size != shard["bytes"] or sha256_of(path) != shard["sha256"]:
            raise UserError(f"{path} is not as it was written ({path.stat().st_size} bytes, other SHA-256): {again}")
    return [str(folder / shard["name"]) for shard in manifest["shards"]]


def read_synthetic(location: str) -> tuple[tuple[str, ...], dict[str, Part]]:
    """The data source ``synthetic:FOLDER``: every tenth of each class, the last drawn, is held out as validation."""
    folder, manifest = read_manifest(location)
    part = shard_part(check_shards(folder, manifest))
    classes = tuple(manifest.get("classes", ()))
    held_out = round(HELD_OUT * len(part))
    if not held_out:
        return classes, {"train": part}
    # Images stand in the order of their index, classes in turn, so the end of the set has all of them.
    at = len(part) - held_out
    return classes, {"train": _rows(part, range(at)), "validation": _rows(part, range(at, len(part)))}


def _rows(part: Part, rows: range) -> Part:
    labels = None if part.labels is None else part.labels[list(rows)]
    return Part([part.names[r] for r in rows], lambda i: part.read(rows[i]), labels, part.files)


def set_licence(location: str) -> str:
    """The licence of the generator, which its images travel under."""
    return str(read_manifest(location)[1].get("generator", {}).get("licence", "unknown"))
