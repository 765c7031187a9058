"""Networks on disk: the student that a run of ours kept, and weight files that others wrote."""

from __future__ import annotations

import argparse
import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.config import validate
from diffrep.errors import UserError, nearest
from diffrep.files import read_json, write_atomic
from diffrep.models import convert
from diffrep.models.students import Student, StudentConfig
from diffrep.models.weights import read_weights

PICKLES = (".pt", ".pth", ".th", ".ckpt")
HARMLESS = [argparse.Namespace]  # settings that many training scripts keep beside their weights: a holder of values


def fresh_student(folder: Path) -> Student:
    """The network that ``folder/config.json`` describes, without its weights.

    Raises:
        UserError: no such file, or one that diffrep did not write.
    """
    card = read_json(folder / "config.json")
    if not isinstance(card, dict) or "student" not in card:
        raise UserError(f"{folder / 'config.json'} was not written by diffrep (no 'student' in it)")
    config = validate(StudentConfig, card["student"], str(folder / "config.json"))
    return Student(config, card.get("num_classes") or 0)


def load_student(weights: Path) -> Student:
    """The student whose backbone a weights file holds; its ``config.json`` stands beside it.

    Raises:
        UserError: a damaged file, or weights that do not fit their config.
    """
    student = fresh_student(weights.parent)
    what = f"{weights} does not fit {student.config.name}"
    student.backbone.load_state_dict(convert.fitted(read_weights(weights), student.backbone.state_dict(), what))
    return student


def read_checkpoint(path: Path) -> Any:
    """Whatever a safetensors file or a pickle of tensors holds; nothing in it is run.

    Raises:
        UserError: another kind of file, a damaged one, or a pickle that wants to run code.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    if path.suffix not in PICKLES:
        raise UserError(f"{path} is no weights file; {nearest(path.suffix, ['.safetensors', *PICKLES])}")
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
            # Mapped, not read: what nobody asks for stays on the disk. Files older than torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged pickle raises whatever it likes
        why = "it is damaged, or a pickle that wants to run code; nothing of it was run"
        raise UserError(f"{path} cannot be loaded: {why}") from None


def write_checkpoint(path: Path, state: Mapping[str, Tensor], wrapper: str | None = None) -> None:
    """``{wrapper: {name: tensor}}``, or plain, as the file that official code loads; nothing but tensors is in it."""
    content = io.BytesIO()
    torch.save({wrapper: dict(state)} if wrapper else dict(state), content)
    write_atomic(path, content.getvalue())
