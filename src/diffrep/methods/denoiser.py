"""Train a diffusion model (DPM) of one's own images, to teach or to draw.

Ho et al. 2020 (epsilon prediction, linear betas), Nichol and Dhariwal 2021 (cosine), Salimans and Ho 2022
(v prediction), Ho and Salimans 2022 (label dropout for guidance). The network is diffusers' ``UNet2DModel``; what is
saved is a diffusers pipeline folder. Letters: B images, C channels, K classes, T timesteps.

Deviation: uniform weights over t (the simple loss); no learned variance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from diffrep import _torchvision_compat
from diffrep.data.batch import Batch
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.files import folder_aside, write_atomic
from diffrep.frozen.files import PIPELINE
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig, grid_png
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.base import Method, MethodConfig
from diffrep.randomness import Rows, derived_seed


class DenoiserConfig(MethodConfig):
    """A U-Net and its noise schedule. Defaults: the 0.63 M network for 8-pixel digits."""

    kind: Literal["denoiser"] = "denoiser"
    in_channels: Literal[1, 3] = 3  # 1: the network sees the mean of the three channels
    block_out_channels: tuple[int, ...] = Field(
        (32, 64), min_length=1
    )  # width per resolution, each half the size of the one before
    layers_per_block: int = Field(1, ge=1)
    norm_num_groups: int = Field(8, ge=1)
    mid_attention: bool = False
    attention_levels: tuple[int, ...] = ()  # positions in block_out_channels that get self-attention
    attention_head_dim: int | None = Field(8, ge=1)  # channels per head; None: one head
    dropout: float = Field(0.0, ge=0, lt=1)
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    noise_schedule: Literal["linear", "cosine"] = "linear"
    num_train_timesteps: int = Field(1000, ge=2)
    conditional: bool = False  # tell the network the class; label K is the null class
    label_dropout: float = Field(0.1, ge=0, le=1)  # share of labels replaced by the null class

    @model_validator(mode="after")
    def _fits(self) -> DenoiserConfig:
        odd = [c for c in self.block_out_channels if c < 1 or c % self.norm_num_groups]
        if odd:
            raise ValueError(f"block_out_channels: {odd[0]} is not divisible by norm_num_groups {self.norm_num_groups}")
        if any(not 0 <= level < len(self.block_out_channels) for level in self.attention_levels):
            raise ValueError(f"attention_levels: positions are 0..{len(self.block_out_channels) - 1}")
        return self

    def label_readers(self) -> tuple[str, ...]:
        return ("diffusion model (as its condition)",) if self.conditional else ()


class Denoiser(Method):
    """One step: noise the images, predict what was added."""

    def __init__(self, config: DenoiserConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.schedule = NoiseSchedule.named(config.noise_schedule, config.num_train_timesteps)
        self.network = unet(config, image_size, num_classes)

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        x = self.normalise(batch.images)  # (B, C, H, W) in [-1, 1]
        timestep = rng.integers(0, self.config.num_train_timesteps).to(x.device)
        noise = rng.normal(*x.shape[1:]).to(x.device)
        noised = self.schedule.noised(x, noise, timestep)
        target = noise if self.config.prediction == "epsilon" else self.schedule.velocity(x, noise, timestep)
        labels = self.dropped(batch.labels, rng) if self.config.conditional else None
        predicted = self.network(noised, timestep, class_labels=labels, return_dict=False)[0]
        return {"loss": F.mse_loss(predicted.float(), target)}

    def normalise(self, images: Tensor) -> Tensor:
        x = images.mean(1, keepdim=True) if self.config.in_channels == 1 else images
        return x * 2 - 1

    def dropped(self, labels: Tensor | None, rng: Rows) -> Tensor:
        """Labels with a share replaced by the null class K; hidden labels (-1) are always null."""
        assert labels is not None  # refused by the recipe
        drop = (rng.uniform().to(labels.device) < self.config.label_dropout) | (labels < 0)
        return torch.where(drop, self.num_classes, labels)

    @torch.no_grad()
    def illustrate(self, run_dir: Path, count: int, num_sampling_steps: str, seed: int) -> None:
        """``samples/grid.png``: ``count`` images, of the classes in turn where the model knows classes."""
        if not count:
            return
        generator = DiffusionGenerator(load_teacher(str(run_dir / PIPELINE)))
        labels = torch.arange(count) % self.num_classes if self.config.conditional else None
        seeds = [derived_seed(seed, "sample", k) for k in range(count)]
        images = generator.sample(labels, seeds, SamplingConfig(num_sampling_steps=num_sampling_steps))
        write_atomic(run_dir / "samples" / "grid.png", grid_png(images))

    def dry_step(self, images: Tensor) -> None:
        x = self.normalise(images)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        labels = steps if self.config.conditional else None
        self.network(x, steps, class_labels=labels, return_dict=False)[0].sum().backward()

    def export(self, run_dir: Path) -> dict[str, Any]:
        """A pipeline folder: plain ``DDPMPipeline.from_pretrained`` loads and, if unconditional, samples it."""
        _torchvision_compat.install()
        from diffusers import DDPMPipeline

        with folder_aside(run_dir / PIPELINE) as folder:
            DDPMPipeline(self.network, scheduler(self.config)).save_pretrained(folder)
        return {"pipeline": PIPELINE, "conditional": self.config.conditional}


def unet(config: DenoiserConfig, image_size: int, num_classes: int) -> Any:
    """A diffusers ``UNet2DModel`` with as many levels as ``block_out_channels``."""
    _torchvision_compat.install()
    from diffusers import UNet2DModel

    levels = len(config.block_out_channels)
    if image_size % 2 ** (levels - 1):
        raise UserError(f"method.block_out_channels: {image_size}-pixel images cannot be halved {levels - 1} times")
    with_attention = [level in config.attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=image_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in with_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(with_attention)),
        add_attention=config.mid_attention,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=num_classes + 1 if config.conditional else None,
    )


def scheduler(config: DenoiserConfig) -> Any:
    """The diffusers scheduler that samples what was trained here."""
    from diffusers import DDPMScheduler

    steps = config.num_train_timesteps
    betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[config.noise_schedule]
    schedule = NoiseSchedule.named(config.noise_schedule, steps)
    return DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=betas,
        beta_start=float(schedule.betas[0]),
        beta_end=float(schedule.betas[-1]),
        prediction_type=config.prediction,
    )
