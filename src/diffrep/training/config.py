"""What a recipe says of training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffrep.config import Config


class TrainConfig(Config):
    """How long, how much at once, how exact, and what is kept."""

    steps: int = Field(ge=0)  # updates; 0 keeps the initialisation
    batch_size: int = Field(64, ge=1)  # images per update over all devices
    micro_batch_size: int | None = Field(None, ge=1)  # images per device and forward; None: all of a device's share
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; fp16 needs a GPU
    sharding: Literal["fsdp"] | None = None  # over several processes each keeps its share of weights and optimiser
    clip_norm: float | None = Field(None, gt=0)  # of the gradient of all parts together
    ema_decay: float | None = Field(None, gt=0, lt=1)  # per step, of the trained part; the export then is the mean
    log_every: int = Field(50, ge=1)  # steps
    checkpoint_every: int = Field(500, ge=1)  # steps
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl
