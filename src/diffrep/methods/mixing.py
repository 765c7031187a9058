"""Mixing: a descriptor of all of a frozen diffusion model's taps and timesteps, in shares that are learned.

Luo et al., "Diffusion Hyperfeatures", NeurIPS 2023. The mix itself is models/mixing.py; what a run keeps is opened as a
teacher by frozen/mixed.py. Letters: B images, T timesteps, L taps, D width of the descriptor, K classes.

Deviations: (1) The images stay clean and only the timestep speaks of noise, as in RepFusion; there they are inverted.
(2) Trained by classification of a few labelled images with a linear head, which is thrown away, not by matching points.
(3) Maps are standardised by the training images and projections normalised, so that a weight is a share.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.frozen.mixed import MixCard, MixReader, write_mix
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.base import Method, MethodConfig
from diffrep.models.mixing import Mix, MixConfig
from diffrep.randomness import Rows


class MixingConfig(MixConfig, MethodConfig):
    """Which maps are mixed, and how the teacher is run."""

    kind: Literal["mixing"] = "mixing"
    teacher: str  # as for repfusion
    passes: PassConfig = PassConfig()  # how the teacher is run

    def label_readers(self) -> tuple[str, ...]:
        return ("mixing",)


STATISTICS_SHARE = 4  # of the images that `prepare` is shown, every fourth: pixels of a map are many


class Mixing(Method):
    """Projections, weights and a linear head on the pooled descriptor."""

    def __init__(self, config: MixingConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.teacher = load_teacher(config.teacher, allow_code)  # frozen, no module
        self.teacher.check_size(image_size, image_size)
        self.reader = MixReader(self.teacher, config)
        self.teacher.run_as(config.passes)
        self.teacher.keep_only(config.taps)
        self.mix = Mix(config, self.reader.channels)
        self.head = nn.Linear(config.width, num_classes)
        self.labels_behind = {f"teacher: {part}": n for part, n in self.teacher.labels_seen.items()}
        self.licence = f"{Method.licence}; mixes features of {self.teacher.name} ({self.teacher.licence})"

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None  # refused by the recipe
        known = batch.labels >= 0
        logits = self.classify(self.reader.maps(batch.images))
        each = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
        correct = (logits.detach().argmax(1) == batch.labels).float()
        return {
            "loss": losses.mean_over(each, known),
            "train_top1": torch.where(known, correct, 0).sum() / known.sum().clamp(min=1),
            "mix_weights": self.mix.weights.flatten(),  # (T L,), the taps of each timestep in turn
        }

    def classify(self, maps: list[Tensor]) -> Tensor:
        """One (T, B, C, g, g) per tap -> logits (B, K)."""
        return self.head(losses.pooled(self.mix(maps), 1).flatten(1))

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Mean and deviation of every channel at each tap and timestep; no label is looked at."""
        sums: list[Tensor] = []  # per tap (2, T, C), of means over a block
        count = 0
        for batch in batches:
            images = batch.images[::STATISTICS_SHARE]
            maps = [each.double().cpu() for each in self.reader.maps(images)]
            found = [torch.stack([m.mean((1, 3, 4)), m.square().mean((1, 3, 4))]) * len(images) for m in maps]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            count += len(images)
        for project, total in zip(self.mix.projections, sums, strict=True):
            project.standardise_by(*(total / count))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "projections": [*self.mix.projections.parameters()],
            "weights": [self.mix.logits],
            "head": [*self.head.parameters()],
        }

    def dry_step(self, images: Tensor) -> None:
        """Projections, weights and head; the teacher's share is counted apart."""
        self.classify(self.reader.shapes(len(images))).sum().backward()

    def frozen_multiply_adds(self) -> int:
        return self.reader.multiply_adds()

    def export(self, run_dir: Path) -> dict[str, Any]:
        config = self.config
        shared = {name: getattr(config, name) for name in MixConfig.model_fields}
        write_mix(run_dir, self.mix, MixCard(**shared, teacher=config.teacher, teacher_sha256=self.teacher.sha256))
        return {
            "teacher": self.teacher.name,
            "descriptor": [config.width, config.grid, config.grid],
            "mix_weights": self.report(),
        }

    def report(self) -> list[dict[str, Any]]:
        """The weight of each tap at each timestep; their sum is 1."""
        rows = zip(self.config.timesteps, self.mix.weights.tolist(), strict=True)
        return [
            {"tap": tap, "timestep": t, "weight": round(weight, 6)}
            for t, row in rows
            for tap, weight in zip(self.config.taps, row, strict=True)
        ]
