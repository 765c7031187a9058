"""Fine-tuning for classification: a student, from scratch or from a distilled run, learns from labelled images.

Source: RepFusion's `classification_distill/baseline` configs (cross-entropy, a new linear head on the pooled vector,
nothing frozen); ADDP's `main_finetune` for ViTs; MAE's `main_linprobe` for a frozen trunk.
Deviations: loading is strict, so what is missing or does not fit is an error, not a printed line; ``pooling`` "cls"
reads the class token through its norm (official ADDP: still the mean, and without any norm); ``tokenizer_norm`` can be
kept (official: dropped without a word).
Letters: B images, D width of the pooled vector, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep import losses
from diffrep.data.batch import Batch, Mixture
from diffrep.data.timm_views import TimmConfig
from diffrep.errors import UserError
from diffrep.frozen.start import begin
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models import depths
from diffrep.models.stored import Fit
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows

HEAD_EPS = 1e-6  # of MAE's BatchNorm before the head


class FinetuneConfig(MethodConfig):
    """Stage 2. Without ``init`` it is the from-scratch baseline."""

    kind: Literal["finetune"] = "finetune"
    student: StudentConfig
    # a finished run whose weights the backbone starts from, or a folder with an ADDP network (diffrep convert)
    init: str | None = None
    init_skip: tuple[str, ...] = ()  # tensors of init that are left there, e.g. conv1.weight of another stem
    tokenizer_norm: bool | None = None  # the norm behind an ADDP encoder's embeddings; None: as init has it
    pooling: Literal["avg", "cls"] | None = None  # a ViT's vector: mean of the patches, class token; None: its options
    drop_path: float = Field(0.0, ge=0, lt=1)  # of the last block; rises linearly from 0 at the first
    head_std: float | None = Field(None, gt=0)  # of the fresh head's weights, with biases 0; None: the network's own
    head_first: float = Field(0.0, ge=0, le=1)  # share of the steps in which only the head learns; 1: linear probe
    head_norm: bool = False  # BatchNorm without weights before the head of a linear probe; folded into it in the end
    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    stem_until: float = Field(1.0, ge=0, le=1)  # share of the steps in which the bias of a whitening stem learns
    augment: TimmConfig | None = None  # behind data.augment

    @model_validator(mode="after")
    def _norm_of_a_probe(self) -> FinetuneConfig:
        if self.head_norm and self.head_first < 1:
            raise ValueError("head_norm is part of a linear probe: it needs head_first 1")
        return self

    def whole_student(self) -> StudentConfig:
        """``student`` with the options that other fields stand for."""
        options = dict(self.student.options)
        options |= {"drop_path_rate": self.drop_path} if self.drop_path else {}
        options |= {"global_pool": {"avg": "avg", "cls": "token"}[self.pooling]} if self.pooling else {}
        options |= {"pre_norm": self.tokenizer_norm} if self.tokenizer_norm is not None else {}
        return self.student.model_copy(update={"options": options})

    def label_readers(self) -> tuple[str, ...]:
        return ("student",)


class Finetune(Method):
    """Cross-entropy on labelled images."""

    def __init__(self, config: FinetuneConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.student = Student(config.whole_student(), num_classes)
        self._stem_can_stop()
        self.loaded = self._load(config) if config.init else None
        self.student.try_out(image_size)
        self.head_norm = self._fresh_head(config)
        if config.head_first == 1:
            self.student.requires_grad_(False)
            self.student.backbone.get_classifier().requires_grad_(True)
        self.uses_all_parameters = config.head_first in (0, 1) and config.stem_until == 1

    def _fresh_head(self, config: FinetuneConfig) -> nn.BatchNorm1d | None:
        """The norm before the head, where there is one; the head begins as the config says."""
        if not (config.head_norm or config.head_std):
            return None
        head = self.student.backbone.get_classifier()
        if not isinstance(head, nn.Linear) or head.bias is None:
            what = f"the head of {config.student.name} is no linear layer with biases"
            raise UserError(f"method.head_norm, method.head_std: {what}")
        if config.head_std is not None:
            nn.init.trunc_normal_(head.weight, std=config.head_std)
            nn.init.zeros_(head.bias)
        return nn.BatchNorm1d(head.in_features, HEAD_EPS, affine=False) if config.head_norm else None

    def _load(self, config: FinetuneConfig) -> Fit:
        """Start from ``init``, whose licence and labels this run inherits."""
        start = begin(self.student, str(config.init), config.init_skip, config.tokenizer_norm)
        self.notes, self.labels_behind = (start.note,), start.labels_behind
        self.licence = start.licence or self.licence
        return start.fit

    def _stem_can_stop(self) -> None:
        if self.config.stem_until < 1 and not hasattr(self.student.backbone, "stem_learns"):
            raise UserError(f"method.stem_until: {self.config.student.name} has no whitening stem; fast_cnn has")

    def prepare(self, batches: Iterable[Batch]) -> None:
        """A network that begins with whitening sees training images; one that goes on from a run brings it along."""
        if not self.config.init:
            super().prepare(batches)

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None  # refused by the recipe
        if self.config.stem_until < 1:
            self.student.backbone.stem_learns = progress < self.config.stem_until
        if progress < self.config.head_first:
            vector = self._frozen_vector(batch.images)
            vector = vector if self.head_norm is None else self.head_norm(vector.float())
            logits = self.student.backbone.get_classifier()(vector)
        else:
            logits = self.student(batch.images)
        known = batch.labels >= 0
        correct = (logits.detach().argmax(1) == batch.labels).float()
        top1 = torch.where(known, correct, 0).sum() / known.sum().clamp(min=1)
        return {"loss": self._loss(logits, batch), "train_top1": top1}

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of a mixed target is both labels' losses, mixed; so a hidden label takes its share away with it."""
        shares = [(1.0, batch.labels)]
        if isinstance(batch.target, Mixture):
            shares = [(batch.target.share, batch.labels), (1 - batch.target.share, batch.target.labels)]
        of = losses.binary_cross_entropy if self.config.loss == "bce" else losses.cross_entropy
        each = [
            share * losses.mean_over(of(logits, labels.clamp(min=0), self.config.label_smoothing), labels >= 0)
            for share, labels in shares
            if labels is not None
        ]
        return torch.stack(each).sum()

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
        trunk = [p for p in parameters if id(p) not in head and p.requires_grad]
        return {"student": trunk, "head": [p for p in parameters if id(p) in head]}

    def depths(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        return depths.layers(self.student.backbone), depths.tables(self.student.backbone)

    def dry_step(self, images: Tensor) -> None:
        self.student(images).sum().backward()

    def export(self, run_dir: Path) -> dict[str, Any]:
        if self.head_norm is not None:
            fold(self.head_norm, self.student.backbone.get_classifier())
        save_student(run_dir, self.student)
        return {"init": self.config.init, "loaded": asdict(self.loaded) if self.loaded else None}


@torch.no_grad()
def fold(norm: nn.BatchNorm1d, head: nn.Linear) -> None:
    """Let ``head`` answer alone what it answers behind ``norm``, which then changes nothing."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    head.weight.mul_(scale)
    head.bias.sub_(head.weight @ norm.running_mean)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
