"""Images as small PNG files in text form, for a page that loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch

from diffrep.data.datasets import ImageSet

SIDE = 64  # pixels; larger images are shrunk, smaller ones stay as they are


def thumbnails(images: ImageSet, positions: Sequence[int]) -> list[str]:
    """One data address per position."""
    return [_address(pixels) for pixels in _small(images, positions)]


def strip(images: ImageSet, positions: Sequence[int], columns: int) -> str:
    """Images side by side in one PNG of ``columns`` places, a white pixel between them; empty places are white."""
    small = _small(images, positions)
    height, width = small[0].shape[:2]
    row = np.full((height, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for place, pixels in enumerate(small):
        row[:, place * (width + 1) : place * (width + 1) + width] = pixels
    return _address(row)


def _small(images: ImageSet, positions: Sequence[int]) -> list[np.ndarray]:
    """(h, w, 3) uint8 each, the longer side SIDE at most."""
    from PIL import Image

    if not positions:
        return []
    found = []
    for pixels in images.gather(torch.tensor(positions)).cpu().numpy():
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        if max(image.size) > SIDE:
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        found.append(np.asarray(image))
    return found


def _address(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
