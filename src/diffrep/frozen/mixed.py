"""A learned mix of a teacher's taps and timesteps as a teacher of its own, with one tap: ``descriptor``.

A run of ``methods/mixing.py`` keeps the mix alone; the teacher it reads is named in it and opened again.
Letters: T timesteps, B images, C channels of a tap, D width of the descriptor, g cells of its grid per side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffrep import counting
from diffrep.config import validate
from diffrep.errors import UserError, nearest
from diffrep.files import folder_aside, located, read_json, write_json
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig, running
from diffrep.frozen.references import SourceOptions
from diffrep.models.convert import fitted
from diffrep.models.mixing import Mix, MixConfig, on_grid
from diffrep.models.weights import read_weights, write_weights
from diffrep.randomness import Rows
from diffrep.taps import Tap

MIX = "mix"  # the folder inside a run folder of methods/mixing.py
DESCRIPTOR = "descriptor"


class MixCard(MixConfig):
    """``mix/config.json``."""

    teacher: str  # as the recipe named it
    teacher_sha256: str  # of its weights when the mix was learned


class MixReader:
    """The maps that a mix is made of: one pass of the teacher per timestep gives all taps.

    Raises:
        UserError: an unknown tap or one without a map, a timestep the teacher does not have.
    """

    def __init__(self, teacher: DiffusionTeacher, config: MixConfig) -> None:
        self.teacher, self.config = teacher, config
        shapes = {name: teacher.tap(name).shape for name in config.taps}
        if flat := [name for name, shape in shapes.items() if len(shape) != 3]:
            raise UserError(f"taps: '{flat[0]}' of {teacher.name} returns {shapes[flat[0]]}, not a map (C, h, w)")
        steps = torch.tensor(config.timesteps)
        teacher.checked_timestep(steps, steps)
        self.channels = [shape[0] for shape in shapes.values()]

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1], fed as they are -> (T, B, C, g, g) float32 without gradient, one per tap."""
        seen = [self.teacher.features(images, t, self.config.taps) for t in self.config.timesteps]
        return [torch.stack([on_grid(found[tap], self.config.grid) for found in seen]) for tap in self.config.taps]

    def shapes(self, images: int) -> list[Tensor]:
        """Maps on the meta device."""
        count, grid = len(self.config.timesteps), self.config.grid
        return [torch.zeros(count, images, c, grid, grid, device="meta") for c in self.channels]

    def multiply_adds(self) -> int:
        """Of the teacher's passes, per image."""
        return len(self.config.timesteps) * max(self.teacher.multiply_adds(tap) for tap in self.config.taps)


class MixedTeacher(DiffusionTeacher):
    """The clean image -> its descriptor (B, D, g, g), the same at whatever timestep it is asked for."""

    takes_noise = False

    def __init__(self, teacher: DiffusionTeacher, config: MixConfig, name: str, labels_seen: dict[str, int]) -> None:
        self.reader, self.teacher = MixReader(teacher, config), teacher
        self.mix = Mix(config, self.reader.channels)
        super().__init__(
            nn.ModuleDict({"network": teacher.module, DESCRIPTOR: self.mix}),
            name,
            teacher.image_size,
            teacher.in_channels,
            schedule=teacher.schedule,
            prediction=DESCRIPTOR,
            licence=teacher.licence,
            labels_seen=labels_seen,
        )

    @cached_property
    def sha256(self) -> str:
        """Of the mix and of all that the teacher's own hash is of."""
        return hashlib.sha256(f"{super().sha256}{self.teacher.sha256}".encode()).hexdigest()

    def features(
        self,
        images: Tensor,
        timestep: int | Tensor,
        taps: Sequence[str],
        noise: Literal["forward"] | None = None,
        labels: Tensor | None = None,
        rng: Rows | None = None,
    ) -> dict[str, Tensor]:
        """As :meth:`DiffusionTeacher.features`; a mix was learned on clean images, of no class it was told."""
        for tap in taps:
            self.tap(tap)
        self.checked_timestep(timestep, images)
        self.check_noise(noise)
        if labels is not None:
            raise UserError(f"{self.name} mixes features of no named class: leave out labels")
        self.follow(images)
        with torch.no_grad():
            maps = self.reader.maps(images)
            with running(self.passes, images.device):
                return {DESCRIPTOR: self.mix(maps).float()}

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        grid, width = self.reader.config.grid, self.reader.config.width
        return {DESCRIPTOR: Tap(DESCRIPTOR, (width, grid, grid), max(self.image_size // grid, 1))}

    def tap(self, name: str) -> Tap:
        """The one there is."""
        if name not in self._taps:
            raise UserError(f"tap '{name}' does not exist in {self.name}, a mix; {nearest(name, self._taps)}")
        return self._taps[name]

    def run_as(self, passes: PassConfig) -> None:
        """As :meth:`DiffusionTeacher.run_as`, of the teacher's passes and of the mix."""
        super().run_as(passes)
        self.teacher.run_as(passes)

    def keep_only(self, taps: Sequence[str]) -> None:
        """As :meth:`DiffusionTeacher.keep_only`: of the teacher what its own taps need."""
        _ = self.sha256
        self.teacher.keep_only(self.reader.config.taps)
        self.kept = tuple(taps)

    def multiply_adds(self, tap: str | None = None) -> int:
        """Counted multiply-adds for one image, all timesteps together."""
        mixing = counting.multiply_adds(counting.on_meta(self.mix, self.reader.shapes(1)))
        return self.reader.multiply_adds() + mixing

    def peak_bytes(self, taps: Sequence[str]) -> int:
        """Most bytes that one image holds at once in a pass of the teacher."""
        return self.teacher.peak_bytes(self.reader.config.taps)

    def predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """Refused: a descriptor is no noise."""
        raise UserError(f"{self.name} mixes features and predicts nothing: draw with the teacher it reads")


# From files


def write_mix(run_dir: Path, mix: Mix, card: MixCard) -> None:
    """The mix's own weights, and what is needed to open the teacher it reads."""
    with folder_aside(run_dir / MIX) as folder:
        write_weights(folder / "weights.safetensors", mix.state_dict())
        write_json(folder / "config.json", card.model_dump(mode="json"))


def is_mix(place: str) -> bool:
    """Whether a finished run of ``methods/mixing.py`` is there."""
    folder = located(place)
    return (folder / MIX / "config.json").is_file() and (folder / "result.json").is_file()


def load_mix(place: str, options: SourceOptions, load_teacher: Callable[[str], DiffusionTeacher]) -> MixedTeacher:
    """The mix of a run folder, over its teacher, which ``load_teacher`` opens.

    Raises:
        UserError: the teacher is not there or has other weights than it had; a damaged or unfitting file.
    """
    options.only((), f"{place}, a mix,")
    folder = located(place)
    card = validate(MixCard, read_json(folder / MIX / "config.json"), str(folder / MIX / "config.json"))
    result = read_json(folder / "result.json")
    try:
        teacher = load_teacher(card.teacher)
    except UserError as error:
        raise UserError(f"{place} mixes features of {card.teacher}, which cannot be opened: {error}") from None
    if teacher.sha256 != card.teacher_sha256:
        raise UserError(f"{place} mixes features of {card.teacher}, which has other weights now: run its recipe again")
    seen = result.get("labels_seen", {}) | result.get("labels_behind", {})
    mixed = MixedTeacher(teacher, card, result.get("name", folder.name), seen)
    weights = folder / MIX / "weights.safetensors"
    mixed.mix.load_state_dict(fitted(read_weights(weights), mixed.mix.state_dict(), f"{weights} does not fit its mix"))
    return mixed
