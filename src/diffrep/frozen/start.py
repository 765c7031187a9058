"""Where a student starts: the weights of another network, which is a finished run of ours or an ADDP network.

Loading is strict: what is missing or does not fit is an error. Whose labels and licence the weights carry goes along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.errors import UserError, nearest
from diffrep.files import read_json
from diffrep.frozen.tokens import CARD, held, read_network
from diffrep.models.addp_vit import MEAN, STD, timm_state
from diffrep.models.stored import Fit, compare
from diffrep.models.students import Student, StudentConfig
from diffrep.models.weights import read_weights


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


def begin(student: Student, init: str, skip: tuple[str, ...] = (), tokenizer_norm: bool | None = None) -> Start:
    """:func:`load_backbone`, with what is known of the place.

    Raises:
        UserError: as there.
    """
    place = Path(init)
    fit = load_backbone(student, place, skip, tokenizer_norm)
    is_run = (place / "result.json").exists()
    card = read_json(place / "result.json" if is_run else held(place)["addp"] / CARD)
    seen = card.get("labels_seen", {}) | card.get("labels_behind", {})
    behind = {f"before: {part}": count for part, count in seen.items()}
    return Start(fit, f"started from {init}: {fit}", card.get("licence"), behind)


def load_backbone(
    student: Student, run_dir: Path, skip: tuple[str, ...] = (), tokenizer_norm: bool | None = None
) -> Fit:
    """Start ``student`` from another network; only classifier, position table and last norm may differ.

    Args:
        run_dir: a finished run with a student, or a folder with an ADDP network.
        skip: names of further tensors that stay as ``student`` has them.
        tokenizer_norm: keep or drop the norm behind an ADDP encoder's embeddings; None: as the run exported it, and
            dropped where there is no run.

    Returns:
        what was taken over. A position table of another grid is resized first.

    Raises:
        UserError: nothing to start from, or a tensor is missing, left over or of another shape.
    """
    state, taught = _start(run_dir, tokenizer_norm)
    own = student.backbone.state_dict()
    if unknown := [name for name in skip if name not in own]:
        raise UserError(f"method.init_skip: {student.config.name} has no '{unknown[0]}'; {nearest(unknown[0], own)}")
    state = _on_grid(state, student.backbone)
    fit = compare(state, own, (_classifier_prefix(student.backbone), *_last_norms(state, own), *skip))
    if not fit.is_whole:
        there = "" if taught.name == student.config.name else f", a {taught.name},"
        raise UserError(f"method.init: {run_dir}{there} does not fit {student.config.name}: {fit}")
    for key in ("mean", "std"):
        if getattr(taught, key) != getattr(student.config, key):
            raise UserError(
                f"method.init: {run_dir} saw images with {key} {list(getattr(taught, key))}; "
                f"set method.student.{key} to it"
            )
    student.backbone.load_state_dict(own | {k: v for k, v in state.items() if k in own and k not in fit.new})
    return fit


def _start(run_dir: Path, tokenizer_norm: bool | None) -> tuple[dict[str, Tensor], StudentConfig]:
    """Tensors under timm's names, and how their network saw images."""
    is_run = (run_dir / "result.json").exists()
    has_addp = run_dir.is_dir() and "addp" in held(run_dir)
    if has_addp and (tokenizer_norm is not None or not is_run):
        network, card = read_network(str(run_dir), "addp")
        return timm_state(network, bool(tokenizer_norm)), StudentConfig(name=card["name"], mean=MEAN, std=STD)
    if not is_run:
        raise UserError(f"method.init: {run_dir} is no finished run (no result.json), and holds no ADDP network")
    card = read_json(run_dir / "config.json") if (run_dir / "config.json").exists() else {}
    if "student" not in card:
        raise UserError(f"method.init: {run_dir} is a run that kept no student")
    state = read_weights(run_dir / "weights.safetensors")
    return dict(state), StudentConfig.model_validate(card["student"])


def _on_grid(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """With the position table of images of another size, bicubic without antialiasing as the official code."""
    _torchvision_compat.install()
    from timm.layers import resample_abs_pos_embed

    table, own = state.get("pos_embed"), backbone.state_dict().get("pos_embed")
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if table is None or own is None or grid is None or table.shape[1] == own.shape[1]:
        return state
    prefix = own.shape[1] - grid[0] * grid[1]
    if math.isqrt(table.shape[1] - prefix) ** 2 != table.shape[1] - prefix:
        return state  # of no square image: compared as it is, and refused
    return state | {"pos_embed": resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix, antialias=False)}


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
