"""Images that a token model made (`diffrep generate`, and stages of kind ``generation``), as a data source.

They have no class. Held out is the last tenth, as of a set that a diffusion model drew (:mod:`diffrep.data.shards`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.data.images import Read, file_part, some_of
from diffrep.data.shards import HELD_OUT
from diffrep.errors import UserError
from diffrep.files import located, read_json

FOUND = "generated.json"  # written last, see launch/generate.py


def read_generated(location: str) -> Read:
    """The data source ``generated:FOLDER``, in the order of the seeds.

    Raises:
        UserError: not such a folder, one that is not finished, or one that lacks images.
    """
    folder, found = _opened(location)
    names = [f"images/seed-{seed:06d}.png" for seed in found["seeds"]]
    every = file_part(f"generated:{location}", folder, names, [-1] * len(names))
    kept = len(names) - round(HELD_OUT * len(names))
    parts = {"train": range(kept), "validation": range(kept, len(names))}
    return (), {name: some_of(every, rows) for name, rows in parts.items() if rows}


def generated_licence(location: str) -> str:
    """Those of the networks, which the images travel under."""
    licences = _opened(location)[1]["licences"]
    return "; ".join(dict.fromkeys(map(str, licences.values())))


def _opened(location: str) -> tuple[Path, dict[str, Any]]:
    folder = located(location)
    if not (folder / FOUND).is_file():
        raise UserError(
            f"{location} is no finished folder of diffrep generate (no {FOUND}): run its command to the end"
        )
    found = read_json(folder / FOUND)
    if not _is_ours(found):
        raise UserError(f"{folder / FOUND} was not written by diffrep generate")
    return folder, found


def _is_ours(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("licences"), dict):
        return False
    seeds = found.get("seeds")
    return isinstance(seeds, list) and bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds)
