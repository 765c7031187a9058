"""Weights of others under our names: dict in, dict out.

Read are the files of RepDistiller, FastDFKD, akamaster and DM-KD, whose networks are those of models/cifar.py, and
anything that already has the names wanted. A file may hold the weights plainly or under ``model``, ``state_dict`` or
``ema``, with DataParallel's ``module.`` before each name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffrep.errors import UserError
from diffrep.models import cifar

WRAPPERS = ("model", "state_dict", "ema")  # the first that is there is taken
COUNTER = "num_batches_tracked"  # of batch norm; older torch wrote none, and nothing is computed with it


def unwrap(checkpoint: Any, origin: str) -> dict[str, Tensor]:
    """The tensors by name, without what is wrapped around them.

    Raises:
        UserError: no mapping of names to tensors is in it.
    """
    for _ in WRAPPERS:  # each is looked into once: a pickle may hold itself
        checkpoint = next((c for c in _inside(checkpoint) if isinstance(c, Mapping)), checkpoint)
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise UserError(f"{origin} holds a {type(checkpoint).__name__} and no weights by name")
    strange = [str(name) for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if strange:
        where = ", ".join(WRAPPERS)
        raise UserError(f"{origin} holds {some(strange)} besides tensors, and no weights under {where}")
    state = {str(name): value for name, value in checkpoint.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _inside(checkpoint: Any) -> list[Any]:
    return [checkpoint.get(wrapper) for wrapper in WRAPPERS] if isinstance(checkpoint, Mapping) else []


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of CIFAR classifiers -> those of models/cifar.py; ours stay as they are."""
    return {_our_name(name): value for name, value in state.items()}


def _our_name(name: str) -> str:
    """Classifiers are called ``linear`` (akamaster, ResNet-18, ShuffleNets), ``classifier`` (VGG), ``classifier.0``."""
    name = re.sub(r"^(linear|classifier|classifier\.0)\.(weight|bias)$", r"fc.\2", name)
    return re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)


def fitted(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """``state`` under the names and in the order of ``wanted``, a network's own state dict.

    Raises:
        UserError: tensors are missing, left over or of another shape; they are listed.
    """
    found = {name: value for name, value in state.items() if name in wanted}
    for name, value in state.items():
        ours = _our_name(name)
        found[ours if ours in wanted and ours not in found else name] = value
    missing = [name for name in wanted if name not in found and not name.endswith(COUNTER)]
    left_over = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    parts = {"missing": missing, "left over": left_over, "of another shape": misshapen}
    wrong = [f"{len(names)} {what} ({some(names)})" for what, names in parts.items() if names]
    if wrong:
        raise UserError(f"{origin}: {'; '.join(wrong)}{_hint(state)}")
    return {name: found[name] if name in found else torch.zeros_like(value) for name, value in wanted.items()}


def whole(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """``state`` in the order of ``wanted``, whose names it has already.

    Raises:
        UserError: tensors that are missing, left over, of another shape, or no weights; they are counted and the
            first five of them named.
    """
    both = [name for name in wanted if name in state]
    parts = {
        "missing": [name for name in wanted if name not in state],
        "left over": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in both
            if state[name].shape != wanted[name].shape
        ],
        "no weights": [n for n in both if not state[n].is_floating_point() or state[n].layout != torch.strided],
    }
    if wrong := [f"{len(names)} {what} ({some(names, 5)})" for what, names in parts.items() if names]:
        raise UserError(f"{origin}: tensors do not fit: {'; '.join(wrong)}")
    return {name: state[name] for name in wanted}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, in one line."""
    names = [" ".join(name.split())[:60] for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _hint(state: Mapping[str, Tensor]) -> str:
    known = recognise(state)
    return f"; by its names it is {known}" if known else ""


@dataclass(frozen=True)
class Recognised:
    """A network of models/cifar.py that a state dict belongs to. doubt: what its names do not tell, else empty."""

    architecture: str
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    doubt: str = ""

    def __str__(self) -> str:
        with_options = f" with options {self.options}" if self.options else ""
        return f"{self.architecture}{with_options} of {self.num_classes} classes"


def recognise(state: Mapping[str, Tensor]) -> Recognised | None:
    """Which of our CIFAR classifiers has these names and widths; None where none has."""
    named = rename(state)
    if "fc.weight" not in named or named["fc.weight"].dim() != 2:
        return None
    stem = named.get("conv1.weight", torch.empty(0, 0, 0, 0)).shape
    for family in (_wide, _vgg, _light, _three_stages, _four_stages):
        known = family(named, tuple(stem))
        if known and known[0] in cifar.ENTRIES:
            name, options = known
            return Recognised(name, len(named["fc.weight"]), _with_channels(named, options), _doubt(name, state))
    return None


def _with_channels(named: Mapping[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    channels = next((value.shape[1] for value in named.values() if value.dim() == 4), 3)
    return options if channels == 3 else options | {"in_chans": channels}


def _doubt(name: str, state: Mapping[str, Tensor]) -> str:
    """Timm's names fit our ResNet-18 and DM-KD's, which has no ReLU behind the stem."""
    if name not in ("resnet18_cifar", "resnet34_cifar") or "fc.weight" not in state:
        return ""
    return f"its keys fit {name} with and without a ReLU behind the stem (DM-KD's has none): set options.stem_relu"


_Known = tuple[str, dict[str, Any]] | None


def _count(named: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand under ``prefix``."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in named if (match := pattern.match(name))})


def _wide(named: Mapping[str, Tensor], stem: tuple[int, ...]) -> _Known:
    first = named.get("block1.layer.0.conv1.weight")
    if first is None or first.dim() != 4:
        return None
    return f"wrn_{6 * _count(named, 'block1.layer') + 4}_{len(first) // 16}_cifar", {}


def _vgg(named: Mapping[str, Tensor], stem: tuple[int, ...]) -> _Known:
    counts = tuple(sum(f"block{i}.{3 * j}.weight" in named for j in range(9)) for i in range(5))
    return next(((f"vgg{depth}_cifar", {}) for depth, c in cifar.VGG_CONVOLUTIONS.items() if c == counts), None)


def _light(named: Mapping[str, Tensor], stem: tuple[int, ...]) -> _Known:
    if "blocks.0.0.conv.0.weight" in named:
        return "mobilenetv2_half_cifar", {}
    if stem[:1] + stem[2:] != (24, 1, 1):
        return None
    return ("shufflenetv2_cifar" if "layer1.0.conv5.weight" in named else "shufflenetv1_cifar"), {}


def _three_stages(named: Mapping[str, Tensor], stem: tuple[int, ...]) -> _Known:
    blocks = _count(named, "layer3")
    if not blocks or _count(named, "layer4"):
        return None
    is_padded = not any(".downsample." in name for name in named)
    wider = "x4" if stem[:1] == (32,) else ""
    return f"resnet{6 * blocks + 2}{wider}_cifar", {"shortcut": "pad"} if is_padded else {}


def _four_stages(named: Mapping[str, Tensor], stem: tuple[int, ...]) -> _Known:
    blocks = [_count(named, f"layer{i}") for i in (1, 2, 3, 4)]
    if blocks not in ([2, 2, 2, 2], [3, 4, 6, 3]) or stem[2:] != (3, 3):
        return None
    is_bottleneck = "layer1.0.conv3.weight" in named
    return f"resnet{18 if blocks[0] == 2 else 50 if is_bottleneck else 34}_cifar", {}
