"""Images that know nothing of the task: the controls that a claim about synthetic images needs.

``noise:COUNTxSIZE`` Gaussian noise; ``photographs:COUNTxSIZE`` crops of the two photographs inside scikit-learn;
``one_image:COUNTxSIZE`` one of them alone, cropped, turned, mirrored and mixed (after Asano and Saeed 2023). Without
labels; image k depends on k alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from diffrep.data.images import Part, Read
from diffrep.errors import UserError
from diffrep.randomness import derived_seed

SMALLEST, LARGEST = 0.05, 0.6  # of a crop's side, as a share of the photograph's shorter side
MIXED = 0.5  # share of the one image's views that are two crops laid over each other


def read_noise(location: str) -> Read:
    """Pixels N(0.5, 0.5^2), clipped to [0, 1]: standard normal in the range a network sees."""

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        return _bytes(rng.normal(0.5, 0.5, (size, size, 3)))

    return _part("noise", location, draw)


def read_photographs(location: str) -> Read:
    """Square crops of two photographs (a pagoda, a flower), nothing else done to them."""
    photographs = _photographs()
    return _part(
        "photographs", location, lambda rng, size: _crop(photographs[rng.integers(len(photographs))], rng, size)
    )


def read_one_image(location: str) -> Read:
    """Views of one photograph: crop, quarter turns, mirror, and half of them mixed with a second view."""
    photograph = _photographs()[0]

    def view(rng: np.random.Generator, size: int) -> np.ndarray:
        crop = np.rot90(_crop(photograph, rng, size), int(rng.integers(4)))
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        first = view(rng, size)
        if rng.random() >= MIXED:
            return np.ascontiguousarray(first)
        share = rng.random()
        return _bytes((share * first + (1 - share) * view(rng, size)) / 255)

    return _part("one_image", location, draw)


def _part(kind: str, location: str, draw: Callable[[np.random.Generator, int], np.ndarray]) -> Read:
    found = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,3})", location)
    if not found:
        raise UserError(f"data source {kind}:{location}: the form is {kind}:COUNTxSIZE, e.g. {kind}:2000x8")
    count, size = int(found[1]), int(found[2])

    def read(k: int) -> np.ndarray:
        return draw(np.random.Generator(np.random.PCG64(derived_seed(0, f"control {kind}", k))), size)

    return (), {"train": Part([f"{kind}[{k}]" for k in range(count)], read, None)}


def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)  # (427, 640, 3) uint8 each


def _crop(photograph: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random square of the photograph, shrunk to ``size``."""
    from PIL import Image

    height, width = photograph.shape[:2]
    side = max(size, round(rng.uniform(SMALLEST, LARGEST) * min(height, width)))
    side = min(side, height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    image = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
