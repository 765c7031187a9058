"""A method of one linear layer and forty 4x4 images: everything a trainer needs, in milliseconds."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, ImageSet
from diffrep.data.feed import Feed
from diffrep.methods.base import Method
from diffrep.randomness import Rows, seeded
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer


class Tiny(Method):
    """Which half of a noisy image is brighter? The loss is a mean over images; no batch statistics.

    bad: at this progress ``term`` becomes ``value``, if a float is given.
    """

    def __init__(self, bad: float | None = None, term: str = "entropy", value: float = float("nan")) -> None:
        super().__init__()
        self.bad, self.term, self.value = bad, term, value
        self.net, self.head = nn.Linear(48, 8), nn.Linear(8, 2)
        self.constant = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Batch] = []

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        self.seen.append(batch)
        if self.training:
            self.count += len(batch.images)
        logits = self.logits(batch.images + 0.1 * rng.normal(*batch.images.shape[1:]))
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        parts = {"entropy": entropy, "choices": logits.softmax(1).mean(0)}
        if self.bad is not None and progress >= self.bad:
            parts[self.term] = parts[self.term] * self.value
        return {"loss": F.cross_entropy(logits, batch.labels) + 0.01 * parts["entropy"], **parts}

    def logits(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.net((images * 2 - 1).flatten(1))))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"student": [*self.net.parameters()], "head": [*self.head.parameters()]}


def method(**options: Any) -> Tiny:
    """Always the same initialisation."""
    with seeded(3, "tiny"):
        return Tiny(**options)


def image_set(count: int = 40, device: str = "cpu") -> ImageSet:
    """Noise, brighter on the left (label 0) or on the right (label 1)."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 128, (count, 3, 4, 4), generator=rng)
    for k, label in enumerate(labels.tolist()):
        pixels[k, :, :, 2 * label : 2 * label + 2] += 127
    return ImageSet("tiny", "train", ("left", "right"), "ours", pixels.to(torch.uint8), labels).to(device)


SGD = OptimConfig(name="sgd", lr=0.2, group_lr={"head": 2.0})
ADAM = OptimConfig(lr=1e-2, group_lr={"head": 2.0})


def trainer(
    run_dir: Path, made: Method | None = None, optim: OptimConfig = ADAM, augment: str = "shift:1", **train: Any
) -> Trainer:
    """A trainer of a Tiny in ``run_dir``; ``train`` are fields of a TrainConfig."""
    config = TrainConfig(**{"steps": 12, "batch_size": 8, "log_every": 3, "checkpoint_every": 4, **train})
    feed = Feed(image_set(), DataConfig(source="digits", augment=augment), config.batch_size, 5, None)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(made or method(), feed, optim, config, 5, RunDir(run_dir))


def weights(made: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, names included."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
