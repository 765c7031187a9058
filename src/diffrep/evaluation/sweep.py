"""Which tap, which noise level? The linear probe of a teacher's features at each, with few labels or with all.

Few labels: the probe in kernel form over several label draws, with their spread. All labels: streaming sums, one pass
over the images for each noise level (streaming.py). How the best is found without measuring all: search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.data.datasets import ImageSet, label_subset
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import relevant
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.label_free import MOST_IMAGES, variance_ratio
from diffrep.evaluation.levels import Level
from diffrep.evaluation.probe import probe_scores
from diffrep.evaluation.streaming import (
    PIXEL_SIDE,
    PIXELS,
    Chosen,
    Read,
    Tick,
    pixel_reader,
    streamed,
    teacher_reader,
)
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig
from diffrep.randomness import derived_seed

Positive = Annotated[float, Field(gt=0)]
UNITS = ("timesteps", "sigmas", "snrs", "alpha_bars")


class SweepConfig(Config):
    """The grid, and with how many labels each point is judged."""

    taps: tuple[str, ...] = Field(min_length=1)  # dotted names; ("all",): every block
    # Noise levels in one of four units; the nearest timestep is measured. None of them: 8 sigmas from 0.02 to 1.
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = ()
    sigmas: tuple[Positive, ...] = ()  # sqrt((1 - alpha_bar) / alpha_bar)
    snrs: tuple[Positive, ...] = ()  # alpha_bar / (1 - alpha_bar)
    alpha_bars: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    pool: int = Field(1, ge=1)  # cells per side each map is pooled to
    noise: Literal["forward"] | None = None  # None: clean image
    labels: int | None = None  # labelled images of each draw, class-balanced; None = all, in one pass
    draws: int = Field(5, ge=1)  # label draws; their spread is reported; of no meaning with all labels
    split: Literal["validation", "test"] = "test"  # where accuracy is measured
    train_images: int | None = Field(None, ge=2)  # of the training images, class-balanced; None = all
    held_out_images: int | None = Field(None, ge=1)  # of those accuracy is measured on, class-balanced; None = all
    control: bool = False  # also probe the untrained network, at the lowest noise level or at the pair found
    search: bool = False  # find the best pair without measuring all
    budget: float = Field(0.09, gt=0, le=1)  # of a search: share of the passes of a grid of 20 levels
    passes: PassConfig = PassConfig()

    @model_validator(mode="after")
    def _fits(self) -> SweepConfig:
        given = [unit for unit in UNITS if getattr(self, unit)]
        if len(given) > 1:
            raise ValueError(f"noise levels are given once: {' or '.join(given)}")
        if self.labels is not None and self.search:
            raise ValueError("search scores by leave-one-out on its own labelled images: leave labels out")
        if self.labels is not None and self.train_images is not None:
            raise ValueError("train_images belongs to the probe with all labels; with few, labels says how many")
        return self


Row = dict[str, Any]


class Bench:
    """What every point of a grid is judged on: images, labels, the rule.

    passes: images that go through the teacher at each noise level.
    """

    def __init__(self, train: ImageSet, held_out: ImageSet, config: SweepConfig, seed: int) -> None:
        if train.labels is None or held_out.labels is None:
            raise UserError(f"probe: {train.name} has no labels to score against")
        self.config, self.seed, self.num_classes = config, seed, len(train.classes)
        self.held_out = Chosen(held_out, labelled(held_out, config.held_out_images, seed))
        if config.labels is None:
            self.train = Chosen(train, labelled(train, config.train_images, seed))
        else:
            # The first draw is the one that training with this seed and as many labels sees.
            seeds = [seed, *(derived_seed(seed, "label draw", d) for d in range(1, config.draws))]
            draws = [label_subset(train.labels, config.labels, s) for s in seeds]
            kept, self.draws = relevant(train, draws)
            self.train = Chosen(kept, torch.arange(len(kept)))

    @property
    def passes(self) -> int:
        return len(self.train) + len(self.held_out)

    def scores(self, read: Read, tick: Tick) -> dict[str, Row]:
        """Reading -> mean and standard deviation over the draws in percent, and the label-free score."""
        if self.config.labels is None:
            found = streamed(read, [self.train], self.held_out, self.num_classes, self.seed, tick)
            return {n: told([a[0]], found.ratios[n]) for n, a in found.accuracies.items()}
        seen, unseen = (gathered(read, chosen, tick) for chosen in (self.train, self.held_out))
        labels = [chosen.labels(chosen.positions) for chosen in (self.train, self.held_out)]
        rows = {}
        for name, x in seen.items():
            accuracies = probe_scores(x, labels[0], unseen[name], labels[1], self.draws, self.num_classes)
            every = -(-len(x) // MOST_IMAGES)
            rows[name] = told(accuracies, variance_ratio(x[::every], self.num_classes, self.seed))
        return rows


def labelled(images: ImageSet, count: int | None, seed: int) -> Tensor:
    """Ascending positions of the labelled images, or of a class-balanced draw of them: (N,) int64 on the CPU."""
    assert images.labels is not None  # refused before
    if count is None:
        return (images.labels.cpu() >= 0).nonzero()[:, 0]
    return label_subset(images.labels, count, seed).sort().values


def gathered(read: Read, chosen: Chosen, tick: Tick = lambda _: None) -> dict[str, Tensor]:
    """Every reading of the images, (N, D) float32: for as many as fit in memory."""
    found: dict[str, list[Tensor]] = {}
    for positions in chosen.blocks():
        for name, x in read(chosen.images, positions).items():
            found.setdefault(name, []).append(x)
        tick(len(positions))
    return {name: torch.cat(blocks) for name, blocks in found.items()}


def told(accuracies: Sequence[float], ratio: float) -> Row:
    scores = torch.tensor(accuracies)
    spread = float(scores.std()) if len(scores) > 1 else 0.0
    return {"mean": round(float(scores.mean()), 3), "sd": round(spread, 3), "label_free": round(ratio, 5)}


def sweep(
    teacher: DiffusionTeacher,
    bench: Bench,
    levels: Sequence[Level],
    taps: Sequence[str],
    device: torch.device,
    tick: Counter,
    kept: Kept,
) -> list[Row]:
    """One row per (tap, noise level), raw pixels as first row; what is in ``kept`` is not measured again.

    All taps of a level come from one pass, which ends at the last of them.
    """
    side = PIXEL_SIDE if bench.config.labels is None else None
    found = kept.once("pixels", lambda: bench.scores(pixel_reader(side), lambda _: None))
    rows = [{"tap": PIXELS, **dict.fromkeys(Level.__annotations__), **found[PIXELS]}]
    for level in levels:
        rows += level_rows(teacher, bench, level, taps, device, tick, kept)
    return rows


def level_rows(
    teacher: DiffusionTeacher,
    bench: Bench,
    level: Level,
    taps: Sequence[str],
    device: torch.device,
    tick: Counter,
    kept: Kept,
) -> list[Row]:
    """One row per tap at one noise level."""
    name, config = f"{teacher.name}, t={level.timestep}", bench.config

    def measured() -> list[Row]:
        read = teacher_reader(teacher, level.timestep, taps, config.pool, config.noise, bench.seed, device)
        found = bench.scores(read, tick)
        return [{"tap": tap, **level.told(), **found[tap]} for tap in taps]

    if name in kept:
        tick.skip(bench.passes)
    return kept.once(name, measured)


class Counter:
    """Counts images that passed, tells them, and ends the work when someone wishes so."""

    def __init__(self, total: int, progress: Report, stop: Callable[[], bool]) -> None:
        self.total, self.progress, self.stop, self.done = total, progress, stop, 0

    def __call__(self, images: int) -> None:
        self.skip(images)
        if self.stop():
            raise Interrupted("stopped; finished noise levels are kept, and the same command goes on after them")

    def skip(self, images: int) -> None:
        self.done += images
        self.progress(self.done, self.total)
