"""Oxford Flowers-102 as its authors publish it: a folder of photographs and two MATLAB files.

Source: https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (Nilsback and Zisserman 2008).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffrep.data.containers import existing
from diffrep.data.images import Read, file_part, some_of
from diffrep.errors import UserError

_PARTS = {"train": "trnid", "validation": "valid", "test": "tstid"}  # the splits of setid.mat


def read_flowers(location: str) -> Read:
    """``jpg/image_00001.jpg``, ..., ``imagelabels.mat`` and ``setid.mat``, in the folder or in ``flowers-102`` there.

    The three official splits as they are; label k is class k + 1 of the authors, who name none.

    Raises:
        UserError: a missing file or image, or tables that do not fit together.
    """
    origin, base = f"flowers102:{location}", existing(location)
    base = base / "flowers-102" if (base / "flowers-102").is_dir() else base
    classes = _table(base / "imagelabels.mat", "labels")
    numbers = {part: _table(base / "setid.mat", key) for part, key in _PARTS.items()}
    together = np.concatenate(list(numbers.values()))
    if together.max() > len(classes) or len(np.unique(together)) < len(together):
        raise UserError(
            f"{base / 'setid.mat'}: numbers repeat or go beyond the {len(classes)} images of imagelabels.mat"
        )
    names = [f"jpg/image_{number:05d}.jpg" for number in range(1, len(classes) + 1)]
    whole = file_part(origin, base, names, (classes - 1).tolist())
    return (), {part: some_of(whole, (chosen - 1).tolist()) for part, chosen in numbers.items()}


def _table(path: Path, key: str) -> np.ndarray:
    """One row of whole numbers from 1, (n,) int64."""
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing; the folder holds jpg/, imagelabels.mat and setid.mat")
    try:
        found = loadmat(path, variable_names=[key])[key].reshape(-1)
    except Exception as error:  # damaged files make the reader raise nearly anything
        raise UserError(f"{path}: {key!r} cannot be read ({type(error).__name__}: {str(error)[:80]})") from None
    if found.dtype.kind not in "iu" or not len(found) or int(found.min()) < 1:
        raise UserError(f"{path}: {key!r} is no row of whole numbers from 1")
    return found.astype(np.int64)
