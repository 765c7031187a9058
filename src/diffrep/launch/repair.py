"""Which tokens of an image are painted anew: by a mask image, a box, or a share of them.

Letters: B images, L = h w tokens of s x s pixels, (H, W) the image.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.data.images import Part, UnreadableError, decode
from diffrep.diffusion.masking import lowest
from diffrep.errors import UserError
from diffrep.frozen.tokens import Tokenizer
from diffrep.randomness import stream

WHITE = 128  # grey level from which on a pixel of a mask image says: paint this anew


class RepairConfig(Config):
    """An image, and one way to say what of it is painted anew."""

    image: str
    mask: str | None = None  # an image file of the same size: white is painted anew
    box: tuple[int, int, int, int] | None = None  # X0, Y0, X1, Y1 in pixels, X1 and Y1 no longer part of it
    ratio: float | None = Field(None, gt=0, le=1)  # this share of the tokens, another draw for each seed
    outside: bool = False  # of mask or box: what lies outside is painted anew
    paste: bool = False  # put the image's own pixels back around what was painted; official: its decoded tokens

    @model_validator(mode="after")
    def _one_way(self) -> RepairConfig:
        given = [name for name in ("mask", "box", "ratio") if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} at once" if given else "nothing says what to paint anew"
            raise ValueError(f"{told}: give one of mask, box, ratio")
        if self.outside and self.ratio is not None:
            raise ValueError("outside belongs to a mask or a box, not to a ratio")
        return self


class Repair:
    """An image that was read, and what of it is painted anew.

    image: (3, H, W) uint8.
    ids:   (1, L), on the CPU.

    Raises:
        UserError: unreadable files, another size than the model's, a box that does not fit, nothing to paint.
    """

    def __init__(self, config: RepairConfig, tokenizer: Tokenizer, size: tuple[int, int]) -> None:
        self.config, self.stride, self.size = config, tokenizer.stride, size
        self.grid = size[0] // self.stride, size[1] // self.stride
        self.image = read_image(config.image, "--image")
        _same_size(config.image, "--image", self.image, size, "the model's images are")
        self.region = self._region()  # (H, W) bool, or None: tokens are drawn
        self.count = self._count()
        self._tokenizer = tokenizer

    def _region(self) -> Tensor | None:
        if self.config.ratio is not None:
            return None
        box = self.config.box
        region = boxed(box, self.size, "--box") if box else self._drawn(self.config.mask or "")
        return ~region if self.config.outside else region

    def _drawn(self, path: str) -> Tensor:
        mask = read_image(path, "--mask")
        _same_size(path, "--mask", mask, self.size, "the image is")
        return mask.float().mean(0) >= WHITE

    def _count(self) -> int:
        """How many tokens of each image are painted anew."""
        tokens = self.grid[0] * self.grid[1]
        if self.region is None:
            count = int(tokens * (self.config.ratio or 0) + 1e-9)  # official: the part below a whole token is dropped
            wanted = f"--ratio {self.config.ratio:g} of {tokens} tokens"
        else:
            count, wanted = (
                int(touched(self.region, self.grid, self.stride).sum()),
                self.config.mask or "what lies outside the box",
            )
        if not count:
            raise UserError(f"{wanted}: nothing is left to paint anew (white, or --ratio, says what to paint)")
        return count

    @cached_property
    def ids(self) -> Tensor:
        return self._tokenizer.encode(self.image[None].float() / 255)

    def mask(self, seeds: list[int]) -> Tensor:
        """(B, L) bool, True where tokens are painted anew: of every image the same number."""
        if self.region is not None:
            return touched(self.region, self.grid, self.stride).expand(len(seeds), -1)
        tokens = self.grid[0] * self.grid[1]
        order = [torch.rand(tokens, dtype=torch.float64, generator=stream(seed, "variation")) for seed in seeds]
        return lowest(torch.stack(order), self.count)

    def pasted(self, images: Tensor, seeds: list[int]) -> Tensor:
        """(B, 3, H, W) uint8 with the image's own pixels where none were to be painted."""
        region = self.region if self.region is not None else upsampled(self.mask(seeds), self.grid, self.stride)
        return torch.where(region.to(images.device).expand(len(images), -1, -1)[:, None], images, self.image)

    def settings(self) -> dict[str, Any]:
        """What decides about pixels, and no path."""
        found = {"image": _sha256(self.image.numpy()), "paste": self.config.paste, "tokens": self.count}
        which = {"ratio": self.config.ratio} if self.region is None else {"region": _sha256(self.region.numpy())}
        return found | which


def boxed(box: tuple[int, int, int, int], size: tuple[int, int], name: str) -> Tensor:
    """X0, Y0, X1, Y1 -> (H, W) bool.

    Raises:
        UserError: a box that does not fit; ``name`` is what the user called it.
    """
    (x0, y0, x1, y1), (height, width) = box, size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        shown = ",".join(map(str, box))
        raise UserError(f"{name} {shown}: X0,Y0,X1,Y1 must lie in 0,0,{width},{height}, with X0 < X1 and Y0 < Y1")
    region = torch.zeros(size, dtype=torch.bool)
    region[y0:y1, x0:x1] = True
    return region


def touched(region: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """(H, W) bool -> (L,): tokens of which any pixel is in the region."""
    return region.view(grid[0], stride, grid[1], stride).any(3).any(1).flatten()


def upsampled(mask: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """(B, L) of tokens -> (B, H, W) of pixels."""
    return mask.unflatten(1, grid).repeat_interleave(stride, 1).repeat_interleave(stride, 2)


def read_image(path: str, option: str) -> Tensor:
    """(3, H, W) uint8.

    Raises:
        UserError: not there, or no image.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"{option} {path} {'is a folder' if place.is_dir() else 'does not exist'}; name an image file")
    found = decode(Part([path], lambda i: place.read_bytes(), None), 0, None)
    if isinstance(found, UnreadableError):
        raise UserError(f"{option} {path} is unreadable ({found})")
    return torch.from_numpy(found)


def _same_size(path: str, option: str, image: Tensor, size: tuple[int, int], of: str) -> None:
    if tuple(image.shape[1:]) != size:
        (height, width), (wanted_height, wanted_width) = image.shape[1:], size
        told = f"{width}x{height} pixels, {of} {wanted_width}x{wanted_height}"
        raise UserError(f"{option} {path} has {told}; resize or crop it first")


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
