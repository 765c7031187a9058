"""A diffusion model that knows clean images alone: its features have neither a timestep to choose nor noise to draw.

What :mod:`diffrep.methods.clean_input` trains. The folder holds the weights of a copy, under the names of the original
network, and a card that says which network that was: the original builds the architecture, and its VAE or prompt.

FOLDER/weights.safetensors
FOLDER/extractor.json

Letters: B images, C channels, T timesteps.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffrep import taps
from diffrep.config import Config, validate
from diffrep.errors import UserError
from diffrep.files import located, read_json, write_json
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.dit import RAW, DiTTeacher
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.references import SourceOptions
from diffrep.models.convert import fitted
from diffrep.models.weights import read_weights, write_weights
from diffrep.randomness import Rows
from diffrep.taps import Tap

WEIGHTS, CARD = "weights.safetensors", "extractor.json"


# Reading a copy, with gradients


def read_copy(
    teacher: DiffusionTeacher, network: nn.Module, x: Tensor, timestep: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """What ``teacher.features`` would give if ``network`` stood in its module's place; gradients flow.

    Args:
        network: a copy of the teacher's module.
        x: (B, C, h, w), in the network's own range (``teacher.normalise``).
        timestep: (B,), whole numbers or fractions; the same for all images where it is learnt.
        names: taps of the teacher.
    """
    twin = copy.copy(teacher)  # what is known of taps and inputs is shared
    twin.module, twin.passes = network, teacher.passes.model_copy(update={"compile": False})
    found, told = [twin.tap(name) for name in names], twin._keywords(None, x)
    if not x.is_meta:
        return twin._part(x, timestep, told, slice(None), found)
    modules = {name: name.removesuffix(RAW) for name in names}  # only counted: autocast knows no meta device
    read = taps.read(network, lambda: network(x, timestep, **told), [twin.tap(m) for m in set(modules.values())])
    return {name: read[module] for name, module in modules.items()}


def check_learnable(teacher: DiffusionTeacher, x: Tensor, names: Sequence[str], timestep: int) -> None:
    """Refuse a network whose timestep cannot be a fraction that is learnt: one real pass, and the gradient it leaves.

    Args:
        x: (1, C, h, w), as for :func:`read_copy`.
    """
    if isinstance(teacher, CleanTeacher):
        raise UserError(f"method.teacher {teacher.name} is an extractor; valid: its original, {teacher.card.original}")
    time = torch.full((1,), float(timestep), requires_grad=True)
    try:
        total = torch.stack([f.sum() for f in read_copy(teacher, teacher.module, x, time, names).values()]).sum()
        reached = torch.autograd.grad(total, time, allow_unused=True)[0] if total.requires_grad else None
    except (RuntimeError, IndexError, TypeError) as error:
        why = f"it stops at one ({' '.join(str(error).split())[:120]})"
        raise UserError(_not_learnable(teacher, why)) from None
    if reached is None:
        raise UserError(_not_learnable(teacher, f"what it holds at {', '.join(names)} does not depend on it"))


def _not_learnable(teacher: DiffusionTeacher, why: str) -> str:
    told = "the extractor learns its timestep, so the network must read fractions and pass on their gradient"
    return f"method.teacher {teacher.name}: {told}; {why}"


# The teacher


class ExtractorCard(Config):
    """``extractor.json``."""

    original: str  # reference of the network it is a copy of
    original_sha256: str
    licence: str
    timestep: float  # as it was learnt
    taps: tuple[str, ...]  # where it was trained
    massive: dict[str, tuple[int, ...]] = {}  # channels of a DiT's blocks, as its original found them


class CleanTeacher(DiffusionTeacher):
    """The original with the copy's weights in it, told one learnt timestep whatever it is asked for.

    Its taps are those of the original; the ones it was trained at are ``card.taps``.
    """

    takes_noise = False

    def __init__(self, original: DiffusionTeacher, card: ExtractorCard, name: str) -> None:
        super().__init__(
            original.module,
            name,
            original.image_size,
            original.in_channels,
            original.schedule,
            original.num_classes,
            original.prediction,
            card.licence,
            labels_seen=original.labels_seen,
            null_class=original.null_class,
        )
        self.original, self.card = original, card
        self.module.register_forward_pre_hook(_Told(card.timestep))

    @cached_property
    def sha256(self) -> str:
        """Of the copy, its timestep, and the original with what belongs to it (VAE, prompt)."""
        text = f"{super().sha256}{self.card.timestep}{self.card.original_sha256}"
        return hashlib.sha256(text.encode()).hexdigest()

    def features(
        self,
        images: Tensor,
        timestep: int | Tensor,
        taps: Sequence[str],
        noise: Literal["forward"] | None = None,
        labels: Tensor | None = None,
        rng: Rows | None = None,
    ) -> dict[str, Tensor]:
        """As :meth:`DiffusionTeacher.features`; every ``timestep`` in [0, T) gives the same.

        Raises:
            UserError: as there, and ``noise`` that is not None.
        """
        self.check_noise(noise)
        return self.original.features(images, timestep, taps, labels=labels)

    def predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """Refused: nothing was asked of what the copy returns at its end."""
        raise UserError(f"{self.name} gives features of clean images and draws none; {self.card.original} draws")

    def normalise(self, images: Tensor) -> Tensor:
        return self.original.normalise(images)

    def run_as(self, passes: PassConfig) -> None:
        self.passes = passes
        self.original.run_as(passes)

    def keep_only(self, taps: Sequence[str]) -> None:
        _ = self.sha256  # of all weights: asked while they are there
        self.original.keep_only(taps)
        self.kept = self.original.kept

    def multiply_adds(self, tap: str | None = None) -> int:
        return self.original.multiply_adds(tap)

    def peak_bytes(self, taps: Sequence[str]) -> int:
        return self.original.peak_bytes(taps)

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        return self.original._taps


class _Told:
    """A forward pre-hook: in the timestep's place the network reads a constant."""

    def __init__(self, timestep: float) -> None:
        self.timestep = timestep

    def __call__(self, _network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, _, *others = inputs
        return x, torch.full((len(x),), self.timestep, device=x.device), *others


# Files


def write_extractor(folder: Path, network: nn.Module, card: ExtractorCard) -> None:
    """The card comes last: where it is, the extractor is whole."""
    write_weights(folder / WEIGHTS, network.state_dict())
    write_json(folder / CARD, card.model_dump(mode="json"))


def is_extractor(place: str) -> bool:
    """Whether :func:`write_extractor` filled this folder."""
    return (located(place) / CARD).is_file()


def load_extractor(place: str, options: SourceOptions, load: Callable[[str], DiffusionTeacher]) -> CleanTeacher:
    """The extractor in a folder.

    Args:
        load: opens a teacher by its reference; its original is asked for.

    Raises:
        UserError: an original that is not where it was or not what it was, a damaged card, weights that do not fit.
    """
    options.only((), f"{place}, a clean-input extractor,")
    folder = located(place)
    card = validate(ExtractorCard, read_json(folder / CARD), str(folder / CARD))
    original = _original(folder, card, load)
    state = fitted(read_weights(folder / WEIGHTS), original.module.state_dict(), str(folder / WEIGHTS))
    original.module.load_state_dict(state)
    if isinstance(original, DiTTeacher):
        original.massive |= {block: list(channels) for block, channels in card.massive.items()}
    return CleanTeacher(original, card, folder.name)


def _original(folder: Path, card: ExtractorCard, load: Callable[[str], DiffusionTeacher]) -> DiffusionTeacher:
    try:
        original = load(card.original)
    except UserError as error:
        raise UserError(f"{folder} is a trained copy of {card.original}, which has to be there: {error}") from None
    if original.sha256 != card.original_sha256:
        raise UserError(f"{folder} is a trained copy of {card.original}, whose weights are others now: train it again")
    del original.sha256  # of the weights it had
    return original
