"""A set of images opened for scoring, with what its manifest knows of how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from diffrep.data.datasets import ImageSet
from diffrep.data.images import IMAGE_SUFFIXES, Part
from diffrep.data.shards import MANIFEST
from diffrep.data.sources import KINDS, read_source
from diffrep.errors import UserError
from diffrep.evaluation.survey import open_whole, reference_of
from diffrep.files import located, read_json

# What a manifest calls them, whoever wrote it.
_WORDS = {
    "sampler": ("sampler", "schedule"),
    "steps": ("num_sampling_steps", "num_steps", "steps"),
    "guidance": ("guidance_scale", "guidance"),
}
_MAGIC = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}
_ENDINGS = {".jpg": "jpeg", ".jpeg": "jpeg"}  # any other ending is its own name


@dataclass(frozen=True)
class Made:
    """How a set was made; "unknown" where nobody said. files: its image formats; name: what its manifest calls it."""

    files: str
    name: str
    sampler: str
    steps: str
    guidance: str


@dataclass(frozen=True)
class Opened:
    """All images of a set; nothing is decoded yet."""

    images: ImageSet
    made: Made


def opened(text: str, image_size: int | None) -> Opened:
    """A folder of images, the folder of a synthetic set, or any data reference.

    Raises:
        UserError: no such thing, a damaged one, images of different sizes without ``image_size``.
    """
    reference = _reference(text)
    manifest = _manifest(reference)
    images, _ = open_whole(reference, image_size)
    files = _formats(list(read_source(reference).parts.values()))
    how = {word: _found(manifest.get("settings"), keys) for word, keys in _WORDS.items()}
    interval = _found(manifest.get("settings"), ("guidance_interval",))
    if interval != "unknown":
        how["guidance"] += f" where sigma is in ({interval}]"
    return Opened(images, Made(files, str(manifest.get("name", "unknown")), **how))


def _reference(text: str) -> str:
    """A folder without the manifest of a synthetic set is a folder of images."""
    path = located(text)
    if text.partition(":")[0] in KINDS or not path.is_dir():
        if path.is_file():
            raise UserError(f"{text} is a file; give a folder of PNG, a data reference, or as --reference .npz or .pt")
        return reference_of(text)
    return reference_of(text) if "shards" in _manifest(f"folder:{path}") else f"folder:{path}"


def _manifest(reference: str) -> dict[str, Any]:
    """What stands beside the images, {} where nothing does."""
    path = located(reference.partition(":")[2]) / MANIFEST
    found = read_json(path) if reference.startswith(("folder:", "synthetic:")) and path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _found(settings: Any, keys: tuple[str, ...]) -> str:
    """The first of these keys that is said anywhere in nested settings."""
    said = dict(_leaves(settings))
    value = next((said[key] for key in keys if said.get(key) is not None), "unknown")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield from _leaves(inner)
        else:
            yield key, inner


def _formats(parts: list[Part]) -> str:
    """``png``, ``jpeg (3), png (7)``, ...; by the names, and by the first bytes where names have no ending."""
    counts: Counter[str] = Counter()
    for part in parts:
        endings = [PurePosixPath(name).suffix.lower() for name in part.names]
        plain = _sniffed(part)
        counts.update(_ENDINGS.get(e, e[1:]) if e in IMAGE_SUFFIXES else plain for e in endings)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{k} ({n})" for k, n in sorted(counts.items()))


def _sniffed(part: Part) -> str:
    first = part.read(0)
    return "arrays" if isinstance(first, np.ndarray) else _MAGIC.get(bytes(first[:2]), "unknown")
