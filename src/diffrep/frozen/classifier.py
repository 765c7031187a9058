"""A frozen classifier asked for its opinion: images -> logits.

Letters: B images, K classes. Images come in [0, 1]; the teacher normalises with its own mean and std.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from diffrep import counting
from diffrep.config import Config
from diffrep.errors import UserError
from diffrep.frozen import classifier_sources as sources
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.files import foreign_factory
from diffrep.models.students import unreserved
from diffrep.randomness import seeded

Triple = tuple[float, float, float]


class ClassifierConfig(Config):
    """Which classifier teaches, and how it sees an image."""

    # A run folder of ours, a weights file, timm:NAME, torchvision:NAME or python:MODULE:FACTORY;
    # random: before any but the last is the same network untrained.
    reference: str
    architecture: str | None = None  # of a weights file: a timm name or torchvision:NAME; None = told by its keys
    options: dict[str, Any] = {}  # of that architecture, e.g. {"shortcut": "pad"}
    num_classes: int | None = Field(None, ge=1)  # None = what the reference knows
    mean: Triple | None = None  # subtracted from images in [0, 1], per channel; None = what the reference knows
    std: Triple | None = None  # then divided by, per channel

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return unreserved(options)

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Triple | None) -> Triple | None:
        if std and min(std) <= 0:
            raise ValueError("must be above 0")
        return std


class ClassifierTeacher(FrozenModule):
    """Any network of images that returns logits.

    module:      (B, C, H, W), normalised -> (B, K).
    mean, std:   three values, or one for all channels.
    image_size:  pixels it was trained at; None where nobody said.
    in_chans:    3, or 1 for a network of grey images (it gets the mean of the normalised channels).
    labels_seen: how many labels its training read, by part, where a run of ours says so.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int | None = None,
        in_chans: int = 3,
        licence: str = "unknown",
        labels_seen: dict[str, int] | None = None,
    ) -> None:
        super().__init__(module, name, licence)
        self.num_classes, self.image_size, self.in_chans = num_classes, image_size, in_chans
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.labels_seen = labels_seen or {}

    def follow(self, tensor: Tensor) -> None:
        super().follow(tensor)
        if self.mean.device != tensor.device:
            self.mean, self.std = self.mean.to(tensor.device), self.std.to(tensor.device)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H, W) as the network was trained on them."""
        x = (images - self.mean) / self.std
        return x.mean(1, keepdim=True) if self.in_chans == 1 else x

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K) float32.

        Whether it takes a size at all, :meth:`multiply_adds` tells beforehand.

        Raises:
            UserError: what comes back is no logits.
        """
        self.follow(images)
        return self._checked(self.module(self.normalise(images)), len(images)).float()

    def multiply_adds(self, image_size: int) -> int:
        """Counted multiply-adds for one image.

        Raises:
            UserError: the network does not take images of this size, or returns no logits.
        """
        run = counting.on_meta(self.module, torch.zeros(1, self.in_chans, image_size, image_size))
        try:
            return counting.multiply_adds(lambda: self._checked(run(), 1))
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
            what = " ".join(str(error).split())[:160]
            raise UserError(f"teacher {self.name} does not take {image_size}-pixel images: {what}") from None

    def _checked(self, output: Any, batch: int) -> Tensor:
        if not isinstance(output, Tensor) or output.shape != (batch, self.num_classes):
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise UserError(f"teacher {self.name} returned {found}, not logits ({batch}, {self.num_classes})")
        return output


def load_classifier(
    config: ClassifierConfig, num_classes: int | None = None, allow_code: bool = False
) -> ClassifierTeacher:
    """Load a frozen classifier.

    Args:
        config: see :class:`ClassifierConfig`.
        num_classes: of the images it will judge; a teacher of another number is refused.
        allow_code: ``python:`` runs foreign code and is refused without it.

    Raises:
        UserError: nothing there, a damaged file, a pickle that wants to run code, weights of another architecture,
            settings that contradict what the reference knows, weights that cannot be fetched.
    """
    is_untrained = config.reference.startswith("random:")
    reference = config.reference.removeprefix("random:")
    if reference.startswith("python:"):
        if is_untrained:
            raise UserError(f"{config.reference}: what a factory's network was before training, nobody knows")
        return _from_factory(reference, config, num_classes, allow_code)
    with seeded(0, "classifier"):  # networks are built to look at them
        source = _source(reference, config)
    choices = (config.num_classes, num_classes, source.num_classes)
    found = next(filter(None, choices if is_untrained else reversed(choices)), None)
    classes = _agreed(reference, found, config, num_classes)
    mean, std = _normalisation(reference, config, source.mean, source.std)
    with seeded(0, "untrained teacher"):
        network = (source.untrained if is_untrained else source.trained)(classes)
    name, seen = (f"untrained {source.name}", {}) if is_untrained else (source.name, source.labels_seen)
    return ClassifierTeacher(
        network, name, classes, mean, std, source.image_size, source.in_chans, source.licence, seen
    )


def _source(reference: str, config: ClassifierConfig) -> sources.Source:
    kind, _, name = reference.partition(":")
    if kind == "timm":
        _leave_out(reference, config, "architecture")
        return sources.of_timm(name, config.options)
    if kind == "torchvision":
        _leave_out(reference, config, "architecture", "options")
        return sources.of_torchvision(name)
    path = sources.find(reference)
    if path.is_dir():
        _leave_out(reference, config, "architecture", "options")
        return sources.of_run(path)
    return sources.of_file(path, config.architecture, config.options)


def _leave_out(reference: str, config: ClassifierConfig, *names: str) -> None:
    given = next((name for name in names if getattr(config, name)), None)
    if given:
        raise UserError(f"teacher {reference} knows its own {given}: leave {given} out")


def _agreed(reference: str, found: int | None, config: ClassifierConfig, wanted: int | None) -> int:
    """The number of classes, where all who speak of it agree."""
    if not found:
        raise UserError(f"teacher {reference} does not tell its number of classes: set num_classes")
    for who, said in (("num_classes says", config.num_classes), ("the images have", wanted)):
        if said and said != found:
            raise UserError(f"teacher {reference} knows {found} classes, {who} {said}")
    return found


_Values = tuple[float, ...]


def _normalisation(
    reference: str, config: ClassifierConfig, mean: _Values | None = None, std: _Values | None = None
) -> tuple[_Values, _Values]:
    """The user's word goes before what the reference knows; a guess would only show as a bad teacher."""
    mean, std = config.mean or mean, config.std or std
    if mean is None or std is None:
        raise UserError(f"teacher {reference} does not tell how it normalises images: set mean and std")
    return mean, std


def _from_factory(
    reference: str, config: ClassifierConfig, num_classes: int | None, allow_code: bool
) -> ClassifierTeacher:
    _leave_out(reference, config, "architecture", "options")
    factory = foreign_factory(reference.removeprefix("python:"), allow_code)
    try:
        made = factory()
    except Exception as error:  # whatever foreign code raises is the foreign code's
        raise UserError(f"{reference} raised {type(error).__name__}: {error}") from error
    if isinstance(made, ClassifierTeacher):
        _leave_out(reference, config, "mean", "std")
        _agreed(reference, made.num_classes, config, num_classes)
        return made
    if not isinstance(made, nn.Module):
        raise UserError(f"{reference} returned a {type(made).__name__}, not a torch module or a ClassifierTeacher")
    classes = _agreed(reference, getattr(made, "num_classes", None) or config.num_classes, config, num_classes)
    mean, std = _normalisation(reference, config)
    return ClassifierTeacher(made, reference, classes, mean, std, getattr(made, "image_size", None))
