"""Which timesteps a method may choose from, and how one is chosen where no policy learns to.

Letters: A timesteps to choose from, B images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.errors import UserError
from diffrep.files import read_json

LONGEST_SCHEDULE = 100_000  # timesteps; the teacher's own length is asked when it is loaded


class TimestepConfig(Config):
    """From which timesteps one is chosen for each image, and how."""

    select: Literal["fixed", "range", "ranges", "list", "policy", "probed"] = "policy"
    # fixed: one; range: low, high (not included); ranges: the bounds of one range per tap pair, rising (each step
    # draws a pair, official MutiStep); list, policy: the choices; probed: none
    values: tuple[int, ...] = ()
    probe: str | None = None  # of probed: a finished `diffrep probe` folder, whose best timestep is taken
    decay_to: int | None = None  # of a range: its high falls linearly to this one (official TimeDecayHook: 50)
    decay_until: float = Field(0.5, gt=0, le=1)  # progress at which it is there; official: epoch 100 of 200
    policy: Literal["small", "conv", "mlp"] = "small"  # network: ours for any size; the official two
    reward: Literal["task", "least_squares", "student", "common"] = "task"  # models/rewards.py
    baseline: Literal["running_mean", "none", "self_critical"] = "running_mean"  # subtracted from the reward
    baseline_decay: float = Field(0.9, ge=0, lt=1)  # per step
    entropy_weight: float = Field(0.1, ge=0)  # at progress 0; official entropy_reg
    entropy_until: float = Field(0.5, gt=0, le=1)  # progress at which it has faded to 0; official: epoch 100 of 200

    @model_validator(mode="after")
    def _fits(self) -> TimestepConfig:
        count = len(self.values)
        if any(not 0 <= t < LONGEST_SCHEDULE for t in self.values):
            raise ValueError(f"timesteps are in 0..{LONGEST_SCHEDULE - 1}, and fewer in most schedules")
        if self.select == "fixed" and count != 1:
            raise ValueError(f"select 'fixed' takes one value, not {count}")
        if self.select == "range" and (count != 2 or self.values[0] >= self.values[1]):
            raise ValueError("select 'range' takes two values: low, high with low < high")
        if self.select == "ranges" and (count < 3 or list(self.values) != sorted(self.values)):
            raise ValueError("select 'ranges' takes rising bounds, one more than tap pairs, e.g. [0, 50, 200]")
        if (self.select == "probed") != (self.probe is not None) or (self.select == "probed" and count):
            raise ValueError("select 'probed' takes probe, a finished `diffrep probe` folder, and no values")
        if self.select in ("list", "policy") and count < 1:
            raise ValueError(f"select '{self.select}' needs the timesteps to choose from")
        if self.select != "range" and len(set(self.values)) != count:
            raise ValueError("a timestep is named twice")
        self._decays()
        return self

    def _decays(self) -> None:
        if self.decay_to is None:
            return
        if self.select != "range":
            raise ValueError(f"decay_to lowers the end of a range; select '{self.select}' has none")
        if not self.values[0] < self.decay_to < self.values[1]:
            low, high = self.values
            raise ValueError(f"decay_to {self.decay_to} is not between {low} and {high}, the ends of the range")

    def choices(self) -> tuple[int, ...]:
        """The A timesteps."""
        spans = self.select in ("range", "ranges")
        return tuple(range(self.values[0], self.values[-1])) if spans else self.values

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of ranges: first and last position (not included) among the choices, for each tap pair."""
        return [(low - self.values[0], high - self.values[0]) for low, high in pairwise(self.values)]

    def open_choices(self, progress: float) -> int:
        """How many of them, from the first, are open at ``progress``: all, or those below a falling end."""
        if self.decay_to is None:
            return len(self.choices())
        low, high = self.values
        end = high + (self.decay_to - high) * min(1.0, progress / self.decay_until)
        return max(1, int(end) - low)

    @property
    def reads_labels(self) -> bool:
        """Whether the policy's reward does."""
        return self.select == "policy" and self.reward in ("task", "least_squares")


@dataclass(frozen=True)
class Probed:
    """What a finished probe says: where and when to look, in which network, and how many labels told it so."""

    folder: str
    tap: str
    timestep: int
    noise: str | None
    teacher_sha256: str | None
    num_labels: int

    def check(self, tap: str, noise: str | None, teacher_sha256: str) -> None:
        """Refuse to take its timestep for another tap, another input or another teacher."""
        where = f"method.timestep.probe: {self.folder}"
        if self.tap != tap:
            raise UserError(f"{where} found '{self.tap}', and method.tap is '{tap}'")
        if self.noise != noise:
            raise UserError(f"{where} looked with noise {self.noise or 'none'}, and method.noise is {noise or 'none'}")
        if self.teacher_sha256 not in (None, teacher_sha256):
            raise UserError(f"{where} looked into another network than method.teacher")


def probed(folder: str) -> Probed:
    """Read a finished probe.

    Raises:
        UserError: there is none.
    """
    file = Path(folder) / "result.json"
    found = read_json(file) if file.exists() else {}
    if found.get("kind") != "probe":
        raise UserError(f"method.timestep.probe: {folder} is no finished probe (no result.json of one)")
    best, seen = found["best"], found.get("labels_seen", {})
    noise, sha256 = found.get("noise"), found.get("teacher_sha256")
    return Probed(folder, best["tap"], best["timestep"], noise, sha256, max(seen.values(), default=0))


def resolved(config: TimestepConfig) -> tuple[TimestepConfig, Probed | None]:
    """The same with what a probe found in place of its folder, and what was found; anything else stays as it is."""
    if config.probe is None:
        return config, None
    found = probed(config.probe)
    return config.model_copy(update={"select": "fixed", "values": (found.timestep,), "probe": None}), found


BINS = 32  # of the log's histogram of chosen timesteps


def binned(timesteps: Tensor, end: int, bins: int = BINS) -> Tensor:
    """The share of images in each of ``bins`` equal parts of 0..end, (bins,): a mean, so that micro-batches add up.

    Args:
        timesteps: (B,) int64 in 0..end-1.
    """
    return F.one_hot(timesteps * bins // end, bins).float().mean(0)
