"""CleanDIFT: a copy of a diffusion model learns to give, from the clean image and one constant timestep, what the
original gives from x_t at any t. Afterwards there is no timestep to choose and no noise to draw.

Stracke et al., "CleanDIFT: Diffusion Features without Noise", CVPR 2025.
Letters: B images, C channels of a tap, N its places, D width of the embedding of t, T timesteps of the original.

Deviations from the paper:
(1) The constant time input is a fraction of a timestep, which the network's own sinusoids embed: any network that reads
    fractions will do, and nothing is added to it. It may have a rate of its own (``optim.group_lr: {time: 1000}``):
    Adam at the weights' rate hardly moves a number of this size.
(2) For T other than 1,000 the thirds are those of [1, T - 1]. Original and copy are told the same class or prompt: the
    null class, or what stands behind the teacher's reference.
(3) The copy stays in eval mode, without dropout: so it is read afterwards.
Not stated where we read it, and chosen here: a feed-forward layer of a head is h + W2 GELU(W1 n), where n is h over its
root mean square, times 1 + a linear map of the embedding of t, and W2 is zero at the start in every layer; t is
embedded by DiT's sinusoids and a perceptron shared by all heads; every weight that the taps reach is trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from diffrep import losses
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen import clean
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.base import Method, MethodConfig
from diffrep.models.dit import WAVES, sinusoid
from diffrep.models.policies import mlp
from diffrep.randomness import Rows

THIRDS = 3  # of the timesteps: every image gets one from each


class CleanInputConfig(MethodConfig):
    """Which network is copied, where it is read, and the heads. Defaults are the published ones."""

    kind: Literal["clean_input"] = "clean_input"
    teacher: str  # what `diffrep probe` reads: diffusers folder, Hub id, run folder, official file, python:...
    taps: tuple[str, ...] = Field(min_length=1)  # dotted module paths; the loss is their sum
    start_timestep: int = Field(50, ge=0)  # what the copy is told at first; published 261, for Stable Diffusion
    head_layers: int = Field(3, ge=1)  # feed-forward layers between a tap of the copy and the original's
    time_width: int = Field(256, ge=1)  # D
    mapping_hidden: int = Field(768, ge=1)  # of the perceptron that embeds t
    mapping_depth: int = Field(2, ge=1)  # its hidden layers
    passes: PassConfig = PassConfig()  # how original and copy are run; compile: the original alone

    @field_validator("taps")
    @classmethod
    def _distinct(cls, taps: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(taps)) != len(taps):
            raise ValueError("one is named twice")
        return taps

    @field_validator("passes")
    @classmethod
    def _whole(cls, passes: PassConfig) -> PassConfig:
        if passes.memory_mb is not None:
            raise ValueError("memory_mb splits passes without gradients; here train.micro_batch_size saves memory")
        return passes


class CleanInput(Method):
    """Original, copy, constant timestep, heads."""

    uses_all_parameters = False  # nothing behind the last tap is reached

    def __init__(self, config: CleanInputConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config = config
        self.teacher = load_teacher(config.teacher, allow_code)  # frozen, no module
        self.teacher.run_as(config.passes)
        self.teacher.check_size(image_size, image_size)
        widths = [channels(self.teacher.tap(name).shape) for name in config.taps]
        self._check_timesteps()
        x = self.teacher.normalise(torch.zeros(1, 3, image_size, image_size))
        clean.check_learnable(self.teacher, x, config.taps, config.start_timestep)
        self.input_shape = tuple(x.shape[1:])
        self.network = copy.deepcopy(self.teacher.module).requires_grad_(True)
        self.teacher.keep_only(config.taps)
        self.time = nn.Parameter(torch.tensor(float(config.start_timestep)))
        self.mapping = mlp(WAVES, *[config.mapping_hidden] * config.mapping_depth, config.time_width)
        self.heads = nn.ModuleList(Head(width, config.time_width, config.head_layers) for width in widths)
        self.labels_behind = {f"teacher: {part}": n for part, n in self.teacher.labels_seen.items()}
        self.licence = f"{self.teacher.licence}: that of {self.teacher.name}, whose trained copy this is"

    def _check_timesteps(self) -> None:
        steps, name = self.teacher.num_train_timesteps, self.teacher.name
        if self.config.start_timestep >= steps:
            raise UserError(f"method.start_timestep {self.config.start_timestep} is outside 0..{steps - 1} of {name}")
        if steps <= THIRDS:
            raise UserError(f"method.teacher {name} has {steps} timesteps; thirds of 1..T-1 need {THIRDS + 1}")

    def train(self, mode: bool = True) -> CleanInput:
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        # 1. The copy sees the clean image, once, and always the same timestep.
        with torch.no_grad():
            x = self.teacher.normalise(batch.images)
        told = self.time.expand(len(x))
        features = clean.read_copy(self.teacher, self.network, x, told, self.config.taps)

        # 2. The original sees it at three noise levels; per level the heads bend the copy's features to the original's.
        found = [self.similarity(x, features, third, rng) for third in range(THIRDS)]

        # 3. What is maximised is the cosine, summed over the taps.
        cosine = torch.stack(found).mean(0)  # (taps,)
        parts = {f"cosine_{name}": value for name, value in zip(self.config.taps, cosine, strict=True)}
        return {"loss": -cosine.sum(), **parts, "time": self.time.detach().clone()}

    def similarity(self, x: Tensor, features: dict[str, Tensor], third: int, rng: Rows) -> Tensor:
        """Mean cosine over images and places at timesteps of one third, (taps,)."""
        low, high = bounds(third, self.teacher.num_train_timesteps)
        timestep = rng.integers(low, high).to(x.device)
        noise = rng.normal(*x.shape[1:]).to(x.device)
        with torch.no_grad():
            x_t = self.teacher.schedule.noised(x, noise, timestep)
            targets = clean.read_copy(self.teacher, self.teacher.module, x_t, timestep, self.config.taps)
        bent = self.bent(features, timestep)
        return torch.stack([cosine(bent[name], tokens(targets[name])) for name in self.config.taps])

    def bent(self, features: dict[str, Tensor], timestep: Tensor) -> dict[str, Tensor]:
        """head_k(f_k, t) for the features at every tap, each (B, N, C)."""
        embedding = self.mapping(sinusoid(timestep))  # (B, D)
        pairs = zip(self.config.taps, self.heads, strict=True)
        return {name: head(tokens(features[name]), embedding) for name, head in pairs}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        heads = [*self.mapping.parameters(), *self.heads.parameters()]
        return {"network": [*self.network.parameters()], "time": [self.time], "heads": heads}

    def dry_step(self, images: Tensor) -> None:
        x = images.new_zeros(len(images), *self.input_shape)
        features = clean.read_copy(self.teacher, self.network, x, self.time.expand(len(x)), self.config.taps)
        timestep = torch.zeros(len(x), device=x.device)
        bent = [value for _ in range(THIRDS) for value in self.bent(features, timestep).values()]
        torch.stack([value.sum() for value in bent]).sum().backward()

    def frozen_multiply_adds(self) -> int:
        """Three passes of the original, which ends at the last tap; an image is encoded once."""
        deepest = max(self.teacher.multiply_adds(tap) for tap in self.config.taps)
        return THIRDS * deepest - (THIRDS - 1) * getattr(self.teacher, "encoder_multiply_adds", 0)

    def export(self, run_dir: Path) -> dict[str, Any]:
        """The copy and its timestep, as a teacher; the heads are left behind."""
        massive = {block: tuple(found) for block, found in getattr(self.teacher, "massive", {}).items()}
        card = clean.ExtractorCard(
            original=self.config.teacher,
            original_sha256=self.teacher.sha256,
            licence=self.licence,
            timestep=float(self.time.detach()),
            taps=self.config.taps,
            massive=massive,
        )
        clean.write_extractor(run_dir, self.network, card)
        return {"teacher": self.teacher.name, "taps": list(self.config.taps), "timestep": card.timestep}


class Head(nn.Module):
    """(B, N, C) and the embedding of t (B, D) -> (B, N, C); the identity until it is trained."""

    def __init__(self, width: int, told: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward(width, told) for _ in range(layers))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h, embedding)
        return h


class FeedForward(nn.Module):
    """One layer of a head, as wide inside as outside; see the page's first lines."""

    def __init__(self, width: int, told: int) -> None:
        super().__init__()
        self.scale = nn.Linear(told, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        normalised = F.rms_norm(h, h.shape[-1:]) * (1 + self.scale(embedding)[:, None])
        return h + self.outer(F.gelu(self.inner(normalised)))


def bounds(third: int, num_timesteps: int) -> tuple[int, int]:
    """[low, high) of the third number 0, 1 or 2 of 1..T-1."""
    low, high = (1 + (num_timesteps - 1) * k // THIRDS for k in (third, third + 1))
    return low, high


def channels(shape: tuple[int, ...]) -> int:
    """C of a tap's feature (C, h, w), (N, C) or (C,)."""
    return shape[0] if len(shape) == 3 else shape[-1]


def tokens(feature: Tensor) -> Tensor:
    """(B, C, h, w), (B, N, C) or (B, C) -> (B, N, C)."""
    if feature.dim() == 4:
        return feature.flatten(2).transpose(1, 2)
    return feature if feature.dim() == 3 else feature[:, None]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and places of the cosine over channels; both (B, N, C)."""
    return 1 - losses.feature_cosine(student.transpose(1, 2), teacher.transpose(1, 2)).mean()
