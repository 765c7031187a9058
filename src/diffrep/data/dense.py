"""Pictures whose truth is a mask, points or objects: read where they lie, each in its own size.

A reader answers with the official parts of its source (:class:`DenseRead`); :func:`load_dense` makes one split of it.
Splits are those of :mod:`diffrep.data.datasets`: an official part where there is one; a missing validation split is a
tenth of the training part, and a missing test split of a source without validation three tenths, by a fixed draw.
Letters: N pictures of a split, H and W pixels, K classes or points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrep.data.datasets import SPLIT_SEED, TEST_SHARE, VALIDATION_SHARE, DataConfig, Split
from diffrep.data.images import UnreadableError, pixels
from diffrep.data.sources import DENSE_TASKS
from diffrep.errors import UserError
from diffrep.randomness import stream

Task = Literal["segment", "landmark", "detect"]
IGNORED = 255  # of a mask: belongs to no class, counts nowhere
KEPT_BYTES = 2**30  # of decoded pictures and truths that a set keeps


@dataclass(frozen=True)
class DensePart:
    """N pictures of one official part, as the source stores them.

    image(i): an encoded file, or an array (H, W) or (H, W, 3) uint8.
    truth(i): of a mask, (H, W) uint8 with ``IGNORED``; of points and objects, the reader's own value.
    subsets: name -> (N,) bool, groups that are scored apart.
    """

    names: Sequence[str]
    image: Callable[[int], bytes | np.ndarray]
    truth: Callable[[int], Any]
    files: tuple[tuple[str, int], ...] = ()  # (name, bytes) of the files behind the part
    subsets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class DenseRead:
    """What a reader answers. mirrored: pairs of classes or points that a mirror image exchanges."""

    classes: tuple[str, ...]  # of masks and objects; of points their names, where they have some
    parts: dict[str, DensePart]
    mirrored: tuple[tuple[int, int], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what belongs beside every score: label order, category ids


@dataclass(frozen=True)
class DenseKind:
    """One kind of source: what reads a location for a task."""

    read: Callable[[str, Task], DenseRead]
    licence: str | Callable[[str], str]  # or what finds it at a location


class DenseSet:
    """One split of one source; decoded pictures are kept as long as there is room."""

    skipped = 0  # unreadable pictures are an error here
    skipped_names: tuple[str, ...] = ()

    def __init__(
        self, name: str, split: str, read: DenseRead, part: DensePart, positions: Tensor, licence: str
    ) -> None:
        self.name, self.split, self.read, self.part, self.licence = name, split, read, part, licence
        self.classes, self.mirrored, self.facts = read.classes, read.mirrored, read.facts
        self.positions: list[int] = positions.tolist()
        self.subsets = {group: belongs[positions] for group, belongs in part.subsets.items()}
        self._kept: dict[int, tuple[Tensor, Any]] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self.positions)

    def image_name(self, index: int) -> str:
        return self.part.names[self.positions[index]]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """The picture, (3, H, W) uint8, and its truth.

        Raises:
            UserError: a picture that cannot be decoded, or a truth that does not fit it.
        """
        if index in self._kept:
            return self._kept[index]
        image, truth = self.image(index), self.truth(index)
        self._check_size(index, truth, image)
        size = image.nbytes + (truth.nbytes if isinstance(truth, Tensor) else 0)
        if size <= self._room:
            self._room -= size
            self._kept[index] = image, truth
        return image, truth

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8, whatever was kept."""
        try:
            return torch.from_numpy(pixels(self.part.image(self.positions[index]), None))
        except UserError:
            raise
        except Exception as error:  # damaged bytes make Pillow raise nearly anything
            reason = str(error) if isinstance(error, UnreadableError) else type(error).__name__
            raise UserError(f"{self.name}: picture {self.image_name(index)!r} is unreadable ({reason})") from None

    def truth(self, index: int) -> Any:
        return self.part.truth(self.positions[index])

    def _check_size(self, index: int, truth: Any, image: Tensor) -> None:
        """Refuse a truth of another frame; a mask may be a scaled copy of it (CelebAMask-HQ: half as large)."""
        shape = truth.shape if isinstance(truth, Tensor) else getattr(truth, "size", image.shape[1:])  # of objects
        (h, w), (height, width) = shape, image.shape[1:]
        if (h, w) != (height, width) and not (isinstance(truth, Tensor) and h * width == w * height):
            what = "its mask is" if isinstance(truth, Tensor) else "its annotations are of"
            sizes = f"{what} {h}x{w}, the picture {height}x{width}"
            raise UserError(f"{self.name}: {self.image_name(index)!r}: {sizes}")

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over file names and sizes and the pictures' names: what can be had without decoding."""
        described = [self.part.files, [self.part.names[p] for p in self.positions], self.classes, self.facts]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def subset(self, chosen: Tensor) -> DenseSet:
        """Only these pictures, (M,) int64, in this order."""
        positions = torch.tensor(self.positions, dtype=torch.int64)[chosen.cpu()]
        return DenseSet(self.name, self.split, self.read, self.part, positions, self.licence)


def load_dense(config: DataConfig, split: Split, task: Task, holds_out: bool = True) -> DenseSet:
    """One split of a source of masks, points or objects.

    Args:
        holds_out: False: a training split keeps what a missing validation split would be taken from.

    Raises:
        UserError: a source of whole images, one of another task, no such split, settings that belong to image sets.
    """
    from diffrep.data.dense_kinds import DENSE_KINDS

    kind, _, location = config.source.partition(":")
    if task not in DENSE_TASKS.get(kind, ()):
        fitting = ", ".join(name for name, tasks in DENSE_TASKS.items() if task in tasks)
        raise UserError(
            f"data.source {config.source}: has no truth for the task '{task}'; sources that have: {fitting}"
        )
    _refuse_image_settings(config)
    found = DENSE_KINDS[kind].read(location, task)
    name, positions = dense_positions(config, found, split, holds_out)
    told = DENSE_KINDS[kind].licence
    licence = told if isinstance(told, str) else told(location)
    return DenseSet(config.source, split, found, found.parts[name], positions, licence)


def _refuse_image_settings(config: DataConfig) -> None:
    plain = DataConfig(source=config.source)
    for name in ("image_size", "labelled_share", "augment", "unreadable"):
        if getattr(config, name) != getattr(plain, name):
            raise UserError(f"data.{name}: belongs to sets of whole images; see method.views for what is done to these")


def dense_positions(config: DataConfig, found: DenseRead, split: str, holds_out: bool = True) -> tuple[str, Tensor]:
    """Which official part a split comes from, and its ascending positions there."""
    parts = found.parts
    if config.only_part is not None:
        if config.only_part not in parts:
            raise UserError(f"data.only_part {config.only_part}: {config.source} has {', '.join(parts)}")
        return config.only_part, torch.arange(len(parts[config.only_part]))
    if split in parts and split != "train":
        return split, torch.arange(len(parts[split]))
    if "train" not in parts or (split == "test" and "validation" in parts):
        have = f"{config.source}: no {split} part, only {', '.join(parts)}"
        raise UserError(f"{have}; data.only_part reads every split from one part, for trying things out")
    held_out = {"test": TEST_SHARE} if list(parts) == ["train"] else {}  # first: the same whatever else is held out
    held_out |= {} if "validation" in parts or not holds_out else {"validation": VALIDATION_SHARE}
    return "train", _held_out(len(parts["train"]), held_out)[split]


def _held_out(count: int, shares: dict[str, float]) -> dict[str, Tensor]:
    order = torch.randperm(count, generator=stream(SPLIT_SEED, "data/split"))
    positions, start = {}, 0
    for name, share in shares.items():
        stop = start + round(share * count)
        positions[name], start = order[start:stop].sort().values, stop
    return positions | {"train": order[start:].sort().values}


def some_pictures(count: int, wanted: int, seed: int) -> Tensor:
    """Which pictures of a training split keep their truth, (wanted,) int64: nested, as :func:`label_subset`'s are."""
    if not 1 <= wanted <= count:
        raise UserError(f"data.labels = {wanted}: the split has {count} pictures; ask for 1 to that many")
    return torch.randperm(count, generator=stream(seed, "data/label_subset"))[:wanted]
