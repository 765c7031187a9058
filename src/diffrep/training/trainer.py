"""The one training loop. It never knows a concrete method: it calls one, steps, logs, saves, and can stop anywhere.

Every draw is a function of (seed, purpose, step), so an interrupted run continues to the same bits, and the result
does not depend on how the global batch is split over processes and micro-batches (to rounding, for losses per image).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.feed import Feed
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.methods.base import Method
from diffrep.randomness import Rows, seeded, stream
from diffrep.training import best, checkpoint
from diffrep.training.devices import accelerator, agreed, first_non_finite, gathered, in_shares, non_finite_weight
from diffrep.training.optim import Ema, OptimConfig, lr_factor, optimiser, set_rates
from diffrep.training.run import RunDir


class TrainConfig(Config):
    """How long, how much at once, how exact, and what is kept."""

    steps: int = Field(ge=0)  # updates; 0 keeps the initialisation
    batch_size: int = Field(64, ge=1)  # images per update over all devices
    micro_batch_size: int | None = Field(None, ge=1)  # images per device and forward; None: all of a device's share
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; fp16 needs a GPU
    clip_norm: float | None = Field(None, gt=0)  # of the gradient of all parts together
    ema_decay: float | None = Field(None, gt=0, lt=1)  # per step, of the trained part; the export then is the mean
    log_every: int = Field(50, ge=1)  # steps
    checkpoint_every: int = Field(500, ge=1)  # steps
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl


class Trainer:
    """Runs ``config.steps`` updates of ``method`` on ``feed``, from the last checkpoint in ``run`` if there is one."""

    def __init__(
        self, method: Method, feed: Feed, optim: OptimConfig, config: TrainConfig, seed: int, run: RunDir
    ) -> None:
        self.accelerator = accelerator(config.precision, config.track, run.path, method.uses_all_parameters)
        self.rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % processes:
            raise UserError(f"train.batch_size {config.batch_size} cannot be split over {processes} processes")
        self.rows = range(self.rank, config.batch_size, processes)  # strided, so that labelled rows are shared out
        self.method, self.feed, self.config, self.optim, self.seed, self.run = method, feed, config, optim, seed, run
        feed.to(self.accelerator.device)
        self.optimizer = optimiser(optim, method.parameter_groups(), config.batch_size, *method.depths())
        self.wrapped, self.stepper = self.accelerator.prepare(method, self.optimizer)
        self.ema = Ema(method, config.ema_decay) if config.ema_decay else None
        self.seconds = 0.0
        self.pending: list[dict[str, Tensor]] = []  # parts of the steps since the last log line

    def fit(self, stop: Callable[[], bool] = lambda: False, progress: Report = lambda *_: None) -> dict[str, Any]:
        """Train to the end; returns steps, images seen and CPU seconds.

        Raises:
            Interrupted: ``stop()`` said so; a checkpoint was written first.
            RunError: a loss was not finite: step, term and last good checkpoint are named.
        """
        step, steps = self.resume(), self.config.steps
        self.accelerator.init_trackers("diffrep")
        self.method.train()
        began = time.process_time() - self.seconds
        while step < steps:
            self.step(step)
            step += 1
            self.seconds = time.process_time() - began
            stopping = agreed(self.accelerator, stop()) and step < steps
            saving = step % self.config.checkpoint_every == 0 or step == steps or stopping
            if saving or step % self.config.log_every == 0:
                self.log(step)
            if saving:
                self.save(step)
            progress(step, steps)
            if stopping:
                raise Interrupted(f"stopped at step {step} of {steps}, saved; the same command goes on from there")
        if self.ema:
            self.ema.copy_to(self.method)
        self.accelerator.end_training()
        return {"steps": steps, "images_seen": steps * self.config.batch_size, "cpu_seconds": round(self.seconds, 2)}

    def step(self, step: int) -> None:
        """One update: the global batch in micro-batches, then the optimiser."""
        set_rates(self.optimizer, lr_factor(self.optim.lr_schedule, step, self.config.steps))
        shares = in_shares(self.rows, self.config.micro_batch_size)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(shares):
            batch = self.feed.batch(step, list(rows), self.accelerator.device)
            rng = Rows(stream(self.seed, "step", step, device=self.accelerator.device), self.config.batch_size, rows)
            more = number + 1 < len(shares)  # gradients are exchanged once, after the last micro-batch
            with self.accelerator.no_sync(self.wrapped) if more else contextlib.nullcontext():
                with seeded(self.seed, "dropout", step, self.rank, number):
                    parts = self.wrapped(batch, rng, step / self.config.steps)
                weight = len(rows) / len(self.rows)
                self.accelerator.backward(parts["loss"] * weight)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * weight
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.stepper.step()
        self.stepper.zero_grad()
        self.method.after_step()
        if self.ema:
            self.ema.update(self.method, step)
        self.pending.append(sums)

    def log(self, step: int) -> None:
        """Write the mean of each part since the last line, after all of it was found finite."""
        first = step - len(self.pending)
        stacked = gathered(self.accelerator, self.pending)
        self.pending = []
        if bad := first_non_finite(stacked) or non_finite_weight(self.method, step - first - 1):
            raise self.not_finite(bad[0], first + bad[1] + 1, bad[2])
        means = {n: v.mean(0).tolist() for n, v in stacked.items()}
        lr = self.optimizer.param_groups[0]["lr"]
        self.run.log({"step": step, **means, "lr": lr, "cpu_seconds": round(self.seconds, 3)})
        self.accelerator.log({n: v for n, v in means.items() if isinstance(v, float)} | {"lr": lr}, step=step)

    def not_finite(self, name: str, step: int, word: str) -> RunError:
        good = checkpoint.latest(self.run.path / "checkpoints")
        where = f"the last good checkpoint is {good}" if good else "there was no checkpoint yet"
        return RunError(f"{name} is {word} at step {step}; {where}; a lower optim.lr or train.clip_norm may help")

    def save(self, step: int) -> None:
        """Checkpoint; the caller has logged, so that none is written after a loss that was not finite."""
        if self.run.writes:
            scaler = self.accelerator.scaler
            note = {"cpu_seconds": self.seconds, "scaler": scaler.state_dict() if scaler else None}
            checkpoint.save(self.run.path / "checkpoints", step, self.method, self.optimizer, self.ema, note)
            best.offer(self.run.path, step, self.method)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """The step to start from."""
        found = checkpoint.latest(self.run.path / "checkpoints")
        note = checkpoint.load(found, self.method, self.optimizer, self.ema) if found else {"step": 0}
        if note.get("scaler") and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(note["scaler"])
        self.seconds = note.get("cpu_seconds", 0.0)
        self.run.forget_after(note["step"])
        return note["step"]
