"""Points read off heatmaps, all at once, against a loop over points as mmpose takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.ndimage import correlate1d

from benchmarks.timing import line, rivals
from diffrep.models.heatmaps import KERNEL, KERNEL_STD, Decoding, cells_of, targets

SHAPE = (64, 98, 64, 64)  # faces of a batch, WFLW's points, heatmap of a 256 crop


def measure() -> list[dict[str, Any]]:
    """The published decoding, and DARK; both give the same cells (:func:`_same`)."""
    maps = _maps()
    found = []
    for how, what in (("default", "quarter-cell shift"), ("unbiased", "DARK")):
        _same(maps[:2], how)
        mine, theirs = rivals(lambda how=how: cells_of(maps, how), lambda how=how: _one_by_one(maps.numpy(), how))
        unit = f"CPU s, {SHAPE[0]} x {SHAPE[1]} points"
        found.append(line(f"heatmaps decoded, {what}", "numpy, point by point", mine, theirs, unit=unit))
    return found


def _maps() -> torch.Tensor:
    """Gaussians around random points, and a little noise."""
    rng = torch.Generator().manual_seed(0)
    pictures, points, height, width = SHAPE
    places = 4 * torch.tensor([width, height]) * torch.rand(pictures, points, 2, generator=rng)
    size = (4 * width, 4 * height)
    drawn, _ = targets(places, torch.ones(pictures, points), size, (width, height), "unbiased", 2)
    return drawn + 0.01 * torch.rand(SHAPE, generator=rng)


def _same(maps: torch.Tensor, how: Decoding) -> None:
    torch.testing.assert_close(
        cells_of(maps, how)[0], torch.from_numpy(_one_by_one(maps.numpy(), how)), atol=0.01, rtol=0
    )


def _one_by_one(maps: np.ndarray, how: Decoding) -> np.ndarray:
    """(B, K, 2) cells."""
    found = np.zeros((*maps.shape[:2], 2))
    for picture in range(maps.shape[0]):
        for point in range(maps.shape[1]):
            heatmap = maps[picture, point]
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            place = np.array([x, y], dtype=np.float64)
            refine = _shifted if how == "default" else _newton
            found[picture, point] = refine(heatmap, int(x), int(y), place)
    return found


def _shifted(heatmap: np.ndarray, x: int, y: int, place: np.ndarray) -> np.ndarray:
    height, width = heatmap.shape
    if not (1 < x < width - 1 and 1 < y < height - 1):
        return place
    slope = [heatmap[y, x + 1] - heatmap[y, x - 1], heatmap[y + 1, x] - heatmap[y - 1, x]]
    return place + 0.25 * np.sign(slope)


def _newton(heatmap: np.ndarray, x: int, y: int, place: np.ndarray) -> np.ndarray:
    height, width = heatmap.shape
    if not (1 < x < width - 2 and 1 < y < height - 2):
        return place
    blurred = _blurred(heatmap)
    h = np.log(np.maximum(blurred * (heatmap.max() / blurred.max()), 1e-10))
    slope = 0.5 * np.array([h[y, x + 1] - h[y, x - 1], h[y + 1, x] - h[y - 1, x]])
    xx, yy = (0.25 * (h[y + 2 * b, x + 2 * a] - 2 * h[y, x] + h[y - 2 * b, x - 2 * a]) for a, b in ((1, 0), (0, 1)))
    xy = 0.25 * (h[y + 1, x + 1] - h[y - 1, x + 1] - h[y + 1, x - 1] + h[y - 1, x - 1])
    if xx * yy == xy**2:
        return place
    return place - np.linalg.solve(np.array([[xx, xy], [xy, yy]]), slope)


def _blurred(heatmap: np.ndarray) -> np.ndarray:
    """A Gaussian over 11 x 11 cells at the old maximum; scipy's compiled filter stands for OpenCV's."""
    bell = np.exp(-((np.arange(KERNEL) - KERNEL // 2) ** 2) / (2 * KERNEL_STD**2)).astype(np.float32)
    for axis in (0, 1):
        heatmap = correlate1d(heatmap, bell / bell.sum(), axis, mode="constant")
    return heatmap
