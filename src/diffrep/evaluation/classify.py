"""How good a student is: its frozen features by linear probe and neighbours, and its own top-1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.data.datasets import ImageSet, label_subset
from diffrep.data.sources import parse_any
from diffrep.errors import UserError
from diffrep.evaluation import probe
from diffrep.models import stored
from diffrep.models.students import Student, StudentConfig


class EvaluateConfig(Config):
    """What is measured after training, on the test split, which nothing else reads."""

    # features: linear probe and neighbours; classifier: top-1, top-5, calibration, agreement with the teacher
    protocol: Literal["features", "classifier"] = "features"
    views: Literal[1, 6] = 1  # 6: classifier also says top1_six_views, of answers averaged over mirror image and shifts
    source: str | None = None  # data reference whose test split is read; None = the training data's own
    probe_labels: tuple[int, ...] = ()  # label counts of the linear probe; () = as many as training may read
    knn: int = Field(1, ge=1)  # neighbours
    samples: int = Field(20, ge=0)  # images a diffusion model draws; predictions of a dense task that are shown
    num_sampling_steps: str = "20"  # of those images: N, a,b,c or ddimN

    @field_validator("source")
    @classmethod
    def _source_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            parse_any(value)
        return value

    @model_validator(mode="after")
    def _fits(self) -> EvaluateConfig:
        if self.views != 1 and self.protocol != "classifier":
            raise ValueError("views 6 averages a classifier's answers: set protocol 'classifier'")
        return self

    @field_validator("num_sampling_steps", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value


def student_scores(
    student: Student,
    train: ImageSet,
    test: ImageSet,
    counts: Sequence[int],
    knn: int,
    label_seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Percentages by name: ``linear_probe_50``, ``knn_50``, ... and ``top1`` where the student has a classifier.

    The labelled images are the class-balanced draw of ``label_seed``: those that training with as many labels sees.
    """
    if train.labels is None or test.labels is None:
        raise UserError(f"evaluate: {train.name} has no labels to score against")
    student.eval().to(device)
    num_classes, scores = len(train.classes), {}
    train, draws = relevant(train, [label_subset(train.labels, n, label_seed) for n in counts])
    assert train.labels is not None  # as before
    seen, held_out = (outputs(student.pooled, images, device) for images in (train, test))
    for n, linear in zip(
        counts, probe.probe_scores(seen, train.labels, held_out, test.labels, draws, num_classes), strict=True
    ):
        scores[f"linear_probe_{n}"] = linear
    standard, standard_test = probe.standardise(seen, held_out)
    for n, draw in zip(counts, draws, strict=True):
        found = probe.nearest_neighbours(standard[draw], train.labels[draw], standard_test, num_classes, knn)
        scores[f"knn_{n}"] = probe.accuracy(found, test.labels)
    if getattr(student.backbone, "num_classes", 0) == num_classes:
        scores["top1"] = probe.accuracy(outputs(student, test, device).argmax(1), test.labels)
    return {name: round(score, 3) for name, score in scores.items()} | {"test_images": len(test)}


def classifier_scores(
    classifier: Callable[[Tensor], Tensor],
    test: ImageSet,
    device: torch.device,
    teacher: Callable[[Tensor], Tensor] | None = None,
    views: int = 1,
) -> dict[str, Any]:
    """Percentages: ``top1``, ``top5`` where there are more than five classes, ``ece`` and, with a teacher, how often
    both give the same answer, ``agreement``. With six views also ``top1_six_views``."""
    assert test.labels is not None  # refused before training
    logits, labels = outputs(classifier, test, device), test.labels.cpu()
    scores = {"top1": probe.accuracy(logits.argmax(1), labels)}
    if views == 6:
        averaged = outputs(lambda images: six_views(classifier, images), test, device)
        scores["top1_six_views"] = probe.accuracy(averaged.argmax(1), labels)
    if logits.shape[1] > 5:
        scores["top5"] = 100 * float((logits.topk(5, 1).indices == labels[:, None]).any(1).float().mean())
    if teacher is not None:
        scores["agreement"] = probe.accuracy(logits.argmax(1), outputs(teacher, test, device).argmax(1))
    scores["ece"] = calibration_error(logits, labels)
    return {name: round(score, 3) for name, score in scores.items()} | {"test_images": len(test)}


def six_views(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Answers averaged over the image, the image a pixel up and left and down and right, and their mirror images.

    The image in its place counts as much as both shifted ones; what a shift brings in is reflected.

    Args:
        images: (B, C, H, W) in [0, 1].
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, k : k + height, k : k + width] for k in (0, 2)]
    shares = ((0.5, images), (0.25, shifted[0]), (0.25, shifted[1]))
    return torch.stack([share / 2 * classifier(x) + share / 2 * classifier(x.flip(-1)) for share, x in shares]).sum(0)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in % (Guo et al. 2017, equation 3): |accuracy - confidence|, weighted over bins."""
    confidence, found = logits.softmax(1).max(1)
    right = (found == labels).float()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins)
    gaps = [(right[bin_of == b] - confidence[bin_of == b]).sum().abs() for b in range(1, bins + 1)]
    return 100 * float(torch.stack(gaps).sum()) / max(len(labels), 1)


STATISTICS_IMAGES = 4096  # that standardising looks at, besides the labelled ones


def relevant(train: ImageSet, draws: Sequence[Tensor]) -> tuple[ImageSet, list[Tensor]]:
    """The images a probe can depend on, and where the draws lie among them; features of others are not computed."""
    spread = torch.linspace(0, len(train) - 1, min(len(train), STATISTICS_IMAGES)).round().long()
    positions = torch.cat([spread, *draws]).unique()
    return train.subset(positions), [torch.searchsorted(positions, draw) for draw in draws]


@torch.no_grad()
def outputs(
    network: Callable[[Tensor], Tensor], images: ImageSet, device: torch.device, block_size: int = 256
) -> Tensor:
    """``network`` over all images in order, (N, ...) float32 on the CPU."""
    blocks = []
    for start in range(0, len(images), block_size):
        index = torch.arange(start, min(start + block_size, len(images)))
        pixels = images.gather(index).to(device).to(torch.float32) / 255
        blocks.append(network(pixels).float().cpu())
    return torch.cat(blocks)


def load_student(model: str) -> Student:
    """A student from a run folder, from a weights file beside its ``config.json``, or a timm model without weights.

    Raises:
        UserError: no such thing, a damaged file, weights that do not fit their config.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{model} holds no student (no config.json): is the run finished, and one of a student?")
    if not path.exists():
        if path.suffix or "/" in model:
            raise UserError(f"{model} does not exist")
        return Student(StudentConfig(name=model))
    return stored.load_student(path / "weights.safetensors" if path.is_dir() else path)
