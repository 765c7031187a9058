"""Colours of classes: each next one the farthest from all before it, to a normal and to a red-green blind eye."""

from __future__ import annotations

from functools import cache

import numpy as np

IGNORED = (38, 38, 38)  # pixels of no class
# Okabe and Ito's palette; what follows is chosen.
FIRST = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66))
LEVELS = np.linspace(0, 255, 9)  # of each channel, for the colours to choose from
DARKEST = 0.4  # lightness of a chosen colour, black 0 and white 1
# Vienot, Brettel and Mollon 1999: linear RGB to cones, and what an eye without one kind of cones makes of it.
CONES = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
PROTANOPE = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
DEUTERANOPE = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
# Ottosson 2020, Oklab: linear sRGB to cones, their cube roots to lightness and two axes of hue.
OK_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
OK_AXES = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


@cache
def colours(count: int) -> np.ndarray:
    """(count, 3) uint8; the first ones are the same whatever the count."""
    every = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), -1).reshape(-1, 3)
    every = every[_seen(every)[0][:, 0] >= DARKEST]
    chosen = [np.array(colour, dtype=float) for colour in FIRST]
    nearest = np.min([_distance(every, colour) for colour in (np.array(IGNORED, dtype=float), *chosen)], axis=0)
    while len(chosen) < count:
        chosen.append(every[int(nearest.argmax())])
        nearest = np.minimum(nearest, _distance(every, chosen[-1]))
    return np.stack(chosen[:count]).round().astype(np.uint8)


def _distance(every: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(N,): to the eye that tells the two apart the least."""
    return np.min([np.linalg.norm(a - b, axis=-1) for a, b in zip(_seen(every), _seen(colour), strict=True)], axis=0)


def _seen(rgb: np.ndarray) -> list[np.ndarray]:
    """(..., 3) Oklab of (..., 3) sRGB levels: by a normal, a protanope's and a deuteranope's eye."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    lost = [np.linalg.inv(CONES) @ blind @ CONES for blind in (PROTANOPE, DEUTERANOPE)]
    eyes = [np.clip(linear @ eye.T, 0, 1) for eye in (np.eye(3), *lost)]
    return [np.cbrt(light @ OK_CONES.T) @ OK_AXES.T for light in eyes]
