"""What frozen classifiers say of drawn images: is one kept (margin), and which are hard for a student.

Letters: B images, K classes of a classifier. Labels here are the generator's own class ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from diffrep import losses
from diffrep.config import Config
from diffrep.errors import UserError
from diffrep.frozen.classifier import ClassifierConfig, ClassifierTeacher, load_classifier


class MarginConfig(Config):
    """Keep an image only where the teacher is sure of the class that was asked for."""

    teacher: ClassifierConfig
    margin: float = Field(gt=0, lt=1)  # probability of the asked class minus the largest other
    tries: int = Field(4, ge=1)  # draws per slot; the last one is kept as it is, so that classes stay balanced


class HardConfig(Config):
    """Steer each walk towards images that a student finds hard and the teacher still knows (Hemmat et al. 2025)."""

    student: ClassifierConfig
    teacher: ClassifierConfig
    entropy_weight: float = Field(1.0, ge=0)  # on the entropy of the student's answer; 0 is the control
    class_weight: float = Field(1.0, ge=0)  # on the teacher's log probability of the asked class


class Referee:
    """Says which images show the class that was asked for.

    asked:       the generator's ids of the set's classes, in the order of the set's labels.
    num_classes: how many classes the generator has.
    """

    def __init__(self, config: MarginConfig, asked: Sequence[int], num_classes: int, allow_code: bool) -> None:
        self.config = config
        self.teacher = load_classifier(config.teacher, allow_code=allow_code)
        self.numbers = teacher_numbers(self.teacher, asked, num_classes)

    def is_sure(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) -> (B,) bool, on the CPU."""
        _takes(self.teacher, images.shape[-1])
        wanted = self.numbers[labels.cpu()].to(images.device)
        return (margin(self.teacher.logits(images), wanted) >= self.config.margin).cpu()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,): probability of the asked class minus the largest other, in (-1, 1)."""
    probs = logits.softmax(1)
    asked = probs.gather(1, labels[:, None]).squeeze(1)
    return asked - probs.scatter(1, labels[:, None], 0).amax(1)


class Hardness:
    """w_e H(p_student(. | x_0)) + w_c log p_teacher(y | x_0), what a steered walk climbs."""

    def __init__(self, config: HardConfig, asked: Sequence[int], num_classes: int, allow_code: bool) -> None:
        self.config = config
        self.student, self.teacher = (
            load_classifier(c, allow_code=allow_code) for c in (config.student, config.teacher)
        )
        self.numbers = teacher_numbers(self.teacher, asked, num_classes)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) -> (B,), with a gradient to the images."""
        wanted = self.numbers.to(labels.device)[labels]
        known = _differentiable(self.teacher, images).log_softmax(1).gather(1, wanted[:, None]).squeeze(1)
        puzzled = losses.entropy(_differentiable(self.student, images))
        return self.config.entropy_weight * puzzled + self.config.class_weight * known


def _differentiable(classifier: ClassifierTeacher, images: Tensor) -> Tensor:
    """A frozen network's logits with a gradient to the images (its weights have none)."""
    _takes(classifier, images.shape[-1])
    classifier.follow(images)
    return classifier.module(classifier.normalise(images))


@lru_cache(maxsize=16)
def _takes(classifier: ClassifierTeacher, image_size: int) -> None:
    """Refuse a classifier of images of another size, in its own words and once."""
    classifier.multiply_adds(image_size)


def teacher_numbers(teacher: ClassifierTeacher, asked: Sequence[int], num_classes: int) -> Tensor:
    """(num_classes,) int64: the generator's class -> the teacher's.

    A teacher with as many classes as the set counts along the set's labels; else one with as many as the generator
    counts as the generator does.

    Raises:
        UserError: it has neither number of classes.
    """
    if teacher.num_classes == len(asked):
        numbers = torch.zeros(num_classes, dtype=torch.int64)
        numbers[list(asked)] = torch.arange(len(asked))
        return numbers
    if teacher.num_classes == num_classes:
        return torch.arange(num_classes)
    told = f"the set has {len(asked)} classes, the generator {num_classes}"
    raise UserError(f"teacher {teacher.name} knows {teacher.num_classes} classes; {told}: take one of either number")


def identity(classifier: ClassifierTeacher) -> dict[str, Any]:
    """What a classifier's answers depend on, wherever it lies."""
    return {name: getattr(classifier, name).flatten().tolist() for name in ("mean", "std")} | {
        "sha256": classifier.sha256
    }
