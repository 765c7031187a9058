"""What a walk looks like on the way: pixels between the steps, and below them which tokens are settled.

A strip is one image's walk, (3, 2 H, F W) uint8: above, what was decoded after each of F steps; below, the same with
tokens that are still masked in one colour. It is written beside the image, so that whoever makes the image makes it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.files import write_atomic
from diffrep.frozen.generator import grid_png
from diffrep.launch.repair import upsampled

MASKED = (0, 114, 178)  # a blue that no grey-scale image has
FRAMES, COLUMNS = 20, 10  # kept of a walk; of those, shown side by side
GAP = 8  # white pixels between images
LEAST = 64  # pixels a side below which images are drawn enlarged, every pixel as a square
WIDEST = 128  # pixels a side of an image in the animation
MILLISECONDS, LAST = 350, 2500  # how long it shows a frame


def spread(count: int, most: int) -> list[int]:
    """Up to ``most`` of 0 .. count-1, evenly, with the first and the last."""
    kept = min(count, most)
    return [round(k * (count - 1) / max(kept - 1, 1)) for k in range(kept)]


class Watch:
    """Collects frames of some images of a block: call it after every step.

    rows: which images of the block.
    """

    def __init__(self, rows: Sequence[int], grid: tuple[int, int], stride: int) -> None:
        self.rows, self.grid, self.stride = list(rows), grid, stride
        self.frames: list[Tensor] = []  # (rows, 3, 2 H, W) each

    def __call__(self, images: Tensor, mask: Tensor) -> None:
        """images: (B, 3, H, W) uint8; mask: (B, L)."""
        images, mask = images[self.rows].cpu(), mask[self.rows].cpu()
        self.frames.append(torch.cat([images, marked(images, mask, self.grid, self.stride)], 2))

    def strip(self, place: int) -> Tensor:
        """Of the ``place``-th watched image."""
        chosen = [self.frames[k][place] for k in spread(len(self.frames), FRAMES)]
        return torch.cat(chosen, 2)


def marked(images: Tensor, mask: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """(B, 3, H, W) uint8 with masked tokens in one colour."""
    colour = torch.tensor(MASKED, dtype=torch.uint8).view(1, 3, 1, 1)
    return torch.where(upsampled(mask, grid, stride)[:, None], colour, images)


def png(image: Tensor) -> bytes:
    """(3, H, W) uint8, lossless."""
    file = io.BytesIO()
    Image.fromarray(image.movedim(0, 2).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


def stored(path: Path) -> Tensor:
    """(3, H, W) uint8 of a file of ours."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(2, 0)


def enlarged(images: Tensor, side: int) -> Tensor:
    """(..., H, W) of a small ``side`` with every pixel as a square, so that people see it."""
    factor = -(-LEAST // side)
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def frames(strip: Tensor) -> list[Tensor]:
    """The (3, 2 H, W) frames of a strip of square images."""
    return list(strip.split(strip.shape[1] // 2, 2))


def write_film(folder: Path, strips: Sequence[Tensor]) -> None:
    """``film.png``: a row for each image, its walk from left to right; ``film.gif``: the same in time."""
    walks, side = [frames(strip) for strip in strips], strips[0].shape[1] // 2
    shown = spread(len(walks[0]), COLUMNS)
    cells = [_apart(enlarged(walk[k], side), below=GAP) for walk in walks for k in shown]
    write_atomic(folder / "film.png", grid_png(torch.stack(cells).float() / 255, len(shown)))
    moments = [
        torch.cat([_apart(enlarged(walk[k], side), right=GAP) for walk in walks], 2) for k in range(len(walks[0]))
    ]
    write_atomic(folder / "film.gif", _gif([_shrunk(moment, side) for moment in moments]))


def _apart(image: Tensor, right: int = 0, below: int = 0) -> Tensor:
    """With white beside or below it."""
    return torch.nn.functional.pad(image, (0, right, 0, below), value=255)


def _shrunk(moment: Tensor, side: int) -> Image.Image:
    image = Image.fromarray(moment.movedim(0, 2).numpy())
    share = min(1.0, WIDEST / side)
    return image.resize((round(image.width * share), round(image.height * share))) if share < 1 else image


def _gif(moments: Sequence[Image.Image]) -> bytes:
    file, held = io.BytesIO(), [MILLISECONDS] * (len(moments) - 1) + [LAST]
    moments[0].save(file, "GIF", save_all=True, append_images=moments[1:], duration=held, loop=0)
    return file.getvalue()
