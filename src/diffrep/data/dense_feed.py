"""Which pictures a step of a dense task sees, and how each is cropped: functions of (seed, step, row) alone."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrep.data.batch import Batch
from diffrep.data.dense import DenseSet
from diffrep.randomness import cycle, stream

MOST_THREADS = 8  # that crop pictures


class Views(Protocol):
    """How a picture and its truth are brought before the network in training."""

    def __call__(self, image: Tensor, truth: Any, rng: torch.Generator) -> tuple[Tensor, Any]:
        """(3, H, W) uint8 and its truth -> (3, h, w) uint8 or float32 in [0, 1], one size for all, and a target."""

    def collate(self, targets: list[Any]) -> Any:
        """The targets of some pictures as one ``Batch.target``; its tensors move to a device by :func:`moved`."""


class DenseFeed:
    """Batches of a training split; any rows of any step can be asked for, in any order.

    Pictures are read and cropped by a few threads, those of the next step while the network works on this one.
    """

    def __init__(self, images: DenseSet, views: Views, batch_size: int, seed: int) -> None:
        self.images, self.views, self.batch_size, self.seed = images, views, batch_size, seed
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[tuple[int, int], Future[tuple[Tensor, Any]]] = {}  # by step and row

    def to(self, device: torch.device) -> None:
        """Pictures are cropped where they are decoded, so nothing is moved before."""

    def batch(self, step: int, rows: list[int], device: torch.device) -> Batch:
        """``rows`` of the global batch of ``step``, on ``device``."""
        self._asked = {key: view for key, view in self._asked.items() if key[0] in (step, step + 1)}
        for soon in (step, step + 1):
            self._ask(soon, rows)
        seen = [self._asked.pop((step, row)).result() for row in rows]
        images = torch.stack([image for image, _ in seen]).to(device)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255
        target = moved(self.views.collate([target for _, target in seen]), device)
        return Batch(images, None, self._order(step)[rows].to(device), None, target)

    def _order(self, step: int) -> Tensor:
        return cycle(self.seed, "order", len(self.images), step * self.batch_size, self.batch_size)

    def _ask(self, step: int, rows: list[int]) -> None:
        """Have these rows made, unless they are on their way."""
        self._pool = self._pool or ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        order = self._order(step)
        for row in rows:
            if (step, row) not in self._asked:
                self._asked[step, row] = self._pool.submit(self._view, step, row, int(order[row]))

    def _view(self, step: int, row: int, index: int) -> tuple[Tensor, Any]:
        image, truth = self.images[index]
        return self.views(image, truth, stream(self.seed, "view", step, row))

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
