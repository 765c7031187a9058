"""Resumable state: safetensors and JSON in one folder that is there whole or not at all.

The data position and all randomness are functions of the step, so a step, tensors and the time spent are everything.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.files import folder_aside, read_json
from diffrep.training.optim import Ema
from diffrep.training.sharding import full, share_of

VERSION = 1
KEPT = 2  # the last good one and the one before


def save(
    folder: Path, step: int, method: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, note: dict[str, Any],
    writes: bool = True,
) -> Path:  # fmt: skip
    """Write ``folder/step-00000000`` and drop all but the last ``KEPT``; all processes call it, and one writes."""
    tensors, target = _state(method, optimizer, ema, writes), folder / f"step-{step:08d}"
    if not writes:
        return target
    with folder_aside(target) as aside:
        save_file(tensors, aside / "state.safetensors")
        (aside / "state.json").write_text(
            json.dumps({"version": VERSION, "step": step, **note}, indent=2, allow_nan=False) + "\n"
        )
    for old in [*_all(folder)[:-KEPT], *folder.glob(".step-*")]:  # the lock is ours: hidden ones are a killed writer's
        shutil.rmtree(old, ignore_errors=True)
    return target


def _state(
    method: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, kept: bool
) -> dict[str, Tensor]:  # fmt: skip
    """Copies of everything, whole; where it is not ``kept``, only its shares are given to those who keep it."""
    tensors = {f"method/{n}": t for n, t in method.state_dict().items()}
    names = {p: n for n, p in method.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optim/{key}/{names[parameter]}": v for key, v in state.items() if isinstance(v, Tensor)}
    if ema:
        tensors |= {f"ema/{n}": t for n, t in ema.mean.items()}
    wholes = ((n, full(t.detach())) for n, t in tensors.items())
    return {n: t.cpu().contiguous().clone() for n, t in wholes if kept}


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint; leftovers of a killed writer are not looked at."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, method: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """Restore everything in place and return the note (``step`` and what the trainer added).

    Raises:
        UserError: damaged file, or a checkpoint of other parts.
    """
    note = read_json(path / "state.json")
    version = note.get("version") if isinstance(note, dict) else None
    if version != VERSION:
        raise UserError(f"{path} was written by checkpoint format {version}; this diffrep reads {VERSION}")
    try:
        tensors = load_file(path / "state.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}): delete it to go on from the one before") from None
    _load_method(method, _part(tensors, "method/"), path)
    parameters = dict(method.named_parameters())
    for name, value in _part(tensors, "optim/").items():
        key, _, parameter = name.partition("/")
        target = parameters[parameter]
        # Adam counts its steps on the CPU wherever the weights are.
        optimizer.state[target][key] = value if key == "step" else share_of(value.to(target.device), target)
    if ema:
        for name, value in _part(tensors, "ema/").items():
            ema.mean[name].copy_(share_of(value, ema.mean[name]))
    return note


def _load_method(method: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = method.state_dict()
    try:
        method.load_state_dict({n: share_of(t, own[n]) if n in own else t for n, t in state.items()})
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this recipe ({str(error).splitlines()[-1].strip()})") from None


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
