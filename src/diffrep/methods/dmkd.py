"""DM-KD, second half: a frozen classifier teaches a student on images that nobody took.

Li et al. 2023, "Is Synthetic Data From Diffusion Models Ready for Knowledge Distillation?", section 3.3: the student
minimises tau^2 KL(teacher || student) on augmented synthetic images; labels play no part. The images are drawn in
synthesis.py. Letters: B images, K classes, tau the softening of the logits.

Deviations from the official `train_student.py`: the teacher stands outside autograd and DDP (there it was
differentiated at every step); the weight of the label term counts (there it was read and ignored); the student is
chosen on held-out synthetic images or not at all (there on the real test set); other losses than KL by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import losses
from diffrep.config import Config
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.answers import LiveAnswers, StoredAnswers
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher
from diffrep.frozen.start import begin
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows


class KdLossConfig(Config):
    """Which distance between logits, and its weight."""

    name: Literal["kl", "mse", "dkd", "dist"] = "kl"
    kd_temperature: float = Field(10.0, gt=0)  # tau; released ImageNet script: 10
    standardise: bool = False  # logits to mean 0 and deviation 1 over the classes, on both sides
    kd_weight: float = Field(1.0, ge=0)
    label_weight: float = Field(0.0, ge=0)  # on cross-entropy with the set's own labels
    alpha: float = Field(1.0, ge=0)  # dkd: target against the rest
    beta: float = Field(8.0, ge=0)  # dkd: among the rest; dist: between the classes of an image
    gamma: float = Field(1.0, ge=0)  # dist: between the images of a class

    @model_validator(mode="after")
    def _fits(self) -> KdLossConfig:
        if not self.kd_weight and not self.label_weight:
            raise ValueError("kd_weight and label_weight are both 0: nothing is learnt")
        return self


class DMKDConfig(MethodConfig):
    """A teacher, a student, and how the one learns from the other."""

    kind: Literal["dmkd"] = "dmkd"
    teacher: ClassifierConfig
    student: StudentConfig
    init: str | None = None  # a finished run whose weights the student's backbone starts from
    loss: KdLossConfig = KdLossConfig()
    answers: str | None = None  # a stored teacher (`kind: answers`); None asks the teacher at every step

    def label_readers(self) -> tuple[str, ...]:
        return ("student",) if self.loss.label_weight or self.loss.name == "dkd" else ()


class DMKD(Method):
    """One step: teacher and student look at the same augmented images."""

    def __init__(self, config: DMKDConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config, self.image_size = config, image_size
        self._loading = (config.teacher, allow_code)
        self._judge: ClassifierTeacher | None = None
        self._held_out: Callable[[], Iterable[Batch]] | None = None
        self.teacher = StoredAnswers(config.answers) if config.answers else LiveAnswers(config.teacher, allow_code)
        self._check_classes(num_classes)
        self.student = Student(config.student, self.teacher.num_classes)
        start = begin(self.student, config.init) if config.init else None
        self.student.try_out(image_size)
        licence = (start and start.licence) or Method.licence
        self.licence = f"{licence}; taught by {self.teacher.name} ({self.teacher.licence})"
        self.labels_behind = {f"teacher: {part}": count for part, count in self.teacher.labels_seen.items()}
        if start:
            self.notes += (start.note,)
            self.labels_behind |= start.labels_behind

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. The teacher's answer to this very view.
        target = self.teacher.logits(batch)  # (B, K), no gradient

        # 2. The student's.
        logits = self.student(batch.images)  # (B, K)

        # 3. Their distance, and, where asked for, the labels of the set.
        kd_loss = kd_distance(self.config.loss, logits, target, batch.labels)
        loss = self.config.loss.kd_weight * kd_loss
        parts = {"kd_loss": kd_loss, "agreement": (logits.argmax(1) == target.argmax(1)).float().mean()}
        if self.config.loss.label_weight:
            assert batch.labels is not None  # refused by the recipe
            known = batch.labels >= 0
            each = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
            parts["label_loss"] = losses.mean_over(each, known)
            loss = loss + self.config.loss.label_weight * parts["label_loss"]
        return {"loss": loss, **parts}

    def _check_classes(self, num_classes: int) -> None:
        """Other classes than the teacher's do no harm as long as nobody reads the labels; it is said all the same."""
        if num_classes == self.teacher.num_classes or not num_classes:
            return
        told = f"{self.teacher.name} knows {self.teacher.num_classes} classes, the images have {num_classes}"
        if self.config.label_readers():
            raise UserError(f"{told}: set method.loss.label_weight=0 and loss.name=kl, which read no label")
        self.notes += (f"{told}; the student learns the teacher's, and no label of the images is read",)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """A network that begins with whitening sees training images; one that goes on from a run brings it along."""
        if not self.config.init:
            super().prepare(batches)

    def watch(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._held_out = batches

    @torch.no_grad()
    def held_out_score(self) -> float | None:
        """Minus the mean distance to the teacher on held-out images; no real image is read.

        Not their agreement: it reaches 100 % early, and then chooses by chance.
        """
        if self._held_out is None:
            return None
        was_training, total, count = self.student.training, 0.0, 0
        self.student.eval()
        for batch in self._held_out():
            logits, target = self.student(batch.images), self.judge(batch.images)
            distance = kd_distance(self.config.loss, logits, target, batch.labels)
            total, count = total + float(distance) * len(logits), count + len(logits)
        self.student.train(was_training)
        return -total / max(count, 1)

    def judge(self, images: Tensor) -> Tensor:
        """(B, K) logits of the teacher itself, whether or not its answers were stored."""
        if self._judge is None:
            live = self.teacher if isinstance(self.teacher, LiveAnswers) else LiveAnswers(*self._loading)
            self._judge = live.network
        return self._judge.logits(images)

    def check_data(self, fingerprint: str, augment: str, num_images: int) -> None:
        self.teacher.check_data(fingerprint, augment)

    def dry_step(self, images: Tensor) -> None:
        self.student(images).sum().backward()

    def frozen_multiply_adds(self) -> int:
        return self.teacher.multiply_adds(self.image_size)

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {"teacher": self.teacher.name, "num_classes": self.teacher.num_classes}


def kd_distance(config: KdLossConfig, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """() mean over the batch of the configured distance between logits (B, K)."""
    tau = config.kd_temperature
    if config.standardise:
        student, teacher = losses.standardised_logits(student), losses.standardised_logits(teacher)
    if config.name == "mse":
        return losses.logit_mse(student, teacher).mean()
    if config.name == "dist":
        return losses.dist(student, teacher, tau, config.beta, config.gamma)
    if config.name == "dkd":
        assert labels is not None  # refused by the recipe
        return losses.decoupled_kd(student, teacher, labels, tau, config.alpha, config.beta).mean()
    return losses.kd_kl(student, teacher, tau).mean()
