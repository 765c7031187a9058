"""The run folder: everything a run says of itself. Reports read these files and nothing else.

``recipe.yaml`` (resolved), ``environment.json``, ``metrics.jsonl``, ``checkpoints/``, the exported weights, and
``result.json`` written last: its existence means finished.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffrep.errors import UserError
from diffrep.files import disk_errors, read_json, write_atomic, write_json

RESULT, RECIPE, METRICS, ENVIRONMENT = "result.json", "recipe.yaml", "metrics.jsonl", "environment.json"


class RunDir:
    """One execution's folder. Only the main process writes."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded, else None."""
        if not (self.path / RESULT).exists():
            return None
        found = read_json(self.path / RESULT)
        if not isinstance(found, dict):
            raise UserError(f"{self.path / RESULT} was not written by diffrep; choose another --out")
        return found

    def check(self, is_mine: Callable[[str], bool]) -> None:
        """Refuse a folder that belongs to another recipe, or to something else; ``is_mine`` reads its recipe."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file is in its way; choose another --out")
        found = self.path / RECIPE
        if found.exists() and not is_mine(found.read_text(encoding="utf-8", errors="replace")):
            raise UserError(f"{self.path} belongs to another recipe (see its {RECIPE}); choose another --out")
        # Hidden files are the lock and what a killed writer left behind.
        if not found.exists() and self.path.exists() and any(p.name[0] != "." for p in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --out")

    def begin(self, recipe_yaml: str, is_mine: Callable[[str], bool]) -> None:
        """Record what will run; see :meth:`check` for what is refused."""
        self.check(is_mine)
        if self.writes:
            write_atomic(self.path / RECIPE, recipe_yaml)  # first: by it a run that was killed here is known again
            write_json(self.path / ENVIRONMENT, environment())

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines; a line cut off by a kill is dropped."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [entry for line in lines if (entry := _parsed(line)) is not None]

    def forget_after(self, step: int) -> None:
        """Drop what was logged after the checkpoint that a resumed run starts from."""
        if self.writes and (self.path / METRICS).exists():
            kept = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
            write_atomic(self.path / METRICS, "".join(kept))

    def log(self, entry: dict[str, Any]) -> None:
        if self.writes:
            with disk_errors(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        if self.writes:
            write_json(self.path / RESULT, result)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def environment() -> dict[str, Any]:
    """Versions, commit and hardware: what a reader needs to tell two machines' numbers apart."""
    from importlib.metadata import version

    packages = ("diffrep", "torch", "torchvision", "timm", "diffusers", "accelerate", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """The commit of diffrep's own checkout; None for an installed package."""
    here = Path(__file__).resolve()
    # The file is named too, or git would answer for the repository around a virtual environment.
    asked = ["git", "-C", str(here.parent), "rev-parse", "HEAD", f"HEAD:./{here.name}"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.split()[0]
