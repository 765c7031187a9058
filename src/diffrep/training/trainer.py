"""The one training loop. It never knows a concrete method: it calls one, steps, logs, saves, and can stop anywhere.

Every draw is a function of (seed, purpose, step), so an interrupted run continues to the same bits, and the result
does not depend on how the global batch is split over processes and micro-batches (to rounding, for losses per image).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffrep.console import Report
from diffrep.data.dense_feed import DenseFeed
from diffrep.data.feed import Feed
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.methods.base import Method
from diffrep.randomness import Rows, seeded, stream
from diffrep.training import best, checkpoint, devices, sharding
from diffrep.training.config import TrainConfig
from diffrep.training.optim import Ema, OptimConfig, lr_factor, norm_parameters, optimiser, set_rates
from diffrep.training.run import RunDir


class Trainer:
    """Runs ``config.steps`` updates of ``method`` on ``feed``, from the last checkpoint in ``run`` if there is one."""

    def __init__(
        self, method: Method, feed: Feed | DenseFeed, optim: OptimConfig, config: TrainConfig, seed: int, run: RunDir
    ) -> None:
        self.accelerator = devices.accelerator(config.precision, config.track, run.path, method.uses_all_parameters)
        self.rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % processes:
            raise UserError(f"train.batch_size {config.batch_size} cannot be split over {processes} processes")
        self.rows = range(self.rank, config.batch_size, processes)  # strided, so that labelled rows are shared out
        self.method, self.feed, self.config, self.optim, self.seed, self.run = method, feed, config, optim, seed, run
        self.shards = config.sharding is not None and processes > 1
        if self.shards:
            sharding.check(optim.name, method)
        feed.to(self.accelerator.device)
        self.hand_out(method.to(self.accelerator.device) if self.shards else self.accelerator.prepare(method))
        self.seconds = 0.0
        self.pending: list[dict[str, Tensor]] = []  # parts of the steps since the last log line

    def hand_out(self, wrapped: nn.Module) -> None:
        """The optimiser of what the method's parameters are now; ``wrapped`` is what a step calls."""
        groups, batch_size = self.method.parameter_groups(), self.config.batch_size
        self.optimizer = optimiser(self.optim, groups, batch_size, *self.method.depths(), norm_parameters(self.method))
        self.wrapped, self.stepper = wrapped, self.accelerator.prepare(self.optimizer)
        self.ema = Ema(self.method, self.config.ema_decay) if self.config.ema_decay else None

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
            stopping = devices.agreed(self.accelerator, stop()) and step < steps
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
        sharding.gather(self.method)
        self.accelerator.end_training()
        return {"steps": steps, "images_seen": steps * self.config.batch_size, "cpu_seconds": round(self.seconds, 2)}

    def step(self, step: int) -> None:
        """One update: the global batch in micro-batches, then the optimiser."""
        set_rates(self.optimizer, lr_factor(self.optim.lr_schedule, step, self.config.steps))
        shares = devices.in_shares(self.rows, self.config.micro_batch_size)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(shares):
            batch = self.feed.batch(step, list(rows), self.accelerator.device)
            rng = Rows(stream(self.seed, "step", step, device=self.accelerator.device), self.config.batch_size, rows)
            apart = self.accelerator.no_sync(self.wrapped) if number + 1 < len(shares) else contextlib.nullcontext()
            with apart, devices.attention(self.accelerator):  # gradients are exchanged after the last micro-batch
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
        stacked = devices.gathered(self.accelerator, self.pending)
        self.pending = []
        if bad := devices.first_non_finite(stacked) or devices.non_finite_weight(
            self.accelerator, self.method, step - first - 1
        ):
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
        scaler, folder, writes = self.accelerator.scaler, self.run.path / "checkpoints", self.run.writes
        note = {"cpu_seconds": self.seconds, "scaler": scaler.state_dict() if scaler else None}
        checkpoint.save(folder, step, self.method, self.optimizer, self.ema, note, writes)
        with sharding.whole(self.method):
            if writes:
                best.offer(self.run.path, step, self.method)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """The step to start from. Shares are made now: ``Method.prepare`` was shown whole networks."""
        if self.shards:
            self.hand_out(sharding.sharded(self.method, self.accelerator))
        found = checkpoint.latest(self.run.path / "checkpoints")
        note = checkpoint.load(found, self.method, self.optimizer, self.ema) if found else {"step": 0}
        if note.get("scaler") and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(note["scaler"])
        self.seconds = note.get("cpu_seconds", 0.0)
        self.run.forget_after(note["step"])
        return note["step"]
