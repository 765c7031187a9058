"""Few-shot dense tasks out of any labelled images: one image of a set, placed on a cluttered canvas.

Where it lies, how large it is and which pixels are its own is known exactly, so one source has truth for all three
tasks: the mask of its class, its four corners and centre, its box. The canvas is a property of the source: the same
for every run and seed. What it is no substitute for: real scenes, many objects, occlusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from diffrep.data.coco import Objects
from diffrep.data.datasets import DataConfig, ImageSet, Split, load_data
from diffrep.data.dense import DensePart, DenseRead, Task
from diffrep.data.sources import read_source
from diffrep.data.wflw import UNIT, Face
from diffrep.errors import UserError
from diffrep.randomness import stream

CANVAS = 2  # side of the canvas, in sides of an image
SIZES = (1.0, 1.5)  # of the placed image, in its own sides
PIECES = 4  # of other images, each half a side, that lie below it
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
INK = ("digits", "mnist", "kmnist", "qmnist")  # light strokes on black: the strokes alone are the object
INK_FROM = 96  # of 255: what counts as a stroke
PADDING = 1.25  # with which views cut out a face: the box is so much smaller than the canvas
CORNERS = ("top left", "top right", "bottom right", "bottom left", "centre")
MIRRORED = ((0, 1), (3, 2))  # corners that a mirror image exchanges
DRAW = "data/placed"


@dataclass(frozen=True)
class Place:
    """Where an image lies on its canvas, in whole pixels."""

    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.side, self.top + self.side


class Canvases:
    """The canvases of one split; image k of the set lies on canvas k."""

    def __init__(self, images: ImageSet, has_ink: bool) -> None:
        assert images.labels is not None
        self.images, self.labels, self.has_ink = images, images.labels, has_ink
        self.unit = images.image_size[0]
        self.side = CANVAS * self.unit

    @lru_cache(maxsize=256)  # noqa: B019 - a set lives as long as its run
    def draw(self, k: int) -> tuple[np.ndarray, Place, np.ndarray]:
        """The canvas (S, S, 3) uint8, where image k lies, and which pixels there are its own (side, side) bool."""
        rng = stream(0, DRAW, self.images.split, k)
        canvas = np.zeros((self.side, self.side, 3), np.uint8)
        half = self.unit // 2
        for other in torch.randint(0, len(self.images), (PIECES,), generator=rng).tolist():
            top, left = _within(self.unit - half, rng), _within(self.unit - half, rng)
            piece = self._pixels(other)[top : top + half, left : left + half]
            _lay(canvas, piece, _within(self.side - half, rng), _within(self.side - half, rng))
        size = SIZES[0] + (SIZES[1] - SIZES[0]) * float(torch.rand((), generator=rng))
        shown = _resized(self._pixels(k), round(size * self.unit))
        place = Place(_within(self.side - len(shown), rng), _within(self.side - len(shown), rng), len(shown))
        ink = shown.max(2)
        own = ink >= min(INK_FROM, ink.max()) if self.has_ink else np.ones_like(ink, bool)
        _lay(canvas, shown, place.left, place.top)
        return canvas, place, own

    def _pixels(self, k: int) -> np.ndarray:
        return self.images.gather(torch.tensor([k]))[0].permute(1, 2, 0).numpy()  # (H, W, 3)

    def mask(self, k: int) -> Tensor:
        """(S, S) uint8: 0 = background and clutter, c + 1 = an image of class c."""
        _, place, own = self.draw(k)
        found = torch.zeros(self.side, self.side, dtype=torch.uint8)
        region = found[place.top : place.top + place.side, place.left : place.left + place.side]
        region[torch.from_numpy(own)] = int(self.labels[k]) + 1
        return found

    def corners(self, k: int) -> Face:
        """The corners clockwise from the top left, and the centre; what is cut out is the whole canvas."""
        left, top, right, bottom = self.draw(k)[1].box
        places = [(left, top), (right, top), (right, bottom), (left, bottom), ((left + right) / 2, (top + bottom) / 2)]
        center = torch.full((2,), self.side / 2, dtype=torch.float64)
        points = torch.tensor(places, dtype=torch.float64)
        return Face(points, torch.ones(len(places), dtype=torch.bool), center, self.side / PADDING / UNIT)

    def objects(self, k: int) -> Objects:
        """The one image, by its own pixels."""
        mask = self.mask(k)
        return Objects.from_masks(mask[None] > 0, self.labels[k][None], k)


def _lay(canvas: np.ndarray, piece: np.ndarray, left: int, top: int) -> None:
    canvas[top : top + piece.shape[0], left : left + piece.shape[1]] = piece


def _within(limit: int, rng: torch.Generator) -> int:
    return int(torch.randint(0, limit + 1, (), generator=rng))


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def read_placed(location: str, task: Task) -> DenseRead:
    """``placed:SOURCE``: every image of a labelled source of square images, on a canvas of its own.

    Raises:
        UserError: no such source, one without labels, or images that are not square.
    """
    config = DataConfig(source=location)
    found = {split: _canvases(load_data(config, split), location) for split in SPLITS}
    classes = found["train"].images.classes
    parts: dict[str, DensePart] = {split: _part(canvases, task) for split, canvases in found.items()}
    if task == "segment":
        return DenseRead(("background", *classes), parts)
    if task == "landmark":
        return DenseRead(CORNERS, parts, MIRRORED, {"normaliser": (0, 2)})
    return DenseRead(classes, parts)


def placed_licence(location: str) -> str:
    """That of the images that are placed."""
    return read_source(location).licence


def _canvases(images: ImageSet, location: str) -> Canvases:
    if images.labels is None or len(set(images.image_size)) > 1:
        what = "has no labels" if images.labels is None else "has images that are not square"
        raise UserError(f"placed:{location}: {location} {what}")
    return Canvases(images, location.partition(":")[0] in INK)


def _part(canvases: Canvases, task: Task) -> DensePart:
    images = canvases.images
    truth = {"segment": canvases.mask, "landmark": canvases.corners, "detect": canvases.objects}[task]
    names = [f"{images.split}[{k}]" for k in range(len(images))]
    return DensePart(names, lambda k: canvases.draw(k)[0], truth, ((images.fingerprint, len(images)),))
