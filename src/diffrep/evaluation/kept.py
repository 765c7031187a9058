"""Finished pieces of a long measurement, aside in one JSON file: a repeated command computes only what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffrep.errors import UserError
from diffrep.files import read_json, write_json


class Kept:
    """Pieces by name. Without a file they are kept in memory alone.

    of: hashes of what the pieces were measured on; a file of others is refused.
    """

    def __init__(self, file: Path | None = None, of: dict[str, str] | None = None) -> None:
        self.file, self.of = file, of or {}
        self.pieces: dict[str, Any] = {}
        if file is not None and file.exists():
            found = read_json(file)
            changed = [name for name, hash_ in self.of.items() if found["of"].get(name) != hash_]
            if changed:
                raise UserError(f"{file}: its pieces were measured on another {changed[0]}; choose another --out")
            self.pieces = found["pieces"]

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece ``name``: as it was kept, else made and kept. Plain JSON values only."""
        if name not in self.pieces:
            self.pieces[name] = make()
            if self.file is not None:
                write_json(self.file, {"of": self.of, "pieces": self.pieces})
        return self.pieces[name]
