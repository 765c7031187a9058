"""RepFusion: a student imitates what a frozen diffusion model sees in an image at the timestep where that view is
most useful; a policy learns which timestep that is.

Yang and Wang, "Diffusion Model as Representation Learner", ICCV 2023.
Letters: B images, A timesteps to choose from, C teacher channels, g hint grid, K classes.

Deviations from the official code (numbers: the defects listed in docs/repfusion.md):
(1) Teacher and student each normalise the same image for themselves; the teacher sees [-1, 1].
(2) The advantage is reward minus a running mean; ``baseline="none"`` is the official estimator.
(3) The policy works on logits over a list of timesteps, not on softmax outputs over all 1,000.
(4) Reward, task head and policy gradient use labelled images only; a hidden label reaches nothing.
(5) The hint may keep a coarse grid and may be standardised; ``hint_grid=1, standardise="none"`` is the paper's.
(6) The student's map is pooled before the 1x1 projector, not after: both are linear, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep import losses
from diffrep.config import Config
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.diffusion import load_teacher
from diffrep.frozen.features import FeatureStore
from diffrep.methods.base import Method, MethodConfig, mean_over_processes, save_student
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows


class TimestepConfig(Config):
    """From which timesteps one is chosen for each image, and how."""

    select: Literal["fixed", "range", "list", "policy"] = "policy"
    values: tuple[int, ...] = ()  # fixed: one; range: low, high (not included); list, policy: the choices
    policy: Literal["small", "conv", "mlp"] = "small"  # network: ours for any size; the official two
    baseline: Literal["running_mean", "none"] = "running_mean"  # subtracted from the reward
    baseline_decay: float = Field(0.9, ge=0, lt=1)  # per step
    entropy_weight: float = Field(0.1, ge=0)  # at progress 0; official entropy_reg
    entropy_until: float = Field(0.5, gt=0, le=1)  # progress at which it has faded to 0; official: epoch 100 of 200

    @model_validator(mode="after")
    def _fits(self) -> TimestepConfig:
        count = len(self.values)
        if any(t < 0 for t in self.values):
            raise ValueError(f"timesteps start at 0, not {min(self.values)}")
        if self.select == "fixed" and count != 1:
            raise ValueError(f"select 'fixed' takes one value, not {count}")
        if self.select == "range" and (count != 2 or self.values[0] >= self.values[1]):
            raise ValueError("select 'range' takes two values: low, high with low < high")
        if self.select in ("list", "policy") and count < 1:
            raise ValueError(f"select '{self.select}' needs the timesteps to choose from")
        if self.select != "range" and len(set(self.values)) != count:
            raise ValueError("a timestep is named twice")
        return self

    def choices(self) -> tuple[int, ...]:
        return tuple(range(*self.values)) if self.select == "range" else self.values


class RepFusionConfig(MethodConfig):
    """Stage 1: distil a diffusion model's features into a student. Defaults are the published CIFAR-10 setting."""

    kind: Literal["repfusion"] = "repfusion"
    teacher: str  # diffusers folder, Hub id, run folder, python:module:factory, random:REFERENCE
    tap: str = "mid_block.resnets.1.conv2"  # where the teacher is read; the paper says the mid block's output
    student: StudentConfig
    timestep: TimestepConfig
    noise: Literal["forward"] | None = None  # None: clean image (official); forward: x_t
    hint_grid: int = Field(1, ge=1)  # cells per side that teacher and student are pooled to
    standardise: Literal["none", "joint", "per_timestep"] = "none"  # of the hint, per channel, over the training set
    kd_weight: float = Field(1.0, ge=0)  # official kd_weight
    task_weight: float = Field(1.0, ge=0)  # of the task head's cross-entropy; reaches the head alone
    policy_weight: float = Field(1.0, ge=0)  # of the policy gradient; reaches the policy alone
    features: str | None = None  # a `diffrep features` folder to read the hints from instead of running the teacher

    @model_validator(mode="after")
    def _fits(self) -> RepFusionConfig:
        if self.standardise == "per_timestep" and len(self.timestep.choices()) > MAX_SEPARATE:
            raise ValueError(f"standardise 'per_timestep' takes at most {MAX_SEPARATE} timesteps; use 'joint'")
        if self.features and self.noise:
            raise ValueError("features holds clean-image hints; it cannot be used with noise 'forward'")
        return self

    def label_readers(self) -> tuple[str, ...]:
        return ("task head", "policy (through its reward)") if self.timestep.select == "policy" else ()


MAX_SEPARATE = 64  # timesteps that get statistics, and a column in the log, of their own
STATISTICS_TIMESTEPS = 16  # that a joint standardisation is estimated from, when there are more


class RepFusion(Method):
    """Policy, teacher, student, task head: the four parts of one step."""

    timesteps: Tensor  # (A,) int64
    hint_mean: Tensor  # (A or 1, C, 1, 1)
    hint_std: Tensor
    baseline: Tensor
    baseline_steps: Tensor

    def __init__(self, config: RepFusionConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.teacher = Hints(config, allow_code)  # frozen, no module
        choices = config.timestep.choices()
        self.teacher.check(choices, image_size)
        channels = self.teacher.channels
        code_size = channels * config.hint_grid**2
        self.student = Student(config.student)
        self.projector = nn.Conv2d(_map_channels(self.student, image_size), channels, 1)
        if config.timestep.select == "policy":
            self.policy = policy_network(config.timestep.policy, len(choices), image_size)
            self.task_head = mlp(code_size, channels, channels, num_classes)
        rows = len(choices) if config.standardise == "per_timestep" else 1
        self.register_buffer("timesteps", torch.tensor(choices), persistent=False)
        self.register_buffer("hint_mean", torch.zeros(rows, channels, 1, 1))
        self.register_buffer("hint_std", torch.ones(rows, channels, 1, 1))
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("baseline_steps", torch.zeros(()))
        self.licence = f"{Method.licence}; distilled from {self.teacher.name} ({self.teacher.licence})"

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. One timestep per image: proposed by the policy, or by the rule the recipe names.
        choice, logits = self.choose(batch.images, rng)  # (B,), (B, A) or None

        # 2. Teacher and student look at the same images; the student imitates.
        code = self.standardised(self.teacher.hint(batch, self.timesteps[choice], rng), choice)  # (B, C, g, g)
        kd_loss = losses.feature_mse(self.imitation(batch.images), code).mean()
        parts = {"kd_loss": kd_loss, "mean_timestep": self.timesteps[choice].float().mean()}
        loss = self.config.kd_weight * kd_loss
        if logits is None:
            return {"loss": loss, **parts}

        # 3. A view is good if a small head can classify from it: that is the reward. Hidden labels take no part.
        assert batch.labels is not None  # refused by the recipe
        known = batch.labels >= 0
        task_loss = F.cross_entropy(self.task_head(code.flatten(1)), batch.labels.clamp(min=0), reduction="none")
        reward = -task_loss.detach()
        policy_loss = losses.reinforce(logits, choice, reward - self.baseline_for(reward, known))

        # 4. Entropy keeps the policy curious; its weight fades with progress.
        entropy = losses.entropy(logits).mean()
        loss = loss + self.config.task_weight * losses.mean_over(task_loss, known)
        loss = loss + self.config.policy_weight * losses.mean_over(policy_loss, known)
        loss = loss - self.entropy_weight(progress) * entropy
        return {"loss": loss, **parts, **self._observed(task_loss, policy_loss, entropy, logits, known)}

    def choose(self, images: Tensor, rng: Rows) -> tuple[Tensor, Tensor | None]:
        """images -> positions in ``timesteps`` (B,), and the policy's logits (B, A) where there is one."""
        if self.config.timestep.select == "policy":
            logits = self.policy(images)
            return rng.categorical(logits.detach().float().softmax(1)), logits.float()
        return rng.integers(0, len(self.timesteps)).to(images.device), None

    def imitation(self, images: Tensor) -> Tensor:
        """The student's map on the teacher's grid and in its width, (B, C, g, g)."""
        return self.projector(losses.pooled(self.student.feature_map(images), self.config.hint_grid))

    def standardised(self, code: Tensor, choice: Tensor) -> Tensor:
        row = choice if len(self.hint_mean) > 1 else torch.zeros_like(choice)
        return (code - self.hint_mean[row]) / self.hint_std[row]

    def baseline_for(self, reward: Tensor, known: Tensor) -> Tensor:
        """What the reward is compared with: its running mean before this step (the first step: its own mean)."""
        if self.config.timestep.baseline == "none":
            return torch.zeros_like(self.baseline)
        mean = mean_over_processes(reward, known)
        before = torch.where(self.baseline_steps > 0, self.baseline, mean)
        if self.training and bool(known.any()):
            decay = self.config.timestep.baseline_decay
            self.baseline.copy_(decay * before + (1 - decay) * mean)
            self.baseline_steps += 1
        return before

    def entropy_weight(self, progress: float) -> float:
        """Falls linearly from ``entropy_weight`` at 0 to nothing at ``entropy_until``."""
        config = self.config.timestep
        return config.entropy_weight * max(0.0, 1 - progress / config.entropy_until)

    def _observed(
        self, task_loss: Tensor, policy_loss: Tensor, entropy: Tensor, logits: Tensor, known: Tensor
    ) -> dict[str, Tensor]:
        seen = {
            "task_loss": losses.mean_over(task_loss, known),
            "policy_loss": losses.mean_over(policy_loss, known),
            "policy_entropy": entropy,
            "reward": self.baseline.clone(),
        }
        if logits.shape[1] <= MAX_SEPARATE:
            seen["policy_probs"] = logits.softmax(1).mean(0)  # (A,)
        return {
            name: value.detach() if name not in ("task_loss", "policy_loss") else value for name, value in seen.items()
        }

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Mean and deviation of the hint per channel, over the training set and the timesteps in use."""
        if self.config.standardise == "none":
            return
        rows = self.teacher.statistics(self._representative(), batches)  # (A', 2, C): mean, mean of squares
        rows = rows if self.config.standardise == "per_timestep" else rows.mean(0, keepdim=True)
        mean, square = rows.unbind(1)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        self.hint_mean.copy_(mean[:, :, None, None])
        self.hint_std.copy_(deviation.clamp(min=1e-6)[:, :, None, None])

    def _representative(self) -> list[int]:
        values = self.timesteps.tolist()
        if self.config.standardise == "per_timestep" or len(values) <= STATISTICS_TIMESTEPS:
            return values
        return [values[round(i * (len(values) - 1) / (STATISTICS_TIMESTEPS - 1))] for i in range(STATISTICS_TIMESTEPS)]

    def check_data(self, fingerprint: str, augment: str) -> None:
        if self.teacher.store:
            self.teacher.store.check_source(fingerprint, augment)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"student": [*self.student.parameters(), *self.projector.parameters()]}
        if self.config.timestep.select == "policy":
            groups |= {"task_head": [*self.task_head.parameters()], "policy": [*self.policy.parameters()]}
        return groups

    def dry_step(self, images: Tensor) -> None:
        """Student, projector, policy and task head; the teacher's share is counted by ``Hints``."""
        loss = self.imitation(images).sum()
        if self.config.timestep.select == "policy":
            size = self.teacher.channels * self.config.hint_grid**2
            loss = loss + self.policy(images).sum() + self.task_head(images.new_zeros(len(images), size)).sum()
        loss.backward()

    def frozen_multiply_adds(self) -> int:
        return self.teacher.multiply_adds()

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {
            "teacher": self.teacher.name,
            "tap": self.config.tap,
            "timesteps": self.timesteps.tolist()[:MAX_SEPARATE],
        }


class Hints:
    """Where the teacher's codes come from: the teacher itself, or a feature store that replays it exactly."""

    def __init__(self, config: RepFusionConfig, allow_code: bool) -> None:
        self.config, self.grid, self.tap = config, config.hint_grid, config.tap
        self.store = FeatureStore(config.features) if config.features else None
        if self.store:
            self.store.check(self.tap, self.grid)
            self.channels, self.licence, self.name = (
                self.store.channels(self.tap),
                self.store.licence,
                self.store.teacher,
            )
        else:
            self.network = load_teacher(config.teacher, allow_code)
            self.channels = self.network.tap(self.tap).shape[0]
            self.licence, self.name = self.network.licence, self.network.name

    def check(self, timesteps: Iterable[int], image_size: int) -> None:
        """Refuse timesteps that the teacher, or the store, does not have, and images of another size."""
        if self.store:
            return self.store.check_timesteps(timesteps)
        self.network.check_size(image_size, image_size)
        last = self.network.num_train_timesteps - 1
        bad = [t for t in timesteps if t > last]
        if bad:
            raise UserError(f"method.timestep: {bad[0]} is outside 0..{last} of {self.name}")

    def hint(self, batch: Batch, timestep: Tensor, rng: Rows | None = None) -> Tensor:
        """(B, C, g, g) float32 without gradient."""
        if self.store:
            return self.store.gather(self.tap, timestep, batch.view, batch.index, batch.images.device)
        feature = self.network.features(batch.images, timestep, [self.tap], noise=self.config.noise, rng=rng)
        return losses.pooled(feature[self.tap].float(), self.grid)

    def statistics(self, timesteps: list[int], batches: Iterable[Batch]) -> Tensor:
        """(A', 2, C) float32: mean and mean square per timestep and channel, summed in float64."""
        if self.store:
            return self.store.statistics(self.tap, timesteps)
        sums = torch.zeros(len(timesteps), 2, self.channels, dtype=torch.float64)
        count = 0
        for batch in batches:
            for row, t in enumerate(timesteps):
                codes = self._statistics_codes(batch, t)
                sums[row] += torch.stack([codes.sum((0, 2, 3)), codes.square().sum((0, 2, 3))]).cpu()
            count += len(batch.images) * self.grid**2
        return (sums / max(count, 1)).float()

    def _statistics_codes(self, batch: Batch, t: int) -> Tensor:
        rng = Rows(torch.Generator(batch.images.device).manual_seed(t), len(batch.images))
        return self.hint(batch, torch.full_like(batch.index, t), rng).double()

    def multiply_adds(self) -> int:
        """Per image and step; none where a store replays the teacher."""
        return 0 if self.store else self.network.multiply_adds(self.tap)


def policy_network(kind: str, num_choices: int, image_size: int) -> nn.Module:
    """images (B, 3, H, W) in [0, 1] -> logits (B, A); ``conv`` and ``mlp`` are the official networks' layers."""
    if kind == "small":
        return SmallPolicy(num_choices)
    if kind == "mlp":
        return OfficialPolicy([], 3 * image_size**2, (128, 128), num_choices)
    widths = {32: [6, 16], 64: [6, 16, 16]}.get(image_size)
    if widths is None:
        raise UserError(f"policy 'conv' is made for 32 or 64 pixels, not {image_size}; use 'small'")
    return OfficialPolicy(widths, {32: 400, 64: 256}[image_size], (120, 84), num_choices)


class SmallPolicy(nn.Module):
    """Two strided convolutions and a pool; the last layer starts at zero, so the first proposal is uniform."""

    def __init__(self, num_choices: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(32, num_choices)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images * 2 - 1))))
        return self.fc(x.mean((2, 3)))


class OfficialPolicy(nn.Module):
    """The official policies: 5x5 convolutions each with ReLU and 2x2 max-pool, then three linear layers.

    Source: `PolicyNet` (no convolutions), `PolicyNet_Cov`, `PolicyNet_Cov64`, whose parameter names are kept; they
    end in a softmax, this in logits.
    """

    def __init__(self, widths: list[int], flat: int, hidden: tuple[int, int], num_choices: int) -> None:
        super().__init__()
        self.num_convs = len(widths)
        for i, (width_in, width) in enumerate(zip([3, *widths], widths, strict=False), 1):
            self.add_module(f"conv{i}", nn.Conv2d(width_in, width, 5))
        self.fc1, self.fc2 = nn.Linear(flat, hidden[0]), nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_choices)

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2 - 1
        for i in range(1, self.num_convs + 1):
            x = F.max_pool2d(F.relu(self.get_submodule(f"conv{i}")(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    return nn.Sequential(*_layers(widths))


def _layers(widths: tuple[int, ...]) -> Iterator[nn.Module]:
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        if i:
            yield nn.ReLU()
        yield nn.Linear(width_in, width_out)


@torch.no_grad()
def _map_channels(student: Student, image_size: int) -> int:
    was_training = student.training
    channels = student.eval().feature_map(torch.zeros(1, 3, image_size, image_size)).shape[1]
    student.train(was_training)
    return channels
