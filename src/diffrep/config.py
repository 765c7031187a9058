"""The one base class of every typed setting, and the one line a refused setting prints.

A config class stands beside the class it configures; this page only fixes what all of them share:
frozen, no unknown keys, no silent repair, numbers finite.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from diffrep.errors import UserError, nearest

C = TypeVar("C", bound=BaseModel)


class Config(BaseModel):
    """Frozen, keyword-only settings; an unknown key or a wrong type is refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        strict=False,
        coerce_numbers_to_str=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """YAML reads yes, no, on and off as truth values; none of them is a number."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and bool not in _plain_types(field.annotation):
                raise ValueError(f"{name} = {value}: a truth value (true, false, yes, no, on, off) does not fit here")
        return values


def _plain_types(annotation: Any) -> set[Any]:
    inside = {t for arg in getattr(annotation, "__args__", ()) for t in _plain_types(arg)}
    return inside | {annotation} if isinstance(annotation, type) else inside | ({bool} if annotation is Any else set())


def validate(model: type[C], values: Any, origin: str) -> C:
    """Build ``model`` from plain values; every complaint becomes one :class:`UserError` line.

    ``origin`` names where the values stand (a recipe's name, a file), so that the line says where to look.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {' '.join(_first_complaint(model, error).split())}") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply to be a recipe") from None


def _first_complaint(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key explains a missing one: say it first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, beside = _walk(model, problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{path}'; {nearest(str(problem['loc'][-1]), beside)}{more}"
    if problem["type"] == "missing":
        return f"{path} is missing{more}"
    if not problem["loc"]:  # a rule about several settings, which its words name
        return f"{_plain(problem['msg'])}{more}"
    return f"{path} = {_shown(problem['input'])}: {_plain(problem['msg'])}{more}"


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("\n", " ").rstrip(".")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[str, list[str]]:
    """The dotted path a user would write, and the keys that are legal beside its last part.

    pydantic puts the tag of a union's member into the location; nobody writes that into a recipe.
    """
    here: list[type[BaseModel]] = [model]
    shown: list[str] = []
    beside: list[str] = []
    for part in location:
        beside = sorted({name for m in here for name in m.model_fields})
        owners = [m for m in here if part in m.model_fields]
        tagged = [m for m in here if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        if owners or not tagged:
            shown.append(str(part))
            here = [m for o in owners for m in _models_in(o.model_fields[part].annotation)] or here
        else:
            here = tagged
    return ".".join(shown) or "(the whole recipe)", beside


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]
