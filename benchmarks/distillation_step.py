"""One RepFusion step, ours, against the same step put together as the official code does it.

Rival: a full U-Net pass with a hook, images augmented one by one through PIL, float32. Same teacher (published
CIFAR-10 architecture, untrained), same ResNet-18 student, same policy network, same batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import line, rivals
from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.data.transforms import augmentation
from diffrep.methods.repfusion import RepFusion, RepFusionConfig, TimestepConfig
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, stream

BATCH = 16


def measure() -> list[dict[str, Any]]:
    """Truncation alone in float32, then everything of ours (truncation, batched augmentation, bf16)."""
    config = RepFusionConfig(
        teacher="random:ddpm-cifar10-32",
        student=StudentConfig(name="resnet18_cifar"),
        timestep=TimestepConfig(select="policy", values=tuple(range(1000)), policy="conv"),
    )
    method = RepFusion(config, num_classes=10, image_size=32).train()
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=stream(0, "bench"))
    labels = torch.arange(BATCH) % 10

    def ours(precision: torch.dtype) -> None:
        views = torch.randint(0, augmentation("crop_flip:4").num_views, (BATCH,))
        images = augmentation("crop_flip:4").apply(pixels, views).float() / 255
        batch = Batch(images, labels, torch.arange(BATCH), views)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = method(batch, Rows(stream(0, "step"), BATCH), 0.0)["loss"]
        loss.backward()
        method.zero_grad()

    def official() -> None:
        _official_step(method, _augmented_one_by_one(pixels), labels)
        method.zero_grad()

    rival = "the official composition: full U-Net pass, per-sample augmentation, float32"
    found = []
    for name, precision in (
        ("truncated, batched, float32", torch.float32),
        ("truncated, batched, bf16", torch.bfloat16),
    ):
        mine, theirs = rivals(lambda precision=precision: ours(precision), official, repeats=3)
        found.append(line(f"distillation step: {name}", rival, mine, theirs, unit=f"CPU s, batch {BATCH}"))
    return found


def _official_step(method: RepFusion, images: Tensor, labels: Tensor) -> None:
    """The same arithmetic with the teacher run to its end and its feature taken by a hook."""
    teacher, kept = method.teacher.network, {}
    handle = teacher.module.get_submodule(method.config.tap).register_forward_hook(
        lambda m, i, o: kept.update(feature=o)
    )
    logits = method.policy(images)
    timestep = torch.multinomial(logits.softmax(1), 1).squeeze(1)
    teacher.predict(teacher.normalise(images), timestep)
    handle.remove()
    code = losses.pooled(kept["feature"], 1)
    kd_loss = losses.feature_mse(method.imitation(images), code).mean()
    task_loss = F.cross_entropy(method.task_head(code.flatten(1)), labels, reduction="none")
    policy_loss = losses.reinforce(logits, timestep, -task_loss).mean()
    (kd_loss + task_loss.mean() + policy_loss - 0.1 * losses.entropy(logits).mean()).backward()


def _augmented_one_by_one(pixels: Tensor) -> Tensor:
    from torchvision.transforms import v2

    pipeline = v2.Compose([v2.ToPILImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return torch.stack([pipeline(image) for image in pixels]).float() / 255
