"""A synthetic set on disk: tar shards in the WebDataset layout, and a manifest over them, written last.

FOLDER/shard-000000.tar   per sample KEY.png (or .webp, lossless), KEY.cls, KEY.json
FOLDER/manifest.json      settings, generator, counts, SHA-256 of every shard; their hash is the set's name
FOLDER/settings.json      written first: by it a folder of another set is known
FOLDER/README.md, _info.json  tell Hugging Face ``datasets`` and timm where the images are
FOLDER/.shards/000000.json    what is known of a finished shard until the manifest takes it over

The same samples give the same bytes: times, owners and order inside a tar are fixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.data.images import Part
from diffrep.data.tars import shard_part
from diffrep.errors import UserError
from diffrep.files import located, read_json, sha256_of, short_hash, write_atomic, write_json

MANIFEST, SETTINGS, NOTES = "manifest.json", "settings.json", ".shards"
FORMAT = 1  # of manifests
HELD_OUT = 0.1  # share of a set kept for choosing between students; the real test set stays unread until the end

ImageFormat = Literal["png", "webp"]


# One shard


@dataclass(frozen=True)
class Sample:
    """One image of a shard. pixels (3, H, W) uint8; label -1 where it has none; note: what else is known of it."""

    key: str
    pixels: np.ndarray
    label: int
    note: dict[str, Any]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def write_shard(
    folder: Path, number: int, samples: Sequence[Sample], image_format: ImageFormat, about: dict[str, Any]
) -> dict[str, Any]:
    """Write one shard whole, then its note; returns the note.

    Args:
        about: what the note says besides (cost, machine); neither the shard nor the set's hash knows of it.
    """
    content = _tar(samples, image_format)
    path = folder / shard_name(number)
    # Hashed before it is written: whatever the disk or a second writer makes of it will be seen.
    note = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_atomic(path, content)
    write_json(_note_path(folder, number), note | {"images": len(samples)} | about)
    return note | {"images": len(samples)} | about


def _tar(samples: Iterable[Sample], image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            fields = {image_format: encoded(sample.pixels, image_format), "json": _json(sample.note)}
            if sample.label >= 0:
                fields["cls"] = str(sample.label).encode()
            for extension, content in sorted(fields.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0, names empty
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _json(note: dict[str, Any]) -> bytes:
    return json.dumps(note, sort_keys=True).encode()


def encoded(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """(3, H, W) uint8 -> the bytes of a lossless image file."""
    from PIL import Image

    file = io.BytesIO()
    options = {"png": {}, "webp": {"lossless": True, "exact": True}}[image_format]
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, image_format.upper(), **options)
    return file.getvalue()


def bytes_per_image(pixels: np.ndarray, image_format: ImageFormat) -> int:
    """What a shard needs for each of (B, 3, H, W) uint8: the file in whole blocks of 512, and five blocks besides."""
    sizes = [len(encoded(image, image_format)) for image in pixels]
    return round(sum(-(-size // 512) * 512 for size in sizes) / len(sizes)) + 5 * 512


# The folder of a set


def begin_set(folder: Path, settings: dict[str, Any]) -> None:
    """Say what the folder will hold.

    Raises:
        UserError: it holds, or was begun for, another generator's images or other settings.
    """
    for path in (folder / SETTINGS, folder / MANIFEST):
        if path.exists():
            found = read_json(path)
            found = found.get("settings") if path.name == MANIFEST and isinstance(found, dict) else found
            _same_set(folder, found, settings)
    write_json(folder / SETTINGS, settings)


def _same_set(folder: Path, found: Any, settings: dict[str, Any]) -> None:
    words = {"generator": "images of another generator", "seed": "images of another seed"}
    for key, value in settings.items():
        if not isinstance(found, dict) or found.get(key) != value:
            raise UserError(f"{folder} holds {words.get(key, 'images of other settings')}; choose another --out")


def _note_path(folder: Path, number: int) -> Path:
    return folder / NOTES / f"{number:06d}.json"


def is_noted(folder: Path, number: int) -> bool:
    """Whether a shard was finished once; its bytes are not looked at."""
    return _note_path(folder, number).exists()


def forget_shard(folder: Path, number: int) -> None:
    """A damaged shard is no longer taken for a finished one."""
    _note_path(folder, number).unlink(missing_ok=True)


def known_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a finished set says of its shards, by name: a copied folder may lack the hidden notes."""
    try:
        return {shard["name"]: shard for shard in read_manifest(folder)[1]["shards"]}
    except UserError:
        return {}


def finished_shard(folder: Path, number: int, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The note of a shard that is there, whole and unchanged; None where it has to be made."""
    path = folder / shard_name(number)
    note = _note(_note_path(folder, number)) or known.get(path.name)
    return note if note is not None and _is_as_written(path, note) else None


def _note(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except UserError:
        return None
    return found if isinstance(found, dict) and _SHARD.keys() <= found.keys() else None


def _is_as_written(path: Path, shard: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    found = path.stat()
    return found.st_size == shard["bytes"] and _sha256(path, found.st_size, found.st_mtime_ns) == shard["sha256"]


@lru_cache(maxsize=1 << 16)
def _sha256(path: Path, size: int, mtime: int) -> str:
    """Of a file as it is now: the splits of one set read its shards once."""
    return sha256_of(path)


# What made it


def environment(device: torch.device | str) -> dict[str, Any]:
    """What the bytes depend on besides the settings: device, threads and builds."""
    if torch.device(device).type == "cuda":
        place: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    else:
        place = {"device": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    builds = {name: version(name) for name in ("torch", "diffusers", "pillow")}
    return place | {"threads": torch.get_num_threads(), "dtype": "float32", **builds}


def common_environment(folder: Path, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One value where all shards agree, all values where they were made in different places."""
    found = [note["environment"] for note in notes if "environment" in note]
    if len(found) < len(notes) and (folder / MANIFEST).exists():  # shards of which only the manifest still knows
        found.insert(0, read_json(folder / MANIFEST)["environment"])
    names = dict.fromkeys(name for place in found for name in place)
    values = {name: list(dict.fromkeys(v for place in found for v in _listed(place.get(name)))) for name in names}
    return {name: each[0] if len(each) == 1 else each for name, each in values.items()}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# The manifest


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
    shards = [{k: note[k] for k in _SHARD} for note in notes]
    manifest = {
        "format": FORMAT,
        "content_hash": content_hash(settings, shards),
        "images": sum(s["images"] for s in shards),
        "settings": settings,
        **about,
        "shards": shards,
    }
    write_json(folder / "_info.json", _timm_info(shards))
    write_atomic(folder / "README.md", _readme(manifest))
    write_json(folder / MANIFEST, manifest)
    return manifest


_SHARD: dict[str, type] = {"name": str, "sha256": str, "bytes": int, "images": int}  # what a manifest says of each


def label_counts(labels: np.ndarray) -> dict[str, int]:
    """Images of each label that has some."""
    names, counts = np.unique(labels, return_counts=True)
    return dict(zip(map(str, names.tolist()), counts.tolist(), strict=True))


def _timm_info(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """What timm's reader of WebDataset folders (``wds/``) asks for."""
    split = {"name": "train", "num_samples": sum(s["images"] for s in shards)}
    split |= {"filenames": [s["name"] for s in shards], "shard_lengths": [s["images"] for s in shards]}
    return {"splits": {"train": split}}


def _readme(manifest: dict[str, Any]) -> str:
    """A data set card: its head makes ``datasets.load_dataset(FOLDER)`` read the shards and nothing else."""
    generator = manifest["generator"]
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.tar
---

{manifest["images"]} images drawn by {generator.get("name", "a diffusion model")}; no camera took them.

Licence, that of the generator: {generator["licence"]}

Content hash: {manifest["content_hash"]}

`manifest.json` says how they were made; `diffrep synthesize --from manifest.json --out NEW` makes them again.
"""


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
    if not _is_manifest(manifest):
        raise UserError(f"{path} is no manifest of a synthetic set of format {FORMAT}")
    if content_hash(manifest["settings"], manifest["shards"]) != manifest["content_hash"]:
        raise UserError(f"{path} was changed after it was written: its content hash does not fit")
    return path.parent, manifest


def _is_manifest(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("shards"), list):
        return False
    parts = {"settings", "content_hash", "generator", "classes"} <= found.keys() and isinstance(
        found["generator"], dict
    )
    return parts and bool(found["shards"]) and all(map(_is_shard, found["shards"]))


def _is_shard(found: Any) -> bool:
    typed = isinstance(found, dict) and all(isinstance(found.get(k), kind) for k, kind in _SHARD.items())
    return typed and found["name"] == os.path.basename(found["name"])  # of this folder and no other


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
        if not _is_as_written(path, shard):
            raise UserError(f"{path} is not as it was written ({path.stat().st_size} bytes, other SHA-256): {again}")
    return [str(folder / shard["name"]) for shard in manifest["shards"]]


# The set as a data source


def read_synthetic(location: str) -> tuple[tuple[str, ...], dict[str, Part]]:
    """The data source ``synthetic:FOLDER``: a tenth of each class, the last drawn, is held out as validation."""
    folder, manifest = read_manifest(location)
    part = shard_part(check_shards(folder, manifest))
    classes = tuple(manifest["classes"])
    is_held_out = last_of_each(part.labels if part.labels is not None else torch.zeros(len(part)), HELD_OUT)
    if not is_held_out.any():
        return classes, {"train": part}
    return classes, {"train": _rows(part, ~is_held_out), "validation": _rows(part, is_held_out)}


def last_of_each(labels: Tensor, share: float) -> Tensor:
    """(N,) labels -> (N,) bool: ``share`` of all, and of each class its last as near as whole images allow."""
    height = torch.empty(len(labels), dtype=torch.float64)  # of image k of a class of n: (k + 1/2) / n
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        height[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[height.argsort(stable=True)[len(labels) - round(share * len(labels)) :]] = True
    return chosen


def _rows(part: Part, chosen: Tensor) -> Part:
    rows = chosen.nonzero()[:, 0].tolist()
    labels = None if part.labels is None else part.labels[rows]
    return Part([part.names[r] for r in rows], lambda i: part.read(rows[i]), labels, part.files)


def set_licence(location: str) -> str:
    """The licence of the generator, which its images travel under."""
    return str(read_manifest(location)[1]["generator"].get("licence", "unknown"))
