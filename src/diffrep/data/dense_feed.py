"""Which pictures a step of a dense task sees, and how each is cropped: functions of (seed, step, row) alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from diffrep.data.batch import Batch
from diffrep.data.dense import DenseSet
from diffrep.randomness import cycle, stream


class Views(Protocol):
    """How a picture and its truth are brought before the network in training."""

    def __call__(self, image: Tensor, truth: Any, rng: torch.Generator) -> tuple[Tensor, Any]:
        """(3, H, W) uint8 and its truth -> (3, h, w) uint8 or float32 in [0, 1], one size for all, and a target."""

    def collate(self, targets: list[Any]) -> Any:
        """The targets of some pictures as one ``Batch.target``; its tensors move to a device by :func:`moved`."""


class DenseFeed:
    """Batches of a training split; any rows of any step can be asked for, in any order."""

    def __init__(self, images: DenseSet, views: Views, batch_size: int, seed: int) -> None:
        self.images, self.views, self.batch_size, self.seed = images, views, batch_size, seed

    def to(self, device: torch.device) -> None:
        """Pictures are cropped where they are decoded, so nothing is moved before."""

    def batch(self, step: int, rows: list[int], device: torch.device) -> Batch:
        """``rows`` of the global batch of ``step``, on ``device``."""
        order = cycle(self.seed, "order", len(self.images), step * self.batch_size, self.batch_size)
        seen = [self._view(int(order[row]), stream(self.seed, "view", step, row)) for row in rows]
        images = torch.stack([image for image, _ in seen]).to(device)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255
        target = moved(self.views.collate([target for _, target in seen]), device)
        return Batch(images, None, order[rows].to(device), None, target)

    def _view(self, index: int, rng: torch.Generator) -> tuple[Tensor, Any]:
        image, truth = self.images[index]
        return self.views(image, truth, rng)

    def sweep(self, block_size: int, device: torch.device, limit: int | None = None) -> list[Batch]:
        """Nothing: no dense method looks at images before its first step."""
        return []


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of a tuple, list or dict on ``device``, the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(inner, device) for key, inner in value.items()}
    return type(value)(moved(inner, device) for inner in value) if isinstance(value, list | tuple) else value
