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
(6) With several tap pairs, head and reward read the first one's code, not the last one's.
How student and teacher are compared at a pair: models/comparison.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep import losses
from diffrep.config import Config
from diffrep.data.batch import Batch
from diffrep.diffusion.selection import TimestepConfig, binned, resolved
from diffrep.frozen.hints import LiveHints, StoredHints, statistics
from diffrep.frozen.passes import PassConfig
from diffrep.methods.base import Method, MethodConfig, save_student, sum_over_processes
from diffrep.models import rewards
from diffrep.models.comparison import MEMORY, Comparison, LossName, Projector
from diffrep.models.policies import mlp, policy_network
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows


class PairConfig(Config):
    """One place where the student imitates the teacher."""

    tap: str  # of the teacher
    student_tap: str | None = None  # dotted module of the student; None: its last map
    weight: float = Field(1.0, gt=0)  # among the pairs; the loss is their weighted mean (official: all alike)


class RepFusionConfig(MethodConfig):
    """Stage 1: distil a diffusion model's features into a student. Defaults are the published CIFAR-10 setting, but for
    the reward's baseline.
    """

    kind: Literal["repfusion"] = "repfusion"
    teacher: str  # diffusers folder, Hub id, run folder, python:module:factory, random:REFERENCE
    tap: str = "mid_block.resnets.1.conv2"  # where the teacher is read; the paper says the mid block's output
    student: StudentConfig
    more_pairs: tuple[PairConfig, ...] = ()  # besides tap and student.tap, whose weight is 1
    timestep: TimestepConfig
    noise: Literal["forward"] | None = None  # None: clean image (official); forward: x_t
    # How student and teacher are compared: l2 is the paper's hint, at attention transfer, rkd relations of images.
    # crd, contrast with a memory of all images, is the official kd.py's as it was meant.
    loss: LossName = "l2"
    negatives: int = Field(4096, ge=1)  # images that crd compares each one with; official nce_n
    hint_grid: int | None = Field(1, ge=1)  # cells per side both are pooled to; None: the teacher's own grid (dense)
    projector: Projector = "linear"  # to the teacher's width: 1x1 (official), or 3x3 and each map normalised
    standardise: Literal["none", "joint", "per_timestep"] = "none"  # of the hint, per channel, over the training set
    kd_weight: float = Field(1.0, ge=0)  # official kd_weight
    task_weight: float = Field(1.0, ge=0)  # of the task head's cross-entropy; reaches the head alone
    policy_weight: float = Field(1.0, ge=0)  # of the policy gradient; reaches the policy alone
    features: str | None = None  # a `diffrep features` folder to read the hints from instead of running the teacher
    passes: PassConfig = PassConfig()  # how the teacher is run

    @model_validator(mode="after")
    def _fits(self) -> RepFusionConfig:
        if self.standardise == "per_timestep" and len(self.timestep.choices()) > MAX_SEPARATE:
            raise ValueError(f"standardise 'per_timestep' takes at most {MAX_SEPARATE} timesteps; use 'joint'")
        self._compares()
        if self.features and self.noise:
            raise ValueError("features holds clean-image hints; it cannot be used with noise 'forward'")
        if self.features and self.timestep.select == "policy" and self.timestep.reward == "common":
            raise ValueError("reward 'common' looks at mirrored images, and features does not hold them")
        ranges = len(self.timestep.values) - 1
        if self.timestep.select == "ranges" and ranges != len(self.pairs):
            raise ValueError(f"timestep.values bound {ranges} ranges, and there are {len(self.pairs)} tap pairs")
        return self

    def _compares(self) -> None:
        as_it_is = self.hint_grid is None and self.standardise == "none"
        if self.loss in WHOLE_MAPS and not as_it_is:
            raise ValueError("loss 'at' compares whole maps as they are: hint_grid null, standardise 'none'")
        if self.loss == MEMORY and self.hint_grid is None:
            raise ValueError("loss 'crd' remembers a vector of each image: hint_grid is a number, e.g. 1")
        if self.projector == "conv" and self.hint_grid is not None:
            raise ValueError("projector 'conv' looks at neighbours: it needs whole maps, hint_grid null")
        if self.projector == "conv" and self.loss in WIDTHS_MAY_DIFFER:
            raise ValueError(f"loss '{self.loss}' has no projector: leave method.projector out")
        if self.timestep.select == "ranges" and len({pair.weight for pair in self.pairs}) > 1:
            raise ValueError("select 'ranges' draws one pair a step, all alike: leave the weights of more_pairs out")

    @property
    def pairs(self) -> tuple[PairConfig, ...]:
        """All tap pairs, the first one from tap and student.tap."""
        return (PairConfig(tap=self.tap, student_tap=self.student.tap), *self.more_pairs)

    def compares_images(self) -> tuple[str, int] | None:
        fewest = 1 if self.loss == MEMORY else losses.FEATURE_LOSSES[self.loss].fewest
        if fewest > 1 or self.loss == MEMORY:  # whose normaliser is that of a whole batch
            return f"loss '{self.loss}'", fewest
        if self.timestep.select == "policy" and self.timestep.reward != "task":
            return f"reward '{self.timestep.reward}'", rewards.FEWEST
        return None

    def label_readers(self) -> tuple[str, ...]:
        if not self.timestep.reads_labels:
            return ()
        head = ("task head",) if self.timestep.reward == "task" else ()
        return (*head, "policy (through its reward)")


WHOLE_MAPS = tuple(name for name, loss in losses.FEATURE_LOSSES.items() if not loss.pools)
WIDTHS_MAY_DIFFER = (MEMORY, *(name for name, loss in losses.FEATURE_LOSSES.items() if not loss.needs_projector))
MAX_SEPARATE = 64  # timesteps that get statistics, and a column in the log, of their own
STATISTICS_TIMESTEPS = 16  # that a joint standardisation is estimated from, when there are more


class RepFusion(Method):
    """Policy, teacher, student, task head: the four parts of one step."""

    timesteps: Tensor  # (A,) int64
    running_reward: Tensor  # () mean over labelled images of all steps so far

    def __init__(self, config: RepFusionConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        timestep, found = resolved(config.timestep)
        config = config.model_copy(update={"timestep": timestep})
        self.config, self.pairs = config, config.pairs
        self.teacher = hints_of(config, allow_code)  # frozen, no module
        choices = config.timestep.choices()
        self.teacher.check(choices, image_size)
        if found:
            found.check(config.tap, config.noise, self.teacher.sha256)
        channels = self.teacher.channels[config.tap]
        self.student = Student(config.student)
        widths, self.uses_all_parameters = self.student.try_taps(image_size, [p.student_tap for p in self.pairs])
        if config.timestep.select == "ranges":  # one pair a step
            self.uses_all_parameters = False
        rows = len(choices) if config.standardise == "per_timestep" else 1
        self.comparisons = nn.ModuleList(
            Comparison(
                config.loss, (width, self.teacher.channels[pair.tap]), config.hint_grid, config.projector, rows,
                config.negatives,
            )
            for pair, width in zip(self.pairs, widths, strict=True)
        )  # fmt: skip
        if config.timestep.select == "policy":
            self.policy = policy_network(config.timestep.policy, len(choices), image_size)
            if config.timestep.reward == "task":
                self.task_head = mlp(self.code_size, channels, channels, num_classes)
        self.end = max(choices) + 1  # of the log's histogram
        self.register_buffer("timesteps", torch.tensor(choices))  # saved: a probe may be made again under a run
        # Before anything is learnt the task head guesses: its reward is that of chance. Other rewards begin at 0.
        chance = -math.log(num_classes) if config.timestep.reward == "task" else 0.0
        self.num_classes = num_classes
        self.register_buffer("running_reward", torch.tensor(chance))
        self.rewards: list[Tensor] = []  # (sum, count) of each micro-batch of this step
        self.labels_behind = {f"teacher: {part}": n for part, n in self.teacher.labels_seen.items()}
        self.labels_behind |= {"probe": found.num_labels} if found else {}
        self.licence = f"{Method.licence}; distilled from {self.teacher.name} ({self.teacher.licence})"

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. One timestep per image: proposed by the policy, or by the rule the recipe names.
        active = self.active_pairs(rng)
        choice, logits = self.choose(batch.images, rng, progress, active)  # (B,), (B, A) or None

        # 2. Teacher and student look at the same images; the student imitates.
        codes = self.codes(batch, choice, rng, active)  # of each pair (B, C, g, g)
        imitations = self.imitations(batch.images, [code.shape[-2:] for code in codes], active)
        kd_loss = self.distance(imitations, codes, batch.index, rng, active)
        parts = {"kd_loss": kd_loss, "mean_timestep": self.timesteps[choice].float().mean()}
        if self.config.timestep.select != "fixed":
            parts["chosen_timesteps"] = binned(self.timesteps[choice], self.end)  # (32,)
        loss = self.config.kd_weight * kd_loss
        if logits is None:
            return {"loss": loss, **parts}

        # 3. A view is good if much can be told from it: that is the reward. Hidden labels take no part.
        code, imitation, known = codes[0], imitations[0], self.known(batch)
        reward, task_loss = self.reward(code, batch, choice, rng, imitation)
        policy_loss = losses.reinforce(logits, choice, reward - self.baseline(batch, logits, rng, imitation))
        self.rewards.append(torch.stack([torch.where(known, reward, 0).sum(), known.sum()]))

        # 4. Entropy keeps the policy curious; its weight fades with progress.
        entropy = losses.entropy(logits).mean()
        if task_loss is not None:
            parts["task_loss"] = losses.mean_over(task_loss, known)
            loss = loss + self.config.task_weight * parts["task_loss"]
        loss = loss + self.config.policy_weight * losses.mean_over(policy_loss, known)
        loss = loss - self.entropy_weight(progress) * entropy
        parts |= {
            "policy_loss": losses.mean_over(policy_loss, known),
            "policy_entropy": entropy,
            "reward": self.running_reward.clone(),
        }
        if len(self.timesteps) <= MAX_SEPARATE:
            parts["policy_probs"] = logits.softmax(1).mean(0)  # (A,)
        return {"loss": loss, **parts}

    def active_pairs(self, rng: Rows) -> list[int]:
        """All of them; of ranges bound to pairs the one this step draws, the same for all images."""
        count = len(self.pairs)
        return [int(rng.shared() * count)] if self.config.timestep.select == "ranges" else list(range(count))

    def choose(self, images: Tensor, rng: Rows, progress: float, active: list[int]) -> tuple[Tensor, Tensor | None]:
        """images -> positions in ``timesteps`` (B,), and the policy's logits (B, A) where there is one."""
        config = self.config.timestep
        if config.select == "policy":
            logits = self.policy(images)
            return rng.categorical(logits.detach().float().softmax(1)), logits.float()
        span = config.spans[active[0]] if config.select == "ranges" else (0, config.open_choices(progress))
        return rng.integers(*span).to(images.device), None

    # Imitation

    def codes(self, batch: Batch, choice: Tensor, rng: Rows, active: list[int]) -> list[Tensor]:
        """What the teacher holds at each image's timestep, standardised, of each active pair (B, C, g, g)."""
        hints = self.teacher.hints(batch, self.timesteps[choice], [self.pairs[k].tap for k in active], rng)
        return [self.comparisons[k].standardised(hints[self.pairs[k].tap], choice) for k in active]

    def imitations(self, images: Tensor, grids: list[torch.Size], active: list[int]) -> list[Tensor]:
        """The student's maps on the codes' grids and in their widths."""
        maps = self.student.feature_maps(images, [self.pairs[k].student_tap for k in active])
        return [self.comparisons[k].imitation(x, grid) for k, x, grid in zip(active, maps, grids, strict=True)]

    def distance(
        self, imitations: list[Tensor], codes: list[Tensor], index: Tensor, rng: Rows, active: list[int]
    ) -> Tensor:
        """The weighted mean of the pairs' losses, ()."""
        each = [
            self.pairs[k].weight * self.comparisons[k].distance(imitation, code, index, rng)
            for k, imitation, code in zip(active, imitations, codes, strict=True)
        ]
        return torch.stack(each).sum() / sum(self.pairs[k].weight for k in active)

    # The reward

    def known(self, batch: Batch) -> Tensor:
        """Images that teach the policy, (B,) bool: those with a label, where the reward reads it."""
        if not self.config.timestep.reads_labels:
            return torch.ones_like(batch.index, dtype=torch.bool)
        assert batch.labels is not None  # refused by the recipe
        known = batch.labels >= 0
        if self.config.timestep.reward == "least_squares":
            return known & (known.sum() >= rewards.FEWEST)  # nothing can be told from fewer
        return known

    def reward(
        self, code: Tensor, batch: Batch, choice: Tensor, rng: Rows, imitation: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """How good each image's view is, (B,) without gradient; and what trains the head that judges, where one does.

        task: a small head classifies from the code. least_squares: the other images' codes tell its label. student:
        they tell what the student sees in it. common: it is told from the others by the view of its mirror image.
        """
        kind = self.config.timestep.reward
        if kind == "task":
            assert batch.labels is not None
            logits = self.task_head(self.summary(code))
            task_loss = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
            return -task_loss.detach(), task_loss
        if kind == "least_squares":
            return self._told_by_labels(code, batch), None
        if kind == "student":
            return rewards.least_squares(self.summary(code), self.summary(imitation)), None
        mirrored = replace(batch, images=batch.images.flip(3))
        return rewards.common(self.summary(code), self.summary(self.codes(mirrored, choice, rng, [0])[0])), None

    def _told_by_labels(self, code: Tensor, batch: Batch) -> Tensor:
        known, found = self.known(batch), code.new_zeros(len(code))
        assert batch.labels is not None
        goal = F.one_hot(batch.labels[known], self.num_classes).to(code)
        found[known] = rewards.least_squares(self.summary(code)[known], goal)
        return found

    def baseline(self, batch: Batch, logits: Tensor, rng: Rows, imitation: Tensor) -> Tensor:
        """What the reward is compared with, () or (B,); it does not depend on this step's actions."""
        kind = self.config.timestep.baseline
        if kind == "self_critical":  # the reward of what the policy thinks best (Rennie et al. 2017): one pass more
            best = logits.detach().argmax(1)
            with torch.no_grad():
                return self.reward(self.codes(batch, best, rng, [0])[0], batch, best, rng, imitation)[0]
        return self.running_reward if kind == "running_mean" else torch.zeros_like(self.running_reward)

    @property
    def code_size(self) -> int:
        """Numbers of a code that the task head and rewards read: whole maps are pooled for them."""
        return self.teacher.channels[self.config.tap] * (self.config.hint_grid or 1) ** 2

    def summary(self, code: Tensor) -> Tensor:
        """(B, C, g, g) -> (B, code_size)."""
        return losses.pooled(code, self.config.hint_grid or 1).flatten(1)

    def after_step(self) -> None:
        """One update of the running reward per step, from the labelled images of all micro-batches and processes."""
        if self.rewards:
            total, count = sum_over_processes(torch.stack(self.rewards).sum(0))
            decay = self.config.timestep.baseline_decay
            mean = torch.where(count > 0, total / count.clamp(min=1), self.running_reward)
            self.running_reward.copy_(decay * self.running_reward + (1 - decay) * mean)
            self.rewards = []
        for comparison in self.comparisons:
            comparison.after_step()

    def entropy_weight(self, progress: float) -> float:
        """Falls linearly from ``entropy_weight`` at 0 to nothing at ``entropy_until``."""
        config = self.config.timestep
        return config.entropy_weight * max(0.0, 1 - progress / config.entropy_until)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch]) -> None:
        """Mean and deviation of the hint per channel, over the training set and the timesteps in use."""
        super().prepare(batches)
        if self.config.standardise == "none":
            return
        found = statistics(self.teacher, list(self.teacher.channels), self._representative(), batches)
        for pair, comparison in zip(self.pairs, self.comparisons, strict=True):
            rows = found[pair.tap]  # (A', 2, C)
            comparison.measure(rows if self.config.standardise == "per_timestep" else rows.mean(0, keepdim=True))

    def _representative(self) -> list[int]:
        values = self.timesteps.tolist()
        if self.config.standardise == "per_timestep" or len(values) <= STATISTICS_TIMESTEPS:
            return values
        return [values[round(i * (len(values) - 1) / (STATISTICS_TIMESTEPS - 1))] for i in range(STATISTICS_TIMESTEPS)]

    def check_data(self, fingerprint: str, augment: str, num_images: int) -> None:
        self.teacher.check_data(fingerprint, augment)
        for comparison in self.comparisons:
            comparison.remember(num_images)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"student": [*self.student.parameters(), *self.comparisons.parameters()]}
        if self.config.timestep.select == "policy":
            head = {"task_head": [*self.task_head.parameters()]} if self.config.timestep.reward == "task" else {}
            groups |= {**head, "policy": [*self.policy.parameters()]}
        return groups

    def dry_step(self, images: Tensor) -> None:
        """Student, projectors, policy and task head; the teacher's share is counted apart."""
        grid, every = self.config.hint_grid or 1, list(range(len(self.pairs)))
        imitations = self.imitations(images, [torch.Size((grid, grid))] * len(every), every)
        loss = torch.stack([x.sum() for x in imitations]).sum()
        if self.config.timestep.select == "policy":
            loss = loss + self.policy(images).sum()
            if self.config.timestep.reward == "task":
                loss = loss + self.task_head(images.new_zeros(len(images), self.code_size)).sum()
        loss.backward()

    def frozen_multiply_adds(self) -> int:
        return self.teacher.multiply_adds(list(self.teacher.channels))

    def export(self, run_dir: Path) -> dict[str, Any]:
        save_student(run_dir, self.student)
        return {
            "teacher": self.teacher.name,
            "tap": self.config.tap,
            "timesteps": self.timesteps.tolist()[:MAX_SEPARATE],
        }


def hints_of(config: RepFusionConfig, allow_code: bool) -> LiveHints | StoredHints:
    """The teacher, or the store that stands in for it."""
    taps = list(dict.fromkeys(pair.tap for pair in config.pairs))
    if config.features:
        return StoredHints(config.features, taps, config.hint_grid)
    return LiveHints(config.teacher, taps, config.hint_grid, config.noise, allow_code, config.passes)
