"""Three spellings of a recipe, one door: a shipped name, a YAML or JSON file, and ``a.b=value`` overrides.

Everything passes through :func:`load` before any data, weights or network is touched. What is refused is one line:
the path, the value, what is legal, the nearest right name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffrep.config import validate
from diffrep.errors import UserError, nearest
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe, Study, strings


def load(reference: str, overrides: Sequence[str] = (), allow_code: bool = False) -> Recipe | Study:
    """A recipe or study from a shipped name or a YAML / JSON file, with ``a.b=value`` overrides.

    In a study an override may begin with the name of a stage: ``STAGE.a.b=value``.

    Raises:
        UserError: unknown name, unreadable file, unknown key, wrong value, foreign code without ``allow_code``.
    """
    values, origin = _from_file(Path(reference)) if _is_file(reference) else (_shipped(reference), reference)
    return changed(values, origin, overrides, allow_code)


def changed(
    values: dict[str, Any], origin: str, overrides: Sequence[str] = (), allow_code: bool = False
) -> Recipe | Study:
    """A recipe or study from its plain values with overrides laid over them; ``origin`` is named in errors.

    Raises:
        UserError: as :func:`load`.
    """
    for override in overrides:
        values = _with(values, override)
    kind = values.get("kind", "recipe")
    if kind not in ("recipe", "study"):
        raise UserError(f"{origin}: kind = {kind!r:.60}: valid: recipe, study")
    task: Recipe | Study = validate(Study, values, origin) if kind == "study" else validate(Recipe, values, origin)
    foreign = [text for text in strings(task.model_dump(mode="json")) if text.startswith("python:")]
    if foreign and not allow_code:
        raise UserError(f"{origin}: '{foreign[0]}' runs foreign code; if you trust it, say --allow-code")
    if isinstance(task, Recipe) and task.name in RECIPES and task.name.endswith(FAITHFUL):
        _check_faithful(task)
    return task


FAITHFUL = "_faithful"
# Where networks lie and how they are run, not what is done.
WHERE = ("teacher", "features", "answers", "init", "passes")


def _check_faithful(task: Recipe) -> None:
    """Refuse an official config under its own name that is none any more."""
    official = RECIPES[task.name]()
    assert isinstance(official, Recipe)
    for part in ("method", "optim"):
        ours, theirs = getattr(task, part), getattr(official, part)
        changed = [key for key, value in ours if value != getattr(theirs, key, None) and key not in WHERE]
        if changed:
            corrected = task.name.removesuffix(FAITHFUL)
            raise UserError(
                f"{task.name}: {part}.{changed[0]} is not the official config's; change it in '{corrected}', or in a "
                "file of another name with this recipe as base"
            )


def _is_file(reference: str) -> bool:
    return reference.endswith((".yaml", ".yml", ".json"))


def _shipped(name: str) -> dict[str, Any]:
    if name not in RECIPES:
        raise UserError(f"no recipe '{name}'; {nearest(name, RECIPES)} (a recipe of yours ends in .yaml or .json)")
    return RECIPES[name]().model_dump(mode="json")


MAX_FILE_BYTES = 1 << 20
LONG_NUMBER = re.compile(r"\s*[+-]?[\d_]{19,}(\.0*)?\s*")  # as text, which pydantic would still read as a number
MAX_DEPTH = 32  # of mappings and lists in each other; a study needs 7


def _from_file(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """What stands in ``path``, laid on its ``base:``; ``above`` are the files whose base it is."""
    if path.resolve() in above:
        raise UserError(f"{path}: base leads in a circle back to this file")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than {MAX_FILE_BYTES} bytes; that is no recipe")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {path} is not UTF-8 text") from None
    values = _parse_json(text, str(path)) if path.suffix == ".json" else _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} is a {type(values).__name__}, not a mapping of keys to values")
    return _inherit(values, path, above), str(path)


def _parse(text: str, origin: str) -> Any:
    try:
        _refuse_tricks(text, origin)
        return _plain(yaml.safe_load(text), origin)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"recipe {origin} is not YAML{where}: {problem}") from None
    except UserError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:  # PyYAML, of a bad !!tag
        raise UserError(f"recipe {origin} is not a recipe: {error!s:.100}") from None


def _refuse_tricks(text: str, origin: str) -> None:
    """Aliases multiply what a short file holds, and brackets without end take the parser minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"recipe {origin} uses YAML aliases (*name); write the value out, or use base:")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"recipe {origin} is nested more than {MAX_DEPTH} deep; that is no recipe")


def _parse_json(text: str, origin: str) -> Any:
    """Not every JSON text is YAML to PyYAML: tabs and escaped emoji are not."""
    try:
        return _plain(json.loads(text), origin)
    except json.JSONDecodeError as error:
        raise UserError(f"recipe {origin} is not JSON at line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"recipe {origin} is nested more than {MAX_DEPTH} deep; that is no recipe") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"recipe {origin} is not a recipe: {error!s:.100}") from None


def _plain(value: Any, origin: str, path: tuple[str, ...] = ()) -> Any:
    """``value``, if it is what a recipe can be written back as; YAML knows dates, bytes and sets too."""
    where = f"{origin}: {'.'.join(path)}" if path else origin
    if len(path) > MAX_DEPTH:
        raise UserError(f"recipe {origin} is nested more than {MAX_DEPTH} deep; that is no recipe")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str) or not key.isprintable():
                raise UserError(f"{where}: the key {key!r:.60} is not plain text")
            _plain(inner, origin, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _plain(inner, origin, (*path, str(number)))
    elif isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{where}: an integer of {value.bit_length()} bits; at most 63 are read")
    elif isinstance(value, str) and LONG_NUMBER.fullmatch(value):  # a field of numbers would read it as one
        raise UserError(f"{where}: a number of {len(value.strip())} digits; at most 18 are read")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is no finite number")
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{where}: {value!r:.60} holds half a character (a lone surrogate)")
    elif value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where} is a {type(value).__name__}; write text in quotes")
    return value


def _inherit(values: dict[str, Any], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base.isprintable():
        raise UserError(f"{path}: base = {base!r:.60}: is the name of a recipe, or a file")
    under = _from_file(path.parent / base, (*above, path.resolve()))[0] if _is_file(base) else _shipped(base)
    return merged(under, {"name": path.stem.lower().replace("-", "_"), **values})


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, key by key; a part of another kind replaces the whole part."""
    if "kind" in over and over["kind"] != under.get("kind"):
        return over
    joined = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(joined.get(key), dict)
        joined[key] = merged(joined[key], value) if both else value
    return joined


def _with(values: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: write it as a.b=value")
    stages = values.get("stages")
    if values.get("kind") == "study" and isinstance(stages, dict) and parts[0] in stages:
        parts = ["stages", *parts]
    return _laid(values, parts, _parse(text, f"--set {override}"), override)


def _laid(values: Any, parts: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    """``value`` put at the end of the path ``parts``; only a mapping, or nothing yet, can be reached into."""
    if not isinstance(values, dict | None):
        raise UserError(f"--set {override}: there is nothing below {values!r:.60}")
    (key, *rest), joined = parts, dict(values or {})
    joined[key] = _laid(joined.get(key), rest, value, override) if rest else value
    return joined
