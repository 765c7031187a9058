"""From what a source stores (encoded bytes or an array) to uint8 pixels, one image or many in order.

Letters: N images of a part, H and W pixels.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffrep.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

# Measured: threads halve the time for photographs and double it for thumbnails, where they only wait for each other.
_POOLED_BYTES = 8192  # mean size of an encoded image
_WORKERS = 4
_BLOCK = 256  # images decoded ahead of the reader


@dataclass(frozen=True)
class Part:
    """N images of one official split, as the source stores them.

    read(i) gives an encoded image file, or an array (H, W) or (H, W, 3) uint8.
    """

    names: Sequence[str]  # what a message calls image i
    read: Callable[[int], bytes | np.ndarray]
    labels: Tensor | None  # (N,) int64, -1 = hidden; None = unlabelled
    files: tuple[tuple[str, int], ...] = ()  # (name, bytes) of the files behind the part

    def __len__(self) -> int:
        return len(self.names)


Read = tuple[tuple[str, ...], dict[str, Part]]  # what a reader answers: class names (empty = unnamed), parts by name


def array_part(images: np.ndarray, labels: Any, part: str) -> Part:
    """A part that is in memory: images (N, H, W) or (N, H, W, 3) uint8, labels (N,) integers."""
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return Part([f"{part}[{i}]" for i in range(len(images))], images.__getitem__, labels)


def file_part(origin: str, base: Path, names: Sequence[str], labels: Sequence[int]) -> Part:
    """A part of image files. names: paths from ``base``, or absolute; labels: one for each, -1 = hidden.

    Raises:
        UserError: files that are not there, with their count and the first.
    """
    sizes = [_size(os.path.join(base, name)) for name in names]
    if missing := [name for name, size in zip(names, sizes, strict=True) if size is None]:
        found = f"{len(missing)} of {len(names)} images are missing, first {missing[0]}"
        raise UserError(f"{origin}: {found} (looked for in {base})")
    files = tuple((name, size or 0) for name, size in zip(names, sizes, strict=True))
    return Part(names, lambda i: (base / names[i]).read_bytes(), torch.tensor(labels, dtype=torch.int64), files)


def some_of(part: Part, rows: Sequence[int]) -> Part:
    """Some images of a :func:`file_part`, in this order."""
    labels = None if part.labels is None else part.labels[list(rows)]
    return Part([part.names[r] for r in rows], lambda i: part.read(rows[i]), labels, tuple(part.files[r] for r in rows))


def read_at(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a file that holds others too."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # not there, or no path at all
        return None


class UnreadableError(Exception):
    """One image that cannot be decoded; the text says why."""


def pixels(content: bytes | np.ndarray, image_size: int | None) -> np.ndarray:
    """Decode to (3, H, W) uint8; shorter side resized to ``image_size`` and centre crop where it is given.

    Grey-scale is repeated to three channels; palette, alpha and CMYK images become RGB.
    """
    image = _rgb(content)
    if image_size is not None and image.size != (image_size, image_size):
        image = _fit(image, image_size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _rgb(content: bytes | np.ndarray) -> Image.Image:
    from PIL import Image

    image = Image.fromarray(content) if isinstance(content, np.ndarray) else Image.open(io.BytesIO(content))
    if image.mode == "F":
        raise UnreadableError("pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to ``side`` (bilinear, antialiased), centre crop; the rounding of torchvision's transforms."""
    from PIL import Image

    short = min(image.size)
    width, height = (side if edge == short else int(side * edge / short) for edge in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def decode(part: Part, position: int, image_size: int | None) -> np.ndarray | UnreadableError:
    """One image as (3, H, W) uint8, or the reason why there is none."""
    try:
        return pixels(part.read(position), image_size)
    except UnreadableError as error:
        return error
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        return UnreadableError(_reason(error))


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return (str(error) or type(error).__name__).splitlines()[0]


def decoded(part: Part, positions: Iterable[int], image_size: int | None) -> Iterator[np.ndarray | UnreadableError]:
    """:func:`decode` for many positions, in their order; large images are decoded by a few threads."""
    rest = iter(positions)
    if sum(size for _, size in part.files) < _POOLED_BYTES * len(part):
        yield from (decode(part, position, image_size) for position in rest)
        return
    with ThreadPoolExecutor(_WORKERS) as pool:
        while block := list(itertools.islice(rest, _BLOCK)):
            yield from pool.map(lambda position: decode(part, position, image_size), block)


def fingerprint(images: Iterable[np.ndarray], labels: Tensor | None) -> str:
    """Hex SHA-256 over sizes and pixels of every (3, H, W) uint8 image in order, then the labels."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.shape[1]}x{image.shape[2]}:".encode())
        digest.update(image.tobytes())
    digest.update(b"unlabelled" if labels is None else labels.numpy().tobytes())
    return digest.hexdigest()


class Stream:
    """The images of one split where they lie, decoded in index order when asked for."""

    def __init__(self, origin: str, part: Part, positions: Tensor, image_size: int | None) -> None:
        self.origin, self.part, self.positions, self.image_size = origin, part, positions.tolist(), image_size
        self.shape = (0, 0)  # (H, W) that every image must have; zeros = not fixed yet

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, row: int) -> str:
        return self.part.names[self.positions[row]]

    def readable(self, rows: Iterable[int], skip: bool) -> Iterator[tuple[int, np.ndarray]]:
        """(row, (3, H, W) uint8) in order; what cannot be decoded is left out or an error."""
        rows = list(rows)
        results = decoded(self.part, [self.positions[row] for row in rows], self.image_size)
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, np.ndarray):
                self._check_shape(row, result)
                yield row, result
            elif not skip:
                what = f"image {self.name(row)!r} is unreadable ({result})"
                raise UserError(f"{self.origin}: {what}; mend it or set data.unreadable=skip")

    def _check_shape(self, row: int, image: np.ndarray) -> None:
        height, width = image.shape[1:]
        if self.shape not in ((0, 0), (height, width)):
            sizes = f"image {self.name(row)!r} is {height}x{width}, others are {self.shape[0]}x{self.shape[1]}"
            raise UserError(f"{self.origin}: {sizes}; set data.image_size")

    def fix_shape(self, skip: bool) -> tuple[int, int]:
        """(H, W) of the first readable image, from here on that of all."""
        for row in range(len(self)):
            for _, image in self.readable([row], skip):
                self.shape = (image.shape[1], image.shape[2])
                return self.shape
        raise UserError(f"{self.origin}: none of {len(self)} images is readable")

    def gather(self, index: Tensor) -> Tensor:
        """index (B,) -> (B, 3, H, W) uint8."""
        return torch.stack([torch.from_numpy(image) for _, image in self.readable(index.tolist(), skip=False)])

    def fingerprint(self, labels: Tensor | None) -> str:
        """Hex SHA-256 over file names and sizes, image names and labels: what can be had without decoding."""
        described = [self.part.files, [self.part.names[p] for p in self.positions], self.shape]
        digest = hashlib.sha256(json.dumps(described).encode())
        digest.update(b"unlabelled" if labels is None else labels.numpy().tobytes())
        return digest.hexdigest()
