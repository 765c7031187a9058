"""Networks on disk: the student that a run of ours kept, and weight files that others wrote."""

from __future__ import annotations

import argparse
import io
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
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


def student_card(student: Student, licence: str | None = None) -> dict[str, Any]:
    """``config.json``: what timm needs to build the backbone and to prepare its images; diffrep reads ``student``."""
    backbone, config, size = student.backbone, student.config, student.image_size
    known = getattr(backbone, "pretrained_cfg", None) or {}
    mean, std = _per_channel(config)
    look: dict[str, Any] = {"mean": mean, "std": std, "interpolation": "bilinear", "crop_pct": 1.0}
    look |= {name: known[name] for name in ("first_conv", "classifier") if known.get(name)}
    look |= {"input_size": [len(mean), size, size]} if size else {}
    return {
        "architecture": config.name,
        "num_classes": getattr(backbone, "num_classes", 0),
        "num_features": getattr(backbone, "num_features", None),
        "model_args": config.options,
        "pretrained_cfg": look | ({"license": licence} if licence else {}),
        "student": config.model_dump(mode="json"),
    }


def _per_channel(config: StudentConfig) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel the network has.

    A grey network sees the mean over RGB of (x - mean)/std, which for a grey x is one such line too.
    """
    mean, std = ([*values] * (3 // len(values)) for values in (config.mean, config.std))
    if config.options.get("in_chans") != 1:
        return mean, std
    slope = fmean(1 / s for s in std)
    return [fmean(m / s for m, s in zip(mean, std, strict=True)) / slope], [1 / slope]


def shown_size(folder: Path) -> int | None:
    """Pixels per side of the images that a run trained on, where its card or its network (a ViT's) says so."""
    card = read_json(folder / "config.json")
    look, options = card.get("pretrained_cfg", {}), card.get("model_args", {})
    size = look["input_size"][-1] if "input_size" in look else options.get("img_size")
    return size if isinstance(size, int) else None


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


@dataclass(frozen=True)
class Fit:
    """How a file's tensors go with a network's, by name: ``print`` says it in one line."""

    matched: int  # tensors of one name and one shape
    missing: tuple[str, ...]  # in the network alone
    left_over: tuple[str, ...]  # in the file alone
    mismatched: tuple[str, ...]  # with both shapes behind the name
    new: tuple[str, ...]  # that the network keeps as they are: its classifier, and what was named

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.left_over or self.mismatched)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "left over": self.left_over, "mismatched": self.mismatched, "new": self.new}
        return ", ".join([f"matched {self.matched}", *(f"{what} {_named(names)}" for what, names in parts.items())])


def _named(names: tuple[str, ...], limit: int = 3) -> str:
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} ({shown})" if names else "none"


def compare(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], new: tuple[str, ...]) -> Fit:
    """A file's tensors beside a network's; names that begin with one of ``new`` need not be in both."""
    given = {name: value.shape for name, value in state.items() if not name.startswith(new)}
    own = {name: value.shape for name, value in wanted.items() if not name.startswith(new)}
    both = [name for name in own if name in given]
    return Fit(
        matched=sum(own[name] == given[name] for name in both),
        missing=tuple(name for name in own if name not in given),
        left_over=tuple(name for name in given if name not in own),
        mismatched=tuple(
            f"{name}: {tuple(given[name])} there, {tuple(own[name])} here" for name in both if own[name] != given[name]
        ),
        new=tuple(name for name in wanted if name not in own),
    )


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
