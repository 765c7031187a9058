"""Folders of arrays that a frozen network fills once, block by block, and that training replays by memory map.

One ``.npy`` file per array. ``manifest.json`` is written last, so a folder that has one is complete; an interrupted
writer continues at the block where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.console import Report
from diffrep.errors import Interrupted, UserError
from diffrep.files import disk_errors, read_json, sha256_of, write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"
RESIDENT_BYTES = 1 << 30  # a store up to this size is held on the device

Place = tuple[Any, ...]  # where a block lies in every array: an index for each of the first axes
Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def fill(
    folder: Path,
    settings: dict[str, Any],
    arrays: Arrays,
    places: Sequence[Place],
    make: Callable[[Place], dict[str, np.ndarray]],
    progress: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Compute every place once; returns the manifest, at once where the folder is complete.

    Args:
        settings: what decides the content; a folder of other settings is refused.
        make: the values of all arrays at one place.
        progress: called with (blocks done, in all). stop: asked after each block.

    Raises:
        Interrupted: ``stop()`` said so; what is done was noted.
    """
    if (folder / MANIFEST).exists():
        return same(read_json(folder / MANIFEST), settings, folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened, start = _open(folder, settings, arrays)
        for number, place in enumerate(places):
            if number < start:
                continue
            for name, values in make(place).items():
                opened[name][place] = values
            progress(number + 1, len(places))
            stopping = stop() and number + 1 < len(places)
            if number % 256 == 255 or stopping:
                _note(folder, opened, settings, number + 1)
            if stopping:
                where = f"stopped at block {number + 1} of {len(places)}"
                raise Interrupted(f"{where}; the same command goes on from there")
        _note(folder, opened, settings, len(places))
    hashes = {f"{name}.npy": sha256_of(folder / f"{name}.npy") for name in arrays}
    manifest = {**settings, "sha256": hashes}
    write_json(folder / MANIFEST, manifest)
    (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def write_empty(folder: Path, settings: dict[str, Any], arrays: Arrays) -> None:
    """A store of zeros with holes for content: right in shape, next to nothing on disk."""
    folder.mkdir(parents=True)
    for name, (dtype, shape) in arrays.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    write_json(folder / MANIFEST, settings)


def _open(folder: Path, settings: dict[str, Any], arrays: Arrays) -> tuple[dict[str, np.memmap], int]:
    """The arrays, with their disk space reserved (a map of a full disk would kill the process), and the first block."""
    done = 0
    if (folder / PROGRESS).exists():
        noted = read_json(folder / PROGRESS)
        same(noted["settings"], settings, folder)
        done = noted["blocks"]
    opened = {}
    for name, (dtype, shape) in arrays.items():
        path = folder / f"{name}.npy"
        if done:
            mapped(path)  # opened for writing, numpy would fill what is cut off with zeros
        opened[name] = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=dtype, shape=shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return opened, done


def mapped(path: Path) -> np.ndarray:
    """One array of a store, read only; a missing or truncated file is named."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete the folder and write it again") from None


def _note(folder: Path, arrays: dict[str, np.memmap], settings: dict[str, Any], blocks: int) -> None:
    for array in arrays.values():
        array.flush()
    write_json(folder / PROGRESS, {"settings": settings, "blocks": blocks})


def same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``found``, if it says of every setting what ``wanted`` says."""
    for key, value in wanted.items():
        if found.get(key) != value:
            told = f"{key}: {found.get(key)!r}, now {value!r}"
            raise UserError(f"{folder} was written with other settings ({told}); choose another --out")
    return found


def check_source(folder: Path, source: dict[str, Any], fingerprint: str, augment: str) -> None:
    """Refuse a store of other images than the run's, or of other views of them."""
    pairs = (("images", fingerprint, source["fingerprint"]), ("augment", augment, source["augment"]))
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise UserError(f"{folder} was written for other {name} ({theirs}, this run has {mine})")
