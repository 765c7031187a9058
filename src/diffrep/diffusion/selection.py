"""Which timesteps a method may choose from, and how one is chosen where no policy learns to.

Letters: A timesteps to choose from, B images.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffrep.config import Config

LONGEST_SCHEDULE = 100_000  # timesteps; the teacher's own length is asked when it is loaded


class TimestepConfig(Config):
    """From which timesteps one is chosen for each image, and how."""

    select: Literal["fixed", "range", "list", "policy"] = "policy"
    values: tuple[int, ...] = ()  # fixed: one; range: low, high (not included); list, policy: the choices
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
        return tuple(range(*self.values)) if self.select == "range" else self.values

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
