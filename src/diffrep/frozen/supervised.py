"""A network of images in the place of a diffusion model: a classifier, or the student that a run of ours kept.

A classifier is the baseline that a supervised teacher of the same images makes: hints, attention transfer and
relations from it are what the official repository's `kd.py` was meant to do, under the same recipe and budget as
RepFusion itself. A run's student is any encoder: that of ADDP, of SimCLR, of RepFusion. Features know no timestep, so
every timestep gives the same. Letters: B images, P prefix tokens (class token, registers), D width, h w patches.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.files import located, read_json
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.references import SourceOptions, split_reference
from diffrep.models.stored import fresh_student, load_student, shown_size
from diffrep.models.students import Student
from diffrep.randomness import seeded
from diffrep.taps import Tap


class ImageTeacher(DiffusionTeacher):
    """Taps are those of the network, behind ``network.``; a ViT's patch tokens come as maps, without its prefix."""

    @property
    def _grid(self) -> tuple[int, int] | None:
        """Patches of a ViT, (h, w); None: the network is none."""
        network = self.module.network
        is_vit = hasattr(network, "num_prefix_tokens") and hasattr(network, "patch_embed")
        return network.patch_embed.grid_size if is_vit else None

    def _map_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(P + h w, D) -> (D, h, w); any other shape stays."""
        grid = self._grid
        if grid is None or len(shape) != 2 or shape[0] != self.module.network.num_prefix_tokens + math.prod(grid):
            return shape
        return shape[1], *grid

    @cached_property
    def _taps(self) -> dict[str, Tap]:
        found = {}
        for name, tap in super()._taps.items():
            shape = self._map_shape(tap.shape)
            if self._grid is None:
                found[name] = tap
            elif len(shape) != 3 or shape[1:] == self._grid:  # not queries and keys, whose first axis is no channel
                found[name] = Tap(name, shape, self.image_size // shape[-1] if len(shape) == 3 else None, tap.calls)
        return found

    def _part(self, x: Tensor, steps: Tensor, named: dict[str, Any], rows: slice, taps: list[Tap]) -> dict[str, Tensor]:
        found = super()._part(x, steps, named, rows, taps)
        return {name: self._as_map(feature) for name, feature in found.items()}

    def _as_map(self, feature: Tensor) -> Tensor:
        """(B, P + h w, D) -> (B, D, h, w); any other shape stays."""
        shape = self._map_shape(tuple(feature.shape[1:]))
        if shape == feature.shape[1:]:
            return feature
        return feature[:, -shape[1] * shape[2] :].transpose(1, 2).unflatten(2, shape[1:])


class SupervisedTeacher(ImageTeacher):
    """A classifier."""

    def __init__(self, classifier: ClassifierTeacher, image_size: int) -> None:
        super().__init__(
            Timeless(classifier.module),
            classifier.name,
            image_size,
            classifier.in_chans,
            prediction="features",
            licence=classifier.licence,
            labels_seen=classifier.labels_seen,
        )
        self.classifier = classifier

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> as the classifier was trained on them."""
        self.check_size(images.shape[-2], images.shape[-1])
        self.classifier.follow(images)
        return self.classifier.normalise(images)


class EncoderTeacher(ImageTeacher):
    """The student of a finished run; ``labels_seen`` is what the run says of itself."""

    takes_noise = False

    def __init__(self, student: Student, name: str, image_size: int, licence: str, labels_seen: dict[str, int]) -> None:
        in_chans = student.config.options.get("in_chans", 3)
        super().__init__(
            Timeless(student.backbone), name, image_size, in_chans, prediction="features", licence=licence,
            labels_seen=labels_seen,
        )  # fmt: skip
        self.student = student

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> as the student was trained on them."""
        self.check_size(images.shape[-2], images.shape[-1])
        return self.student.to(images.device).normalise(images)


class Timeless(nn.Module):
    """A network of images as one of (x, timestep)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x)


def load_supervised(reference: str, allow_code: bool = False) -> SupervisedTeacher:
    """``REFERENCE?image_size=N``: whatever `diffrep evaluate --classifier` reads, and the pixels it is shown.

    Raises:
        UserError: no such classifier, one whose image size nobody knows, or that does not take it.
    """
    place, options = split_reference(reference)
    options.only(("image_size",), f"classifier:{place}")
    classifier = load_classifier(ClassifierConfig(reference=place), allow_code=allow_code)
    size = options.image_size or classifier.image_size
    if size is None:
        raise UserError(f"classifier:{place}: its image size is not known; say classifier:{place}?image_size=32")
    classifier.multiply_adds(size)  # refuses images it does not take
    return SupervisedTeacher(classifier, size)


# Run folders


def is_encoder(place: str) -> bool:
    """Whether a run that kept a student is there."""
    card = located(place) / "config.json"
    return card.is_file() and "student" in read_json(card)


def load_encoder(place: str, options: SourceOptions, is_trained: bool = True) -> EncoderTeacher:
    """The student of a run folder, or the same network as it is initialised.

    Raises:
        UserError: a run that is not finished, damaged files, weights that do not fit, images whose size nobody knows.
    """
    options.only(("image_size",), f"{place}, a run with a student,")
    folder = located(place)
    if not (folder / "result.json").exists():
        raise UserError(f"{place} is a run that has not finished (no result.json): run its command again first")
    card = read_json(folder / "result.json")
    with seeded(0, "untrained teacher"):
        student = load_student(folder / "weights.safetensors") if is_trained else fresh_student(folder)
    size = options.image_size or shown_size(folder)
    if size is None:
        raise UserError(f"{place}: its image size is not known; say {place}?image_size=32")
    student.try_out(size)  # refuses images it does not take
    seen = card.get("labels_seen", {}) | card.get("labels_behind", {})
    name, seen = (card.get("name", folder.name), seen) if is_trained else (f"untrained {folder.name}", {})
    return EncoderTeacher(student, name, size, card.get("licence", "unknown"), seen)
