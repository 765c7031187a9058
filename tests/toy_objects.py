"""Pictures of coloured rectangles and discs whose objects are known, for the tests of detection."""

import io

import numpy as np
import torch
from PIL import Image

from diffrep.data.coco import Objects
from diffrep.data.dense import DensePart, DenseRead, DenseSet

CLASSES = ("box", "disc")
CATEGORY_IDS = [3, 18]


def shapes(height=96, width=128, count=3, seed=0):
    """An image (H, W, 3) uint8 and its objects: rectangles and discs on noise, none of them hidden."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    masks, labels, taken = [], [], np.zeros((height, width), dtype=bool)
    while len(masks) < count:
        side, label = int(rng.integers(height // 8, height // 3)), int(rng.integers(2))
        top, left = int(rng.integers(height - side)), int(rng.integers(width - side))
        inside = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
        if label:
            inside = (y + 0.5 - top - side / 2) ** 2 + (x + 0.5 - left - side / 2) ** 2 <= side**2 / 4
        if (inside & taken).any():
            continue
        taken |= inside
        image[inside] = (220, 60, 60) if label else (60, 90, 230)
        masks.append(inside)
        labels.append(label)
    stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    return image, Objects.from_masks(stacked, torch.tensor(labels, dtype=torch.int64), picture=100 + seed)


def object_set(pictures, split="train"):
    """A DenseSet of (image, objects) pairs."""
    encoded = [_png(image) for image, _ in pictures]
    names = [f"{k}.png" for k in range(len(pictures))]
    part = DensePart(names, encoded.__getitem__, [truth for _, truth in pictures].__getitem__)
    read = DenseRead(CLASSES, {split: part}, facts={"category_ids": CATEGORY_IDS})
    return DenseSet("toy", split, read, part, torch.arange(len(pictures)), "none")


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
