"""Where a student's targets come from: a teacher that is asked at every step, or a store that replays it exactly.

Both answer alike. Letters: B images, A timesteps, C teacher channels, g cells per side that a map is pooled to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.features import FeatureStore
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.losses import pooled
from diffrep.randomness import Rows, stream


class LiveHints:
    """The teacher itself: a truncated pass for each batch."""

    def __init__(
        self,
        reference: str,
        taps: Sequence[str],
        grid: int | None,
        noise: Literal["forward"] | None,
        allow_code: bool,
        passes: PassConfig | None = None,
    ) -> None:
        self.network = load_teacher(reference, allow_code)
        self.network.check_noise(noise)
        for tap in taps:
            if len(shape := self.network.tap(tap).shape) != 3:
                what = f"{shape[0]} tokens" if len(shape) == 2 else f"one vector of {shape[0]} numbers per image"
                raise UserError(f"tap '{tap}' of {self.network.name} gives {what}, not a map (C, h, w)")
        self.network.run_as(passes or PassConfig())
        self.network.keep_only(taps)
        self.grid, self.noise = grid, noise
        self.channels = {tap: self.network.tap(tap).shape[0] for tap in taps}
        self.name, self.licence, self.sha256 = self.network.name, self.network.licence, self.network.sha256
        self.labels_seen = self.network.labels_seen

    def check(self, timesteps: Sequence[int], image_size: int) -> None:
        """Refuse timesteps that the teacher does not have, and images of another size."""
        self.network.check_size(image_size, image_size)
        last = self.network.num_train_timesteps - 1
        if max(timesteps) > last:
            raise UserError(f"method.timestep: {max(timesteps)} is outside 0..{last} of {self.name}")

    def check_data(self, fingerprint: str, augment: str) -> None:
        """Any images will do."""

    def hints(self, batch: Batch, timestep: Tensor, taps: Sequence[str], rng: Rows | None = None) -> dict[str, Tensor]:
        """Tap -> (B, C, g, g) float32 without gradient, each image at its own timestep (B,); maps where grid is None.

        One pass, which ends at the deepest of the taps.
        """
        features = self.network.features(batch.images, timestep, list(dict.fromkeys(taps)), noise=self.noise, rng=rng)
        return {tap: f if self.grid is None else pooled(f, self.grid) for tap, f in features.items()}

    def multiply_adds(self, taps: Sequence[str]) -> int:
        """Per image and step, up to the deepest tap."""
        return max(self.network.multiply_adds(tap) for tap in taps)


class StoredHints:
    """A feature store in the teacher's place: the teacher is not even loaded."""

    def __init__(self, folder: str, taps: Sequence[str], grid: int | None) -> None:
        self.store = FeatureStore(folder)
        for tap in taps:
            self.store.check(tap, grid)
        self.channels = {tap: self.store.channels(tap) for tap in taps}
        self.name, self.licence, self.sha256 = self.store.teacher, self.store.licence, self.store.teacher_sha256
        self.labels_seen: dict[str, int] = self.store.manifest.get("teacher_labels_seen", {})

    def check(self, timesteps: Sequence[int], image_size: int) -> None:
        """Refuse timesteps that are not in the store."""
        self.store.check_timesteps(timesteps)

    def check_data(self, fingerprint: str, augment: str) -> None:
        """Refuse other images, or other views of them, than the store was written from."""
        self.store.check_source(fingerprint, augment)

    def hints(self, batch: Batch, timestep: Tensor, taps: Sequence[str], rng: Rows | None = None) -> dict[str, Tensor]:
        """Tap -> (B, C, g, g) float32 without gradient, each image at its own timestep (B,)."""
        return {t: self.store.gather(t, timestep, batch.view, batch.index, batch.images.device) for t in taps}

    def multiply_adds(self, taps: Sequence[str]) -> int:
        """None: writing the store had its own budget."""
        return 0


def statistics(
    hints: LiveHints | StoredHints, taps: Sequence[str], timesteps: Sequence[int], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Tap -> (A, 2, C) float64: mean and mean square per timestep and channel over ``batches``."""
    sums = {tap: torch.zeros(len(timesteps), 2, hints.channels[tap], dtype=torch.float64) for tap in taps}
    counts = dict.fromkeys(taps, 0)
    for number, batch in enumerate(batches):
        for row, t in enumerate(timesteps):
            rng = Rows(stream(0, "statistics", t, number, device=batch.images.device), len(batch.images))
            for tap, code in hints.hints(batch, torch.full_like(batch.index, t), taps, rng).items():
                codes = code.double()  # (B, C, g, g)
                sums[tap][row] += torch.stack([codes.sum((0, 2, 3)), codes.square().sum((0, 2, 3))]).cpu()
                counts[tap] += codes.numel() // codes.shape[1] if row == 0 else 0
    return {tap: total / max(counts[tap], 1) for tap, total in sums.items()}
