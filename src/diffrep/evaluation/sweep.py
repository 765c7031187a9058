"""Which tap, which timestep? The linear probe of a teacher's features at each, with few labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.datasets import ImageSet, label_subset
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import outputs, relevant
from diffrep.evaluation.probe import probe_scores
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.randomness import Rows, derived_seed, stream


class SweepConfig(Config):
    """The grid, and with how many labels each point is judged."""

    taps: tuple[str, ...] = Field(min_length=1)
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(min_length=1)
    pool: int = Field(1, ge=1)  # cells per side each map is pooled to
    noise: Literal["forward"] | None = None  # None: clean image
    labels: int | None = None  # labelled images of each draw, class-balanced; None = all
    draws: int = Field(5, ge=1)  # label draws; their spread is reported
    split: Literal["validation", "test"] = "test"  # where accuracy is measured


def sweep(
    teacher: DiffusionTeacher,
    train: ImageSet,
    held_out: ImageSet,
    config: SweepConfig,
    seed: int,
    device: torch.device,
    progress: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """One row per (tap, timestep): mean and standard deviation over the draws, percent; raw pixels as first row.

    All taps of a timestep come from one pass, which ends at the last of them.
    """
    if train.labels is None or held_out.labels is None:
        raise UserError(f"probe: {train.name} has no labels to score against")
    num_classes = len(train.classes)
    # The first draw is the one that training with this seed and as many labels sees.
    seeds = [seed, *(derived_seed(seed, "label draw", d) for d in range(1, config.draws))]
    train, draws = relevant(train, [label_subset(train.labels, config.labels or len(train), s) for s in seeds])
    labels = train.labels
    assert labels is not None  # as before

    def row(tap: str, timestep: int | None, seen: Tensor, unseen: Tensor) -> dict[str, Any]:
        scores = torch.tensor(probe_scores(seen, labels, unseen, held_out.labels, draws, num_classes))
        spread = float(scores.std()) if len(scores) > 1 else 0.0
        return {"tap": tap, "timestep": timestep, "mean": round(float(scores.mean()), 3), "sd": round(spread, 3)}

    pixels = [outputs(lambda x: x.flatten(1), images, device) for images in (train, held_out)]
    rows = [row("pixels", None, *pixels)]
    for number, timestep in enumerate(config.timesteps):
        seen, unseen = (features_of(teacher, images, timestep, config, seed, device) for images in (train, held_out))
        rows += [row(tap, timestep, seen[tap], unseen[tap]) for tap in config.taps]
        progress(number + 1, len(config.timesteps))
        if stop():
            raise Interrupted(f"stopped after t = {timestep}; a sweep begins anew the next time")
    return rows


def features_of(
    teacher: DiffusionTeacher, images: ImageSet, timestep: int, config: SweepConfig, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """{tap: (N, D)} pooled features of all images at one timestep."""
    rng = stream(seed, "probe noise", timestep, images.split)
    found: dict[str, list[Tensor]] = {tap: [] for tap in config.taps}

    def read(pixels: Tensor) -> Tensor:
        features = teacher.features(pixels, timestep, config.taps, config.noise, rng=Rows(rng, len(pixels)))
        for tap, feature in features.items():
            pooled = F.adaptive_avg_pool2d(feature.float(), config.pool) if feature.dim() == 4 else feature
            found[tap].append(pooled.flatten(1).cpu())
        return pixels.new_zeros(len(pixels))

    outputs(read, images, device)
    return {tap: torch.cat(blocks) for tap, blocks in found.items()}
