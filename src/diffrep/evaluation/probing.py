"""One probe of a teacher: what it will take, the grid or the search, and the best pair as recipes read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from diffrep.console import Report
from diffrep.data.datasets import ImageSet
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.label_free import rank_correlation
from diffrep.evaluation.levels import last_of, levels_of, taps_of
from diffrep.evaluation.ridge import check_width
from diffrep.evaluation.search import Plan, Searcher, plan_of, search
from diffrep.evaluation.sweep import Bench, Counter, Row, SweepConfig, level_rows, sweep
from diffrep.frozen.diffusion import DiffusionTeacher

TIMED = 64  # images of the block that an estimate is timed on


class Probe:
    """Everything is checked when it is made; nothing is measured.

    untrained: the same network before training, where the config wants a control.

    Raises:
        UserError: an unknown tap or timestep, images of another size or without labels, a budget that is too small.
    """

    def __init__(
        self,
        teacher: DiffusionTeacher,
        train: ImageSet,
        held_out: ImageSet,
        config: SweepConfig,
        seed: int,
        device: torch.device,
        untrained: DiffusionTeacher | None = None,
    ) -> None:
        self.teacher, self.config, self.device, self.untrained = teacher, config, device, untrained
        teacher.check_size(*train.image_size)
        self.bench = Bench(train, held_out, config, seed)
        self.taps, steps = taps_of(teacher, config.taps), torch.tensor(config.timesteps, dtype=torch.int64)
        teacher.checked_timestep(steps, steps)
        if config.labels is None and not config.search:
            for tap in self.taps:
                check_width(self._width(tap), tap)
        for network in filter(None, (teacher, untrained)):
            network.run_as(config.passes)
            network.keep_only(self.taps)
        self.levels = levels_of(teacher.schedule, config.timesteps, config.sigmas, config.snrs, config.alpha_bars)
        self.plan = plan_of(self.bench, len(self.levels)) if config.search else None

    def _width(self, tap: str) -> int:
        """Numbers of its pooled feature."""
        shape = self.teacher.tap(tap).shape
        return shape[0] * self.config.pool**2 if len(shape) == 3 else shape[-1]

    @property
    def passes(self) -> int:
        """Images through the network, each level by itself; of a search at most."""
        if self.plan is not None:
            return self.plan.passes + self.plan.control_passes * self.config.control
        return self.bench.passes * (len(self.levels) + self.config.control)

    @cached_property
    def multiply_adds_each(self) -> int:
        """Up to the last tap."""
        return self.teacher.multiply_adds(last_of(self.teacher, self.taps))

    def planned(self) -> dict[str, Any]:
        """Said before the first image passes; of a search ``passes`` are without its control."""
        found: dict[str, Any] = {"passes": self.passes, "levels": len(self.levels), "taps": len(self.taps)}
        found["search"] = self.plan is not None
        if self.plan is not None:
            found |= {"passes": self.plan.passes, "grid_passes": self.plan.grid_passes}
            found["share_of_grid"] = self.plan.passes / self.plan.grid_passes
        return found | {"train_images": len(self.bench.train), "held_out_images": len(self.bench.held_out)}

    def cost(self) -> dict[str, Any]:
        """``planned``, counted multiply-adds, and seconds from one timed block."""
        size = self.teacher.image_size
        block = torch.zeros(TIMED, 3, size, size, device=self.device)
        timestep = self.levels[0].timestep
        self.teacher.features(block[:1], timestep, self.taps)  # what is only done once
        began = time.process_time()
        self.teacher.features(block, timestep, self.taps)
        each = (time.process_time() - began) / TIMED
        return self.planned() | {
            "images": self.passes,
            "multiply_adds": self.passes * self.multiply_adds_each,
            "seconds": each * self.passes,
            "disk_bytes": 0,
            "licences": {"weights": self.teacher.licence},
        }

    def run(self, kept: Kept, progress: Report, stop: Callable[[], bool]) -> dict[str, Any]:
        """Rows or rungs, the best pair, what it took.

        Raises:
            Interrupted: ``stop()`` said so; what is finished was kept.
        """
        tick = Counter(self.passes, progress, stop)
        found = self._searched(self.plan, kept, tick) if self.plan else self._swept(kept, tick)
        best = {"overrides": overrides(found["best"], self.config), "noise": self.config.noise}
        return found | best | {
            "images": {"train": len(self.bench.train), "held_out": len(self.bench.held_out)},
            "teacher": self.teacher.name,
            "licence": self.teacher.licence,
        }  # fmt: skip

    def _swept(self, kept: Kept, tick: Counter) -> dict[str, Any]:
        rows = sweep(self.teacher, self.bench, self.levels, self.taps, self.device, tick, kept)
        control: list[Row] = []
        if self.untrained is not None:
            cleanest = min(self.levels, key=lambda level: level.sigma)
            control = level_rows(self.untrained, self.bench, cleanest, self.taps, self.device, tick, kept)
        return {
            "rows": rows,
            "best": max(rows[1:], key=lambda row: row["mean"]),
            "label_free": label_free(rows[1:]),
            "control": control,
            "labels_seen": {"probe": self.config.labels or len(self.bench.train)},
            "images_seen": self.passes,
            "multiply_adds": self.passes * self.multiply_adds_each,
        }

    def _searched(self, plan: Plan, kept: Kept, tick: Counter) -> dict[str, Any]:
        searcher = Searcher(self.teacher, self.bench, self.device, kept, tick)
        found = search(searcher, plan, self.levels, self.taps, self.untrained)
        cost = {"images_seen": searcher.passes, "multiply_adds": searcher.multiply_adds}
        best = found.pop("best")
        return {"rows": [], "best": best, "search": found, "labels_seen": {"probe": best["images"]}, **cost}


def label_free(rows: Sequence[Row]) -> dict[str, Any]:
    """How well the label-free score ranks the pairs: Spearman's correlation with accuracy, over all and within a tap.

    chosen: the pair that it alone would have taken.
    """

    def correlation(of: Sequence[Row]) -> float | None:
        found = rank_correlation([row["label_free"] for row in of], [row["mean"] for row in of])
        return None if found is None else round(found, 3)

    taps = dict.fromkeys(row["tap"] for row in rows)
    within = {tap: correlation([row for row in rows if row["tap"] == tap]) for tap in taps}
    chosen = max(rows, key=lambda row: row["label_free"])
    return {"rank_correlation": correlation(rows), "within_tap": within, "chosen": chosen}


def best_recipe(best: Row, config: SweepConfig) -> dict[str, Any]:
    """The pair as a recipe's ``method`` part, to lay on a recipe of RepFusion (``base: RECIPE`` above it)."""
    timestep = {"select": "fixed", "values": [best["timestep"]]}
    return {"method": {"tap": best["tap"], "timestep": timestep, "hint_grid": config.pool, "noise": config.noise}}


def overrides(best: Row, config: SweepConfig) -> list[str]:
    """The same as words for ``--set``."""
    words = [
        f"method.tap={best['tap']}",
        "method.timestep.select=fixed",
        f"method.timestep.values=[{best['timestep']}]",
    ]
    return [*words, f"method.hint_grid={config.pool}", *([f"method.noise={config.noise}"] if config.noise else [])]
