"""One DM-KD step: against the official one, whose teacher stands in the autograd graph, and with stored answers.

Teacher ResNet-56, student ResNet-20 (both 32 pixels, untrained), float32, same batch. The official step differentiates
the teacher too and keeps its gradients; ours asks it without a graph, or not at all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import line, rivals
from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.frozen.answers import AnswerConfig, LiveAnswers, store_settings, write_answers
from diffrep.frozen.classifier import ClassifierConfig, load_classifier
from diffrep.methods.dmkd import DMKD, DMKDConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, stream

BATCH = 64
HALF = (0.5, 0.5, 0.5)


def measure() -> list[dict[str, Any]]:
    """A step with the teacher asked, then an epoch of one batch from stored answers against the student alone."""
    with tempfile.TemporaryDirectory() as folder:
        images = torch.rand(BATCH, 3, 32, 32, generator=stream(0, "bench"))
        index = torch.arange(BATCH)
        batch = Batch(images, None, index, torch.zeros_like(index))
        teacher = _teacher(Path(folder))
        asked, stored = _method(teacher, None), _method(teacher, _answers(Path(folder) / "answers", teacher, images))
        unit = f"CPU s, batch {BATCH}"

        def step(method: DMKD) -> None:
            method(batch, Rows(stream(0, "step"), BATCH), 0.0)["loss"].backward()

        mine, theirs = rivals(lambda: step(asked), lambda: _official(asked, images), repeats=3)
        found = [line("distillation step, teacher frozen", "teacher in the graph (official)", mine, theirs, unit=unit)]
        target = torch.rand(BATCH, 10, generator=stream(0, "target"))

        def alone() -> None:
            losses.kd_kl(stored.student(images), target, 10.0).mean().backward()

        mine, theirs = rivals(lambda: step(stored), alone, repeats=7)
        return [*found, line("distillation step, answers stored", "the student alone", mine, theirs, unit=unit)]


def _teacher(folder: Path) -> ClassifierConfig:
    """An untrained ResNet-56 as a weights file."""
    from safetensors.torch import save_file

    from diffrep.models.students import create

    save_file(create("resnet56_cifar", 10).state_dict(), folder / "teacher.safetensors")
    return ClassifierConfig(
        reference=str(folder / "teacher.safetensors"), architecture="resnet56_cifar", mean=HALF, std=HALF
    )


def _answers(folder: Path, config: ClassifierConfig, images: torch.Tensor) -> str:
    teacher = load_classifier(config)
    settings = store_settings(teacher, AnswerConfig(), len(images), 1, {"fingerprint": "", "augment": "none"})
    write_answers(folder, teacher, settings, lambda view, index: images[index])
    return str(folder)


def _method(teacher: ClassifierConfig, answers: str | None) -> DMKD:
    config = DMKDConfig(teacher=teacher, student=StudentConfig(name="resnet20_cifar"), answers=answers)
    return DMKD(config, 10, 32).train()


def _official(method: DMKD, images: torch.Tensor) -> None:
    """The same step with the teacher's parameters asking for gradients, as the official code has them."""
    assert isinstance(method.teacher, LiveAnswers)
    network = method.teacher.network
    network.module.requires_grad_(True)
    target = network.module(network.normalise(images))
    losses.kd_kl(method.student(images), target, 10.0).mean().backward()
    network.module.requires_grad_(False)
