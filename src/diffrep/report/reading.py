"""Run folders, read as plain JSON and YAML. Nothing of torch is loaded here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffrep.errors import UserError
from diffrep.files import read_json
from diffrep.report.values import Entry, Run, Study, references

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_folder(path: Path) -> Run | Study:
    """A run or a study, whichever ``path`` holds.

    Raises:
        UserError: it holds neither, or one of its files is damaged.
    """
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run folder (no recipe.yaml); give a folder that `diffrep run` wrote")
    recipe = _yaml(path / "recipe.yaml")
    return _study(path, recipe) if recipe.get("kind") == "study" else _run(path, recipe)


def _run(path: Path, recipe: dict[str, Any]) -> Run:
    return Run(
        path, recipe, read_object(path / "result.json"), _metrics(path), read_object(path / "environment.json") or {}
    )


def _study(path: Path, recipe: dict[str, Any]) -> Study:
    result = read_object(path / "result.json")
    recorded = (result or {}).get("recorded", {})
    entries = tuple(_stage(path, name, stage, recipe, recorded) for name, stage in recipe["stages"].items())
    return Study(path, recipe, result, read_object(path / "environment.json") or {}, entries)


def _stage(path: Path, name: str, stage: Any, study: Mapping[str, Any], recorded: Mapping[str, Any]) -> Entry:
    """A stage over its seeds: from its folders, or from the evidence that made running it needless."""
    folders = [path / f"{name}-s{seed}" for seed in study.get("seeds", [0])]
    ran = [_run(f, _yaml(f / "recipe.yaml")) for f in folders if (f / "recipe.yaml").is_file()]
    missing = [f for f in folders if f.name in recorded and not (f / "recipe.yaml").is_file()]
    runs = tuple(
        ran + [Run(f, dict(stage) | {"seed": recorded[f.name]["seed"]}, recorded[f.name], [], {}) for f in missing]
    )
    scores = {run.seed: run.result.get("scores", {}) for run in runs if run.result}
    label = str(study.get("arms", {}).get(name, name))
    return Entry(name, label, stage, runs, tuple(references(stage)), scores, len(folders))


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON file's object, numbers that are none as None; None where there is no file.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    if not path.exists():
        return None
    found = _finite(read_json(path))
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; it was not written by diffrep")
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    """All logged lines; one that a kill cut off is dropped."""
    file = path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return [entry for line in lines if isinstance(entry := _line(line), dict) and "step" in entry]


def _line(line: str) -> Any:
    try:
        return _finite(json.loads(line))
    except json.JSONDecodeError:
        return None


def _finite(value: Any) -> Any:
    """``value`` without the numbers that are none: NaN and infinities become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict) or (found.get("kind") == "study" and not isinstance(found.get("stages"), dict)):
        raise UserError(f"{path} is no recipe; give a folder that `diffrep run` wrote")
    return found
