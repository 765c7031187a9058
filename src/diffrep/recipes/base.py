"""A recipe is a value: data, method, optimiser, training, evaluation, and the published number it aims at.

Three spellings of one thing: a Python function in this room, a YAML or JSON file of the user's, and ``a.b=value``
overrides. All three pass through :func:`load`, before any data, weights or network is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from diffrep.config import Config, validate
from diffrep.data.datasets import DataConfig
from diffrep.errors import UserError, nearest
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.evaluation.sweep import SweepConfig
from diffrep.files import short_hash
from diffrep.frozen.features import FeatureConfig
from diffrep.methods.denoiser import DenoiserConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.repfusion import RepFusionConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.trainer import TrainConfig

FORMAT = 1  # of recipe files; a file of another format is refused
NAME = r"^[a-z][a-z0-9_]{0,79}$"

MethodConfig = Annotated[RepFusionConfig | FinetuneConfig | DenoiserConfig, Field(discriminator="kind")]


class Published(Config):
    """A number in a paper, with its source; ``value`` None means looked for and not found."""

    value: float | None
    metric: str  # e.g. "top-1 %, CIFAR-10 test"
    source: str  # paper, table, row; or where it was looked for


class Ours(Config):
    """A number this recipe gave, with the command and seeds that made it."""

    value: float
    spread: float  # standard deviation over the seeds
    seeds: int
    metric: str
    command: str


class Task(Config):
    """What all stages share."""

    kind: str
    format: int = FORMAT
    name: str = Field(pattern=NAME)  # <road>_<data>_<student>
    about: str = ""  # one sentence for `diffrep recipes`
    seed: int = Field(0, ge=0)  # of everything that is drawn

    @field_validator("format")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"the recipe is of format {value}; this diffrep reads format {FORMAT}")
        return value


class Listed(Task):
    """What the ledger says of a recipe or study."""

    published: Published | None = None
    ours: Ours | None = None
    assumed: tuple[str, ...] = ()  # settings that the source does not state
    needs: tuple[str, ...] = ()  # "weights: ..." or "data: ..." that do not come with the package


class Recipe(Listed):
    """One training run, complete."""

    kind: Literal["recipe"] = "recipe"
    data: DataConfig
    method: MethodConfig
    optim: OptimConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        labels, counts = self.data.labels, self.evaluate.probe_labels
        if labels and isinstance(self.method, RepFusionConfig) and self.method.timestep.select == "policy":
            few = [n for n in counts if n < labels]
            if few:
                seen = f"the policy sees {labels} labels (data.labels)"
                raise ValueError(
                    f"{seen}, so a probe with {few[0]} (evaluate.probe_labels) would not be a few-label score"
                )
        if self.method.kind == "repfusion" and self.method.features and self.method.timestep.select == "range":
            raise ValueError(
                "method.features replays a list of timesteps; timestep.select 'range' needs the teacher itself"
            )
        return self


class FeatureTask(Task):
    """Write a teacher's features to a folder (`diffrep features`)."""

    kind: Literal["features"] = "features"
    teacher: str
    data: DataConfig
    split: Literal["train", "validation", "test"] = "train"
    features: FeatureConfig


class SweepTask(Task):
    """Probe a teacher at many taps and timesteps (`diffrep probe`)."""

    kind: Literal["probe"] = "probe"
    teacher: str
    data: DataConfig
    sweep: SweepConfig


Stage = Annotated[Recipe | FeatureTask | SweepTask, Field(discriminator="kind")]


class Study(Listed):
    """A recipe of recipes: named stages that refer to each other's outputs as ``stage:NAME``."""

    kind: Literal["study"] = "study"
    seeds: tuple[int, ...] = Field((0,), min_length=1)  # every stage runs once per seed
    # In order: a stage refers to earlier ones only. The names become folders, so they are plain words.
    stages: dict[Annotated[str, Field(pattern=NAME)], Stage] = Field(min_length=1)
    arms: dict[str, str] = {}  # what the stages compared in the table are called there, in order
    headline: str | None = None  # the score the table is about
    next_commands: tuple[str, ...] = ()  # what a reader may try next

    @model_validator(mode="after")
    def _fits(self) -> Study:
        earlier: set[str] = set()
        for name, stage in self.stages.items():
            for needed in references(stage):
                if needed not in earlier:
                    known = ", ".join(sorted(earlier)) or "none"
                    raise ValueError(f"stage '{name}' refers to 'stage:{needed}'; earlier stages: {known}")
            earlier.add(name)
        unknown = [arm for arm in self.arms if arm not in earlier]
        if unknown:
            raise ValueError(f"arms names '{unknown[0]}', which is no stage; {nearest(unknown[0], earlier)}")
        return self


STAGE = "stage:"


def references(stage: Task) -> list[str]:
    """The stages that ``stage`` takes something from, each once."""
    found = [text.split(STAGE, 1)[1] for text in _strings(stage.model_dump(mode="json")) if _refers(text)]
    return list(dict.fromkeys(found))


def _refers(text: str) -> bool:
    return text.removeprefix("random:").startswith(STAGE)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def replace_strings(value: Any, change: dict[str, str]) -> Any:
    """``value`` (plain JSON) with each ``stage:NAME`` of ``change`` replaced, also behind ``random:``."""
    if isinstance(value, str):
        head, mark, name = value.rpartition(STAGE)
        return head + change[mark + name] if mark and mark + name in change and head in ("", "random:") else value
    if isinstance(value, Mapping):
        return {k: replace_strings(v, change) for k, v in value.items()}
    return [replace_strings(v, change) for v in value] if isinstance(value, list) else value


def recipe_hash(task: Task) -> str:
    """Eight hex digits over everything that can change a result: not the seed, the name or what is said about it.

    Settings at their default are left out, so a setting that a later version adds leaves older results valid.
    """
    silent = {
        "name",
        "about",
        "seed",
        "published",
        "ours",
        "assumed",
        "needs",
        "arms",
        "headline",
        "next_commands",
        "seeds",
    }
    return short_hash({k: v for k, v in _telling(task).items() if k not in silent})


def _telling(value: Any) -> Any:
    """Plain JSON of a config without what stands at its default; ``kind`` always stays."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        kept = {k: v for k, v in value if k == "kind" or v != fields[k].get_default(call_default_factory=True)}
        return {k: _telling(v) for k, v in kept.items()}
    if isinstance(value, Mapping):
        return {k: _telling(v) for k, v in value.items()}
    return [_telling(v) for v in value] if isinstance(value, list | tuple) else value


def to_yaml(task: Task) -> str:
    """The resolved recipe, ready to be edited; loading it gives an equal value."""
    return yaml.safe_dump(task.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load(reference: str, overrides: Sequence[str] = (), allow_code: bool = False) -> Recipe | Study:
    """A recipe or study from a shipped name or a YAML / JSON file, with ``a.b=value`` overrides.

    In a study an override may begin with the name of a stage: ``STAGE.a.b=value``.

    Raises:
        UserError: unknown name, unreadable file, unknown key, wrong value, foreign code without ``allow_code``.
    """
    values, origin = _from_file(Path(reference)) if _is_file(reference) else (_shipped(reference), reference)
    for override in overrides:
        values = _with(values, override)
    kind = values.get("kind", "recipe")
    if kind not in ("recipe", "study"):
        raise UserError(f"{origin}: kind = {kind!r:.60}: valid: recipe, study")
    task: Recipe | Study = validate(Study, values, origin) if kind == "study" else validate(Recipe, values, origin)
    foreign = [text for text in _strings(task.model_dump(mode="json")) if text.startswith("python:")]
    if foreign and not allow_code:
        raise UserError(f"{origin}: '{foreign[0]}' runs foreign code; if you trust it, say --allow-code")
    return task


def _is_file(reference: str) -> bool:
    return reference.endswith((".yaml", ".yml", ".json"))


def _shipped(name: str) -> dict[str, Any]:
    from diffrep.recipes import RECIPES

    if name not in RECIPES:
        raise UserError(f"no recipe '{name}'; {nearest(name, RECIPES)} (a recipe of yours ends in .yaml or .json)")
    return RECIPES[name]().model_dump(mode="json")


MAX_FILE_BYTES = 1 << 20
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
