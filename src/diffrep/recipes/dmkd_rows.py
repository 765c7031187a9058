"""From a row of DM-KD's tables to a recipe. The tables stand in dmkd_cifar100, dmkd_imagenet and dmkd_more.

Li et al. 2023, arXiv 2305.12954. Numbers are quoted from READMEs, which say where the paper's body could not be read;
what no source states is listed under ``assumed`` of each recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffrep.data.datasets import DataConfig
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.frozen.generator import SamplingConfig
from diffrep.methods.dmkd import DMKDConfig, KdLossConfig
from diffrep.methods.finetune import FinetuneConfig
from diffrep.methods.synthesis import SynthesisConfig
from diffrep.models.students import StudentConfig
from diffrep.recipes.base import Published, Recipe, Rival, Study, SynthesisTask
from diffrep.training.config import TrainConfig
from diffrep.training.optim import LrScheduleConfig, OptimConfig

Triple = tuple[float, float, float]

DIT = "dit-xl-2-256?vae=sd-vae-mse"  # keys of published weights: the official file, and the VAE of the official script
DIT_NEEDED = (
    "weights: DiT-XL/2 at 256 pixels and its VAE (diffrep assets fetch dit-xl-2-256 --accept-licence; diffrep assets "
    "fetch sd-vae-mse; CC BY-NC 4.0: not for commercial use)"
)
HELD_OUT = "a tenth of the training images is held out, to choose on; the published runs chose on the test images"


@dataclass(frozen=True)
class Bench:
    """Where the students of one table are scored, and how they look at images."""

    test: str  # data reference
    image_size: int
    augment: str
    mean: Triple
    std: Triple

    def student(self, name: str, **options: Any) -> StudentConfig:
        return StudentConfig(name=name, options=options, mean=self.mean, std=self.std)

    def teacher(self, reference: str, architecture: str, num_classes: int) -> ClassifierConfig:
        """A weights file; it sees images as the students do."""
        return ClassifierConfig(
            reference=reference, architecture=architecture, num_classes=num_classes, mean=self.mean, std=self.std
        )


@dataclass(frozen=True)
class Course:
    """A training schedule in the papers' words: SGD with momentum 0.9, rates that drop after certain epochs."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    milestones: tuple[int, ...]  # epochs after which the rate is multiplied by gamma
    gamma: float = 0.1

    def optim(self) -> OptimConfig:
        shares = tuple(epoch / self.epochs for epoch in self.milestones)
        schedule = LrScheduleConfig(name="step", milestones=shares, gamma=self.gamma)
        return OptimConfig(name="sgd", lr=self.lr, weight_decay=self.weight_decay, lr_schedule=schedule)

    def train(self, images: int) -> TrainConfig:
        """As many updates as the published epochs of ``images`` images; a checkpoint after each epoch."""
        steps, epoch = round(self.epochs * images / self.batch_size), round(images / self.batch_size)
        return TrainConfig(steps=steps, batch_size=self.batch_size, checkpoint_every=epoch)


@dataclass(frozen=True)
class Lesson:
    """What a student learns from: a data reference, how many images it stands for, and how long they are studied."""

    source: str
    images: int
    course: Course


def taught(
    name: str, bench: Bench, lesson: Lesson, teacher: ClassifierConfig, student: StudentConfig, loss: KdLossConfig,
    **said: Any,
) -> Recipe:  # fmt: skip
    """A student of what ``teacher`` answers; ``said`` is what the ledger says of it."""
    return _recipe(name, bench, lesson, DMKDConfig(teacher=teacher, student=student, loss=loss), said)


def labelled(name: str, bench: Bench, lesson: Lesson, student: StudentConfig, **said: Any) -> Recipe:
    """The same network from labels: a baseline, or somebody's teacher."""
    return _recipe(name, bench, lesson, FinetuneConfig(student=student), said)


def _recipe(
    name: str, bench: Bench, lesson: Lesson, method: DMKDConfig | FinetuneConfig, said: dict[str, Any]
) -> Recipe:
    return Recipe(
        name=name,
        data=DataConfig(source=lesson.source, image_size=bench.image_size, augment=bench.augment),
        method=method,
        optim=lesson.course.optim(),
        train=lesson.course.train(lesson.images),
        evaluate=EvaluateConfig(protocol="classifier", source=bench.test),
        **said,
    )


def drawn(
    name: str, about: str, generator: str, sampling: SamplingConfig, images: int, needs: tuple[str, ...],
    assumed: tuple[str, ...] = (), **settings: Any,
) -> Study:  # fmt: skip
    """A study of one stage, ``set``; ``settings`` are further fields of a ``SynthesisConfig``."""
    stage = drawing(name, generator, sampling, images, **settings)
    return Study(name=name, about=about, stages={"set": stage}, needs=needs, assumed=assumed)


def drawing(name: str, generator: str, sampling: SamplingConfig, images: int, **settings: Any) -> SynthesisTask:
    synthesis = SynthesisConfig(sampling=sampling, images=images, **settings)
    return SynthesisTask(name=name, generator=generator, synthesis=synthesis)


def shared_noise(noise: str) -> str:
    """What sets a ``_faithful`` twin apart, in words."""
    return ", one noise for all classes as in the official script" if noise == "shared" else ""


def set_of(study: str) -> str:
    """The data reference of what :func:`drawn` leaves in the folder that :func:`made_by` names."""
    return f"synthetic:runs/{study}/set-s0"


def made_by(recipe: str, what: str = "data") -> str:
    """A line of ``needs``: another recipe makes it."""
    return f"{what}: runs/{recipe} (diffrep run {recipe} --out runs/{recipe})"


def rivals(source: str, numbers: dict[str, tuple[float | None, ...]], column: int) -> tuple[Rival, ...]:
    """One column of a table {method: numbers}; None where the method has no number there."""
    found = ((method, row[column]) for method, row in numbers.items() if column < len(row))
    return tuple(Rival(method=method, value=value, source=source) for method, value in found if value is not None)


def number(value: float | None, test: str, source: str, others: tuple[Rival, ...] = ()) -> Published:
    return Published(value=value, metric=f"top-1 %, {test}", source=source, rivals=others)


def named(name: str, build: Callable[..., Recipe | Study], *what: Any) -> Callable[[], Recipe | Study]:
    """``build(name, *what)`` as a function of that name, which is how a recipe is listed."""

    def make() -> Recipe | Study:
        return build(name, *what)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = build.__doc__
    return make
