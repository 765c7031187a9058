"""Pictures with masks, made up: what tests of segmentation share."""

import numpy as np
import pytest
import torch
from torch import nn

from diffrep.data.dense import DensePart, DenseRead, DenseSet
from diffrep.errors import UserError

CLASSES = ("background", "left", "right", "hat")


def mask_set(masks, images=None, classes=CLASSES, mirrored=((1, 2),), subsets=None):
    """A split of these masks; without images each picture shows its mask: class k in the grey level 20 (k + 1)."""
    images = [shown(mask) for mask in masks] if images is None else images
    names = [f"face {k}" for k in range(len(masks))]
    part = DensePart(names, images.__getitem__, masks.__getitem__, subsets=subsets or {})
    read = DenseRead(classes, {"train": part}, mirrored, {"label_order": "toy"})
    return DenseSet("celebamask-hq:toy", "train", read, part, torch.arange(len(masks)), "none")


def shown(mask):
    """(H, W, 3) uint8."""
    return np.repeat((20 * (mask.numpy().astype(np.int64) % 255 + 1)).astype(np.uint8)[..., None], 3, 2)


def random_mask(height, width, num_classes=4, seed=0, ignored=0.1):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.randint(num_classes, (height, width), generator=rng).to(torch.uint8)
    return torch.where(torch.rand(height, width, generator=rng) < ignored, 255, mask)


def blocks(height=32, width=32, seed=0, num_classes=4):
    """Large fields of one class each."""
    coarse = random_mask(height // 8, width // 8, num_classes, seed, 0.0)
    return coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)


class Reader(nn.Module):
    """Reads the class off the grey level that :func:`shown` gave it: a perfect network for those pictures."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.num_classes, self.seen = num_classes, []

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        levels = 20 * (torch.arange(self.num_classes) + 1) / 255
        return -1e4 * (images[:, :1] - levels.view(1, -1, 1, 1)).square()


def refusal(read, place, part=None):
    """The one line with which ``read(place)`` refuses a set, or the first mask of one of its parts."""
    with pytest.raises(UserError) as caught:
        found = read(place)
        if part:
            found.parts[part].truth(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)
