"""Where the real data lie (DIFFREP_DATA, default ../shared), and a maker of small image folders."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shared() -> Path:
    """$DIFFREP_DATA/data, or a skip that says what is missing."""
    folder = (ROOT / os.environ.get("DIFFREP_DATA", "../shared") / "data").resolve()
    if not folder.is_dir():
        pytest.skip("no real data: set DIFFREP_DATA to the folder that holds data/cifar10 and data/fixtures")
    return folder


@pytest.fixture
def make_folder(tmp_path):
    """make_folder({"train/cat": 3, "": 2}) writes so many 8x8 PNG files into each folder and returns the root."""

    def make(counts: dict[str, int], name: str = "images") -> Path:
        root = tmp_path / name
        root.mkdir()
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                pixels = np.random.default_rng((number, k)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{k:03d}.png")
        return root

    return make
