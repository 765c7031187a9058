"""Which images a step sees, and how they are augmented: both functions of (seed, step) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, ImageSet
from diffrep.data.timm_views import TimmConfig, TimmViews
from diffrep.data.transforms import augmentation
from diffrep.randomness import cycle, stream


class Feed:
    """Batches of a training split; any rows of any step can be asked for, in any order.

    images:   the split; a small one lives on the device as one uint8 tensor.
    labelled: (L,) positions whose labels this run may use; None: all that the source has.
    timm: what timm does to the images of a step behind ``config.augment``; None: nothing.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        batch_size: int,
        seed: int,
        labelled: Tensor | None,
        timm: TimmConfig | None = None,
    ) -> None:
        self.images, self.seed, self.batch_size, self.labelled = images, seed, batch_size, labelled
        self.augmentation = augmentation(config.augment)
        self.timm = TimmViews(timm, batch_size, seed) if timm else None
        self.num_labelled = round((config.labelled_share or 0) * batch_size)

    def to(self, device: torch.device) -> None:
        """Bring a small set to where it will be augmented."""
        self.images.to(device)

    def index(self, step: int) -> Tensor:
        """The global batch of ``step``, (B,) int64: first the share drawn from the labelled images, then the rest."""
        rest = self.batch_size - self.num_labelled
        order = cycle(self.seed, "order", len(self.images), step * rest, rest)
        if not self.num_labelled or self.labelled is None:
            return order
        chosen = cycle(self.seed, "labelled order", len(self.labelled), step * self.num_labelled, self.num_labelled)
        return torch.cat([self.labelled[chosen], order])

    def epoch(self, step: int) -> Tensor:
        """(B,) int64, how often each row's image was shown before: by its own cycle, the labelled or the other."""
        rest = self.batch_size - self.num_labelled
        order = (step * rest + torch.arange(rest)) // len(self.images)
        if not self.num_labelled or self.labelled is None:
            return order
        chosen = (step * self.num_labelled + torch.arange(self.num_labelled)) // len(self.labelled)
        return torch.cat([chosen, order])

    def view(self, step: int) -> Tensor:
        """(B,) int64, the augmentation's view of each row."""
        if self.augmentation.alternates:
            return self.augmentation.scheduled(self.seed, self.index(step), self.epoch(step))
        rng = stream(self.seed, "view", step)
        return torch.randint(0, self.augmentation.num_views, (self.batch_size,), generator=rng)

    def batch(self, step: int, rows: list[int], device: torch.device) -> Batch:
        """``rows`` of the global batch of ``step``, on ``device``."""

        def gather(these: list[int]) -> Batch:
            return self.gather(self.index(step)[these], self.view(step)[these], device)

        return self.timm.batch(step, rows, gather) if self.timm else gather(rows)

    def gather(self, index: Tensor, view: Tensor, device: torch.device) -> Batch:
        """These images in these views, (B, 3, H, W) float32 in [0, 1]."""
        partners = self.augmentation.partners(index, view, len(self.images))
        others = None if partners is None else self.images.gather(partners).to(device)
        shown = view if self.augmentation.needs_index else view.to(device)  # hashed numbers are made on the CPU
        pixels = self.augmentation.apply(self.images.gather(index).to(device), shown, index, others)
        return self._batch(pixels, index, view, device)

    def _batch(self, pixels: Tensor, index: Tensor, view: Tensor, device: torch.device) -> Batch:
        labels = self.images.labels
        return Batch(
            images=pixels.to(torch.float32) / 255,
            labels=None if labels is None else labels[index.to(labels.device)].to(device),
            index=index.to(device),
            view=view.to(device),
        )

    def sweep(self, block_size: int, device: torch.device, limit: int | None = None) -> list[Batch]:
        """At most ``limit`` images in order, untouched by augmentation, as batches.

        Fewer than all are spread evenly: a folder's first images are all of its first classes.
        """
        total = min(len(self.images), limit or len(self.images))
        spread = torch.arange(total) * len(self.images) // max(total, 1)
        positions = [spread[start : start + block_size] for start in range(0, total, block_size)]
        return [self._batch(self.images.gather(p).to(device), p, torch.zeros_like(p), device) for p in positions]
