"""Where a student starts: the weights of another network.

A finished run of ours, an ADDP network, timm's own weights (``timm:NAME``) or a weights file of somebody else; of an
official distilled checkpoint the part ``student.backbone.`` is taken, whose names are timm's.
Loading is strict: what is missing or does not fit is an error. Whose labels and licence the weights carry goes along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json
from diffrep.frozen.classifier_sources import of_timm
from diffrep.frozen.tokens import CARD, held, read_network
from diffrep.models.addp_files import layout_of
from diffrep.models.addp_vit import MEAN, STD, timm_state
from diffrep.models.convert import unwrap
from diffrep.models.maps import resized
from diffrep.models.stored import Fit, compare, read_checkpoint
from diffrep.models.students import StudentConfig
from diffrep.models.weights import read_weights

DISTILLED = "student.backbone."  # before the names of a distilled network in RepFusion's own checkpoints
TIMM = "timm:"
UNKNOWN_LABELS = "which labels its weights have seen is not said there"


class Starting(Protocol):
    """A :class:`~diffrep.models.students.Student`, or what reads maps of one.

    It may say ``unneeded``: tensors that the whole network has and it does without; and ``fresh``: names, or how they
    begin, of what it has besides, and which always starts as it is.
    """

    config: StudentConfig

    @property
    def backbone(self) -> nn.Module: ...


@dataclass(frozen=True)
class Start:
    """What a student took over, and what travels with it.

    licence:       None where the place says nothing.
    labels_behind: labels that the weights have seen, by part.
    """

    fit: Fit
    note: str
    licence: str | None
    labels_behind: dict[str, int]


@dataclass(frozen=True)
class _Origin:
    """A network to start from. look: how it saw images, None where nobody said; told: what a user should know."""

    state: dict[str, Tensor]
    name: str = ""
    look: StudentConfig | None = None
    card: dict[str, Any] = field(default_factory=dict)
    told: tuple[str, ...] = ()


def begin(student: Starting, init: str, skip: tuple[str, ...] = (), tokenizer_norm: bool | None = None) -> Start:
    """:func:`load_backbone`, with what is known of the place.

    Raises:
        UserError: as there.
    """
    origin = _origin(init, tokenizer_norm)
    fit = _filled(student, origin, init, skip)
    unneeded = sorted(origin.state.keys() & set(getattr(student, "unneeded", ())))
    told = [f"started from {init}: {fit}", *origin.told]
    told += [f"{len(unneeded)} of its tensors are needed by no map ({unneeded[0]}, ...)"] if unneeded else []
    seen = origin.card.get("labels_seen", {}) | origin.card.get("labels_behind", {})
    behind = {f"before: {part}": count for part, count in seen.items()}
    return Start(fit, "; ".join(told), origin.card.get("licence"), behind)


def load_backbone(
    student: Starting, place: str | Path, skip: tuple[str, ...] = (), tokenizer_norm: bool | None = None
) -> Fit:
    """Start ``student`` from another network; only classifier, position table and last norm may differ.

    Args:
        place: see the page's first lines.
        skip: names of further tensors that stay as ``student`` has them.
        tokenizer_norm: keep or drop the norm behind an ADDP encoder's embeddings; None: as the run exported it, and
            dropped where there is no run.

    Returns:
        what was taken over. A position table of another grid is resized first.

    Raises:
        UserError: nothing to start from, or a tensor is missing, left over or of another shape.
    """
    return _filled(student, _origin(str(place), tokenizer_norm), str(place), skip)


def _filled(student: Starting, origin: _Origin, init: str, skip: tuple[str, ...]) -> Fit:
    backbone, unneeded = student.backbone, getattr(student, "unneeded", ())
    own = backbone.state_dict()
    if unknown := [name for name in skip if name not in own]:
        raise UserError(f"method.init_skip: {student.config.name} has no '{unknown[0]}'; {nearest(unknown[0], own)}")
    state = {name: value for name, value in _on_grid(origin.state, backbone).items() if name not in unneeded}
    afresh = (_classifier_prefix(backbone), *_last_norms(state, own), *getattr(student, "fresh", ()), *skip)
    fit = compare(state, own, afresh)
    if not fit.is_whole:
        there = f", a {origin.name}," if origin.name not in ("", student.config.name) else ""
        raise UserError(f"method.init: {init}{there} does not fit {student.config.name}: {fit}")
    for key in ("mean", "std") if origin.look else ():
        if getattr(origin.look, key) != getattr(student.config, key):
            raise UserError(
                f"method.init: {init} saw images with {key} {list(getattr(origin.look, key))}; "
                f"set method.student.{key} to it"
            )
    backbone.load_state_dict(own | {k: v for k, v in state.items() if k in own and k not in fit.new})
    return fit


# Places


def _origin(init: str, tokenizer_norm: bool | None) -> _Origin:
    """Tensors under timm's names, and what is known of them."""
    if init.startswith(TIMM):
        return _of_timm(init.removeprefix(TIMM))
    place = located(init)
    if place.is_file():
        return _of_file(place, bool(tokenizer_norm))
    is_run = (place / "result.json").exists()
    has_addp = place.is_dir() and "addp" in held(place)
    card = read_json(place / "result.json" if is_run else held(place)["addp"] / CARD) if is_run or has_addp else {}
    if has_addp and (tokenizer_norm is not None or not is_run):
        return _of_addp(str(place), bool(tokenizer_norm), card)
    if not is_run:
        raise UserError(
            f"method.init: {init} is no finished run (no result.json), and holds no ADDP network; "
            "valid besides: a weights file, timm:NAME"
        )
    look = read_json(place / "config.json") if (place / "config.json").exists() else {}
    if "student" not in look:
        raise UserError(f"method.init: {init} is a run that kept no student")
    student = StudentConfig.model_validate(look["student"])
    return _Origin(dict(read_weights(place / "weights.safetensors")), student.name, student, card)


def _of_addp(reference: str, tokenizer_norm: bool, card: dict[str, Any]) -> _Origin:
    network, said = read_network(reference, "addp")
    look = StudentConfig(name=said["name"], mean=MEAN, std=STD)
    return _Origin(timm_state(network, tokenizer_norm), look.name, look, card)


def _of_file(path: Path, tokenizer_norm: bool) -> _Origin:
    """A weights file that others wrote, with or without a network around the one that is wanted."""
    state = unwrap(read_checkpoint(path), str(path))
    inner = {name.removeprefix(DISTILLED): value for name, value in state.items() if name.startswith(DISTILLED)}
    if inner:
        part = f"{DISTILLED}* are {len(inner)} of its {len(state)} tensors"
        return _Origin(inner, told=(part, UNKNOWN_LABELS))
    if layout_of(state) == "addp":
        return _of_addp(str(path), tokenizer_norm, {})
    return _Origin(state, told=(UNKNOWN_LABELS,))


def _of_timm(name: str) -> _Origin:
    found = of_timm(name, {})
    state = found.trained(found.num_classes or 0).state_dict()
    look = StudentConfig(name=name, mean=found.mean, std=found.std) if found.mean and found.std else None
    return _Origin(state, name, look, {"licence": found.licence}, (UNKNOWN_LABELS,))


# Differences that are none


def _on_grid(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """With the position table of images of another size, bicubic without antialiasing as the official code."""
    table, own = state.get("pos_embed"), backbone.state_dict().get("pos_embed")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if table is None or own is None or grid is None:
        return state
    prefix = own.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, table.shape[1] - prefix))
    if side**2 != table.shape[1] - prefix or (side, side) == tuple(grid):
        return state  # the same, or of no square image: compared as it is, and refused
    return state | {"pos_embed": resized(table, (side, side), (grid[0], grid[1]), prefix)}


def _last_norms(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The norm behind a ViT's blocks starts afresh where pooling differs: it has another name, and other inputs."""
    norms = ("norm.", "fc_norm.")

    def found(tensors: Mapping[str, Tensor]) -> set[str]:
        return {norm for norm in norms for name in tensors if name.startswith(norm)}

    is_vit = any(name.startswith("blocks.") for name in own)
    return norms if is_vit and found(state) != found(own) else ()


def _classifier_prefix(backbone: nn.Module) -> str:
    classifier = backbone.get_classifier()
    return next((f"{n}." for n, m in backbone.named_modules() if m is classifier and n), "\0")
