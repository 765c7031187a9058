"""What the loop knows of a method, and all it knows.

A method is a module that turns a batch into named losses. Frozen networks stand in plain attributes
(:class:`diffrep.frozen.base.FrozenModule` is no module), so optimiser, checkpoint and DDP never meet them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.config import Config
from diffrep.data.batch import Batch
from diffrep.files import write_json
from diffrep.models.stored import student_card
from diffrep.models.students import Student
from diffrep.models.weights import write_weights
from diffrep.randomness import Rows


class MethodConfig(Config):
    """What a recipe may ask of any method's settings before anything is built."""

    def label_readers(self) -> tuple[str, ...]:
        """The parts of training that look at labels, by the names a report prints."""
        return ()

    def compares_images(self) -> tuple[str, int] | None:
        """What holds the images of a batch against each other, in a user's words, and how many it takes."""
        return None


class Method(nn.Module):
    """One road. Subclasses are built from their own config and decide nothing about devices or data."""

    licence: str = "Apache-2.0 (weights trained here)"  # of what ``export`` writes; a teacher's licence is added

    labels_behind: dict[str, int] = {}  # labels that what it starts from has seen, by part
    notes: tuple[str, ...] = ()  # what a user should know of this run, in sentences
    uses_all_parameters: bool = True  # False: some parameters get no gradient in some steps

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Look once at unaugmented training images before the first step (statistics).

        What every student needs: one that begins with whitening sees them.
        """
        student = self._modules.get("student")
        if isinstance(student, Student) and hasattr(student.backbone, "whiten"):
            student.backbone.whiten(torch.cat([student.normalise(batch.images) for batch in batches]))

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        """Named scalars: ``loss`` is what is minimised, the rest is its parts and what is worth a curve.

        Args:
            batch: images in [0, 1], see :class:`Batch`.
            rng: the draws of this step for these rows.
            progress: share of the training done, in [0, 1).
        """
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the names that ``optim.group_lr`` may give a rate of their own."""
        return {"student": [p for p in self.parameters() if p.requires_grad]}

    def depths(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """Parameters layer by layer, the head last, for ``optim.layer_decay`` ([]: no order is known); and what
        ``optim.weight_decay_exclude_1d`` spares besides biases and norms, such as tables of positions."""
        return [], []

    def watch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Be shown held-out images of the training source, untouched; most methods choose nothing by them."""

    def held_out_score(self) -> float | None:
        """How good the network is on held-out images, asked at every checkpoint: larger is better; None: no opinion."""
        return None

    def after_step(self) -> None:
        """Called once per update, after the optimiser; what is learnt outside gradients is brought up to date here."""

    def check_data(self, fingerprint: str, augment: str, num_images: int) -> None:
        """Meet the training set: refuse images that a cache was not made from, make room for as many as there are."""

    def export(self, run_dir: Path) -> dict[str, Any]:
        """Write the network to keep into ``run_dir``; returns what ``result.json`` should say of it."""
        raise NotImplementedError

    def illustrate(self, run_dir: Path, count: int, num_sampling_steps: str, seed: int) -> None:
        """Pictures worth having in ``samples/``; most methods have none."""

    def dry_step(self, images: Tensor) -> None:
        """The arithmetic of one forward and backward pass, run on meta tensors to count multiply-adds."""
        raise NotImplementedError

    def frozen_multiply_adds(self) -> int:
        """Multiply-adds per image and step in frozen networks, which have no backward pass."""
        return 0


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes; itself where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def save_student(run_dir: Path, student: Student) -> None:
    """The backbone's weights under timm's own names, and what is needed to build it again."""
    write_weights(run_dir / "weights.safetensors", student.backbone.state_dict())
    write_json(run_dir / "config.json", student_card(student))
