"""Files whose pixels are labels, not colours: decoded as they are, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffrep.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

NOTE = "note: "  # begins what ``faults`` of a set say that is worth knowing and stops no run


def opened(path: Path) -> Image.Image:
    """A decoded picture of any mode.

    Raises:
        UserError: it cannot be decoded.
    """
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise UserError(f"{path} is unreadable ({type(error).__name__})") from None
    return image


def size_of(path: Path) -> tuple[int, int]:
    """(H, W) of a picture, from its first bytes.

    Raises:
        UserError: it is none.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise UserError(f"{path} is unreadable ({type(error).__name__})") from None


def labels_in(path: Path, highest: int) -> np.ndarray:
    """(H, W) uint8, 0 to ``highest``; of a file with a palette the indices.

    Raises:
        UserError: an unreadable file, one of several channels or of more than 8 bits, a label above ``highest``.
    """
    image = opened(path)
    if image.mode not in ("L", "P"):
        raise UserError(f"{path} has the mode {image.mode}; labels have one channel of 8 bits (modes L and P)")
    labels = np.array(image)
    if labels.max() > highest:
        raise UserError(f"{path} has the label {labels.max()}; valid: 0 to {highest}")
    return labels
