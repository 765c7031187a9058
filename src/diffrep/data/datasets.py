"""Image sets with fixed splits, resident as one uint8 tensor where they are small, decoded on the fly where not.

Splits never overlap and depend on the source alone, not on a run's seed:
- a split for which the source has an official part is that part;
- a missing validation split is a stratified 10 % of the official training part;
- a source with nothing but a training part is split 60/10/30, stratified;
- a source with train and validation parts but no test part has no test split.
Letters: N images of a split, B images of a batch, H and W pixels.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.data.images import Part, Stream, fingerprint
from diffrep.data.sources import Source, parse_any, read_source
from diffrep.data.transforms import augmentation
from diffrep.errors import UserError
from diffrep.randomness import stream

Split = Literal["train", "validation", "test"]

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.3  # held out of a training part where the source has no such part
SPLIT_SEED = 0  # of every held-out split: a split is a property of the source, not of a run
RESIDENT_BYTES = 2 * 2**30  # up to here a set lives decoded in memory


class DataConfig(Config):
    """Which images a run sees, and how."""

    source: str  # data reference KIND[:LOCATION], e.g. "digits", "cifar10:FOLDER", "folder:FOLDER"
    image_size: Annotated[int, Field(ge=1)] | None = None  # pixels; shorter side resized, centre crop; None = as stored
    labels: Annotated[int, Field(ge=1)] | None = None  # labelled images kept, class-balanced, others hidden; None = all
    label_seed: int | None = None  # which draw of the labelled images; None = the run's seed
    labelled_share: Annotated[float, Field(gt=0, le=1)] | None = None  # of each batch; None = as they come
    # see data/transforms.py: none, flip, shift:R, crop_flip:R, alternate_flip[:R], resized_crop:V..., ...+cutmix:V
    augment: str = "none"
    unreadable: Literal["error", "skip"] = "error"  # what an image that cannot be decoded does
    only_part: Split | None = None  # of masks, points, objects: every split is this part, for trying things out

    @field_validator("source")
    @classmethod
    def _source_is_known(cls, value: str) -> str:
        parse_any(value)
        return value

    @field_validator("augment")
    @classmethod
    def _augment_is_known(cls, value: str) -> str:
        augmentation(value)
        return value

    @model_validator(mode="after")
    def _share_needs_labels(self) -> DataConfig:
        if self.labelled_share is not None and self.labels is None:
            raise ValueError("labelled_share needs labels, the number of labelled images")
        return self


class ImageSet:
    """One split of one source.

    labels: (N,) int64, -1 = hidden, on ``device``; None for an unlabelled source.
    image_size: (H, W) of every image.
    skipped_names: the unreadable images that were left out.
    """

    def __init__(
        self, name: str, split: str, classes: tuple[str, ...], licence: str, images: Tensor | Stream,
        labels: Tensor | None, skipped_names: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.name, self.split, self.classes, self.licence = name, split, classes, licence
        self.labels, self.skipped_names, self._images = labels, skipped_names, images
        self.device = torch.device("cpu")

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self._images.shape[-2:]
        return int(height), int(width)

    @property
    def skipped(self) -> int:
        """How many unreadable images were left out."""
        return len(self.skipped_names)

    @property
    def is_resident(self) -> bool:
        """Whether all pixels are in memory."""
        return isinstance(self._images, Tensor)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of sizes, pixels and labels; of file names, file sizes and labels where not resident."""
        labels = None if self.labels is None else self.labels.cpu()
        if isinstance(self._images, Tensor):
            return fingerprint(self._images.cpu().numpy(), labels)
        return self._images.fingerprint(labels)

    def __len__(self) -> int:
        return len(self._images)

    def gather(self, index: Tensor) -> Tensor:
        """index (B,) int64 on any device -> (B, 3, H, W) uint8 on ``device``.

        Raises:
            UserError: an image that is decoded only now cannot be, or has another size than the first.
        """
        if isinstance(self._images, Tensor):
            return self._images[index.to(self.device)]
        return self._images.gather(index).to(self.device)

    def subset(self, positions: Tensor) -> ImageSet:
        """Only these images, (M,) int64, in this order; no pixel is decoded for it."""
        images: Tensor | Stream
        if isinstance(self._images, Tensor):
            images = self._images[positions.to(self.device)]
        else:
            images = copy.copy(self._images)
            images.positions = [self._images.positions[p] for p in positions.tolist()]
        labels = None if self.labels is None else self.labels[positions.to(self.labels.device)]
        return ImageSet(self.name, self.split, self.classes, self.licence, images, labels).to(self.device)

    def to(self, device: torch.device | str) -> ImageSet:
        """Move resident pixels and labels; returns itself, as ``nn.Module.to`` does."""
        self.device = torch.device(device)
        self.labels = None if self.labels is None else self.labels.to(self.device)
        if isinstance(self._images, Tensor):
            self._images = self._images.to(self.device)
        return self


def load_data(config: DataConfig, split: Split, device: torch.device | str = "cpu") -> ImageSet:
    """Read one split. All its labels are there: hiding most of them is :func:`label_subset` and :func:`hide_labels`.

    Raises:
        UserError: no such source or split, an unreadable image, images of different sizes without ``image_size``.
    """
    source = read_source(config.source)
    part_name, positions = split_positions(source, split)
    part, skip = source.parts[part_name], config.unreadable == "skip"
    images = Stream(config.source, part, positions, config.image_size)
    height, width = images.fix_shape(skip)
    load = _resident if len(images) * 3 * height * width <= RESIDENT_BYTES else _streamed
    names = [images.name(row) for row in range(len(images))]
    pixels, kept = load(images, skip)
    labels = None if part.labels is None else part.labels[positions][kept]
    skipped = tuple(names[row] for row in sorted(set(range(len(names))) - set(kept)))
    return ImageSet(config.source, split, source.classes, source.licence, pixels, labels, skipped).to(device)


def _resident(images: Stream, skip: bool) -> tuple[Tensor, list[int]]:
    """All pixels in one tensor, and the rows that could be read."""
    kept: list[int] = []
    pixels = torch.empty((len(images), 3, *images.shape), dtype=torch.uint8)
    for row, image in images.readable(range(len(images)), skip):
        pixels[len(kept)] = torch.from_numpy(image)
        kept.append(row)
    return pixels[: len(kept)], kept


def _streamed(images: Stream, skip: bool) -> tuple[Stream, list[int]]:
    """Nothing in memory; leaving out unreadable images costs one pass over all of them."""
    if not skip:
        return images, list(range(len(images)))
    kept = [row for row, _ in images.readable(range(len(images)), skip)]
    images.positions = [images.positions[row] for row in kept]
    return images, kept


def split_positions(source: Source, split: str) -> tuple[str, Tensor]:
    """Which official part a split comes from, and its ascending positions there.

    Raises:
        UserError: the source has no such split, or too few images to hold one out.
    """
    parts = source.parts
    if split in parts and split != "train":
        return split, torch.arange(len(parts[split]))
    if "train" not in parts or (split == "test" and "validation" in parts):
        found = f"no {split} split, only {', '.join(parts)}"
        raise UserError(f"{source.reference}: {found}; name a folder or files {split!r} to have it")
    held_out = {} if "validation" in parts else {"validation": VALIDATION_SHARE}
    if list(parts) == ["train"]:
        held_out["test"] = TEST_SHARE
    positions = _stratified(parts["train"], held_out)[split]
    if not len(positions):
        raise UserError(f"{source.reference}: {len(parts['train'])} images are too few to hold out a {split} split")
    return "train", positions


def _stratified(part: Part, held_out: dict[str, float]) -> dict[str, Tensor]:
    """Shares of one part with every class's share as near as whole images allow; the rest is "train".

    Images of a class get the evenly spaced heights (rank + 1/2) / (class size); a share is a stretch of heights.
    """
    labels = torch.zeros(len(part), dtype=torch.int64) if part.labels is None else part.labels
    order = torch.randperm(len(part), generator=stream(SPLIT_SEED, "data/split"))
    rank, size = _rank_in_class(labels[order])
    order = order[((rank + 0.5) / size).argsort(stable=True)]
    positions, start = {}, 0
    for name, share in held_out.items():
        stop = start + round(share * len(part))
        positions[name], start = order[start:stop].sort().values, stop
    return {**positions, "train": order[start:].sort().values}


def _rank_in_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (N,) -> how many of the same label stand before it (N,), how many there are in all (N,)."""
    _, number, counts = labels.unique(return_inverse=True, return_counts=True)
    by_class = number.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(number)
    rank[by_class] = torch.arange(len(labels)) - starts[number[by_class]]
    return rank, counts[number]


def label_subset(labels: Tensor, count: int, seed: int) -> Tensor:
    """Which images keep their label: class-balanced, and nested (a smaller count of one seed is a prefix of a larger).

    Args:
        labels: (N,) int64; -1 is not a label.
        count: images in all; what does not divide by the classes goes to classes picked by the seed. As many as
            there are means all of them, balanced or not.
        seed: which draw.

    Returns:
        (count,) int64 positions on the CPU, classes taking turns.

    Raises:
        UserError: more than there are, or a class too small for its share.
    """
    labelled = (labels.cpu() >= 0).nonzero()[:, 0]
    if not 1 <= count <= len(labelled):
        raise UserError(f"data.labels = {count}: the split has {len(labelled)} labelled images; ask for 1 to that many")
    rng = stream(seed, "data/label_subset")
    order = labelled[torch.randperm(len(labelled), generator=rng)]
    names, number, available = labels.cpu()[order].unique(return_inverse=True, return_counts=True)
    turn = torch.randperm(len(names), generator=rng)  # (K,) whose turn comes first
    needed = count // len(names) + (turn < count % len(names))
    if count < len(labelled) and bool((short := available < needed).any()):
        worst = int(short.nonzero()[0])
        have, want = int(available[worst]), int(needed[worst])
        raise UserError(f"data.labels = {count}: class {int(names[worst])} has {have} labelled images, {want} needed")
    rank, _ = _rank_in_class(number)
    return order[(rank * len(names) + turn[number]).argsort()[:count]]


def hide_labels(labels: Tensor, keep: Tensor) -> Tensor:
    """labels (N,) with -1 everywhere but at the positions ``keep`` (K,); a copy."""
    hidden = torch.full_like(labels, -1)
    keep = keep.to(labels.device)
    hidden[keep] = labels[keep]
    return hidden
