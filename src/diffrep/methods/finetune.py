"""Fine-tuning for classification: a student, from scratch or from a distilled run, learns from labelled images.

Source: official `classification_distill/baseline` configs (cross-entropy, a new linear head on the pooled vector,
nothing frozen). Deviation: loading is strict; what is missing or does not fit is an error, not a printed line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.errors import UserError, nearest
from diffrep.files import read_json
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.stored import Fit, compare
from diffrep.models.students import Student, StudentConfig
from diffrep.models.weights import read_weights
from diffrep.randomness import Rows


class FinetuneConfig(MethodConfig):
    """Stage 2. Without ``init`` it is the from-scratch baseline."""

    kind: Literal["finetune"] = "finetune"
    student: StudentConfig
    init: str | None = None  # a finished run whose weights the backbone starts from
    init_skip: tuple[str, ...] = ()  # tensors of init that are left there, e.g. conv1.weight of another stem
    head_first: float = Field(0.0, ge=0, lt=1)  # share of the steps in which only the head learns
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    stem_until: float = Field(1.0, ge=0, le=1)  # share of the steps in which the bias of a whitening stem learns

    def label_readers(self) -> tuple[str, ...]:
        return ("student",)


class Finetune(Method):
    """Cross-entropy on labelled images."""

    def __init__(self, config: FinetuneConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.student = Student(config.student, num_classes)
        self._stem_can_stop()
        self.uses_all_parameters = config.head_first == 0 and config.stem_until == 1
        self.loaded = load_backbone(self.student, Path(config.init), config.init_skip) if config.init else None
        self.student.try_out(image_size)
        if config.init:
            self.notes = (f"started from {config.init}: {self.loaded}",)
            start = read_json(Path(config.init) / "result.json")
            self.licence = start.get("licence", Method.licence)
            seen = start.get("labels_seen", {}) | start.get("labels_behind", {})
            self.labels_behind = {f"before: {part}": n for part, n in seen.items()}

    def _stem_can_stop(self) -> None:
        if self.config.stem_until < 1 and not hasattr(self.student.backbone, "stem_learns"):
            raise UserError(f"method.stem_until: {self.config.student.name} has no whitening stem; fast_cnn has")

    def prepare(self, batches: Iterable[Batch]) -> None:
        """A network that begins with whitening sees training images; one that goes on from a run brings it along."""
        whiten = getattr(self.student.backbone, "whiten", None)
        if whiten is not None and not self.config.init:
            whiten(torch.cat([self.student.normalise(batch.images) for batch in batches]))

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None  # refused by the recipe
        known = batch.labels >= 0
        if self.config.stem_until < 1:
            self.student.backbone.stem_learns = progress < self.config.stem_until
        if progress < self.config.head_first:
            logits = self.student.backbone.get_classifier()(self._frozen_vector(batch.images))
        else:
            logits = self.student(batch.images)
        each = F.cross_entropy(
            logits, batch.labels.clamp(min=0), reduction="none", label_smoothing=self.config.label_smoothing
        )
        correct = (logits.detach().argmax(1) == batch.labels).float()
        top1 = torch.where(known, correct, 0).sum() / known.sum().clamp(min=1)
        return {"loss": losses.mean_over(each, known), "train_top1": top1}

    @torch.no_grad()
    def _frozen_vector(self, images: Tensor) -> Tensor:
        """The pooled vector with batch statistics left alone, as a linear probe sees it."""
        was_training = self.student.training
        vector = self.student.eval().pooled(images)
        self.student.train(was_training)
        return vector

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        if own := getattr(self.student.backbone, "rate_parts", None):
            return own()
        head = {id(p) for p in self.student.backbone.get_classifier().parameters()}
        parameters = list(self.student.parameters())
        return {
            "student": [p for p in parameters if id(p) not in head],
            "head": [p for p in parameters if id(p) in head],
        }

    def dry_step(self, images: Tensor) -> None:
        self.student(images).sum().backward()

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {"init": self.config.init, "loaded": asdict(self.loaded) if self.loaded else None}


def load_backbone(student: Student, run_dir: Path, skip: tuple[str, ...] = ()) -> Fit:
    """Start ``student`` from a finished run's backbone; only the classifier may differ. Returns what was taken over.

    Args:
        skip: names of further tensors that stay as ``student`` has them.

    Raises:
        UserError: the run has no student, or a tensor is missing, left over or of another shape.
    """
    if not (run_dir / "result.json").exists():
        raise UserError(f"method.init: {run_dir} is no finished run (no result.json)")
    state = read_weights(run_dir / "weights.safetensors")
    taught = read_json(run_dir / "config.json")["student"]
    own = student.backbone.state_dict()
    if unknown := [name for name in skip if name not in own]:
        raise UserError(f"method.init_skip: {student.config.name} has no '{unknown[0]}'; {nearest(unknown[0], own)}")
    fit = compare(state, own, (_classifier_prefix(student.backbone), *skip))
    if not fit.is_whole:
        there = "" if taught["name"] == student.config.name else f", a {taught['name']},"
        raise UserError(f"method.init: {run_dir}{there} does not fit {student.config.name}: {fit}")
    for key in ("mean", "std"):
        if tuple(taught[key]) != getattr(student.config, key):
            raise UserError(
                f"method.init: {run_dir} saw images with {key} {taught[key]}; set method.student.{key} to it"
            )
    student.backbone.load_state_dict(own | {k: v for k, v in state.items() if k in own and k not in fit.new})
    return fit


def _classifier_prefix(backbone: nn.Module) -> str:
    classifier = backbone.get_classifier()
    return next((f"{n}." for n, m in backbone.named_modules() if m is classifier and n), "\0")
