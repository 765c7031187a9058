"""Published teachers read in the middle, against their full pass: multiply-adds exactly, CPU time, memory.

Weights are random: cost does not depend on them. CPU time may be that share of the multiply-adds and 5 points more.
Memory is counted (weights that :meth:`keep_only` leaves, and the most that one image holds on its way) and measured:
the most that a process of its own holds during one pass, Python and torch in it. Counted attention is written out,
which the fused kernel of a real pass never is: counted may exceed measured.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import line, rivals
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher

GB, PLAIN = 1e9, PassConfig()
SLACK = 0.05  # of the full pass, that the CPU time of a truncated one may exceed its share of the multiply-adds
SELF = Path("/proc/self")  # Linux on this process


class Published(NamedTuple):
    """A teacher of the methods here, where it is read, and how long one may wait for it."""

    key: str
    tap: str
    batch: int = 1
    repeats: int = 3


TEACHERS = (
    Published("ddpm-cifar10-32", "mid_block", batch=8),
    Published("ddpm-ema-celebahq-256", "mid_block"),
    Published("adm-64", "middle_block", batch=4),
    Published("adm-256-uncond", "middle_block", repeats=1),
    Published("dit-xl-2-256", "blocks.13"),
)


def measure() -> list[dict[str, Any]]:
    """For each teacher CPU seconds, memory counted, memory measured."""
    return [row for each in TEACHERS for row in (_passed(each), _counted(each), _held(each))]


def _passed(each: Published) -> dict[str, Any]:
    return truncated(loaded(each.key), each.key, each.tap, each.batch, each.repeats)


def truncated(teacher: DiffusionTeacher, key: str, tap: str, batch: int, repeats: int) -> dict[str, Any]:
    """One pass up to ``tap`` against the full one; holds: whether the CPU time follows the multiply-adds."""
    given = inputs(teacher, batch)
    ours, theirs = rivals(lambda: teacher.features(*given, [tap]), _whole(teacher, *given), repeats)
    counted, full = teacher.multiply_adds(tap), teacher.multiply_adds()
    return line(
        f"{key} up to {tap}",
        "its full pass",
        ours,
        theirs,
        unit=f"CPU s, batch {batch}",
        multiply_adds=counted,
        multiply_adds_full=full,
        multiply_adds_share=round(counted / full, 4),
        cpu_share=round(ours / theirs, 4),
        holds=ours / theirs <= counted / full + SLACK,
    )


def loaded(key: str) -> DiffusionTeacher:
    """With random weights; one of latents is given latents, as its VAE is no part of the pass."""
    teacher = load_teacher(f"random:{key}")
    if teacher.in_channels != 3:
        vars(teacher)["normalise"] = lambda latents: latents
    return teacher


def inputs(teacher: DiffusionTeacher, batch: int) -> tuple[Tensor, Tensor]:
    side = teacher.image_size
    return torch.rand(batch, teacher.in_channels, side, side), torch.full((batch,), 100)


def _whole(teacher: DiffusionTeacher, images: Tensor, timestep: Tensor) -> Callable[[], Tensor]:
    x = teacher.normalise(images)
    return lambda: teacher.predict(x, timestep)


# Memory


def _counted(each: Published) -> dict[str, Any]:
    teacher = loaded(each.key)
    weights, last = _weights(teacher), teacher.taps()[-1].name
    ours, theirs = (each.batch * teacher.peak_bytes([tap]) for tap in (each.tap, last))
    teacher.keep_only([each.tap])
    kept = _weights(teacher)
    return line(
        f"{each.key} up to {each.tap}: weights kept and activations, counted",
        "of its full pass",
        (kept + ours) / GB,
        (weights + theirs) / GB,
        unit=f"GB, batch {each.batch}",
        weights=[kept, weights],
        activations=[ours, theirs],
    )


def _weights(teacher: DiffusionTeacher) -> int:
    return sum(parameter.nbytes for parameter in teacher.module.parameters())


def _held(each: Published) -> dict[str, Any]:
    ours, theirs = (peak_alone(each, truncate) for truncate in (True, False))
    name = f"{each.key} up to {each.tap}: peak of a process"
    return line(name, "of its full pass", ours, theirs, unit=f"GB, batch {each.batch}")


def peak_alone(each: Published, truncate: bool, passes: PassConfig = PLAIN) -> float:
    """Most resident GB of a process of its own during one pass."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (each, truncate, passes))


def _peak(each: Published, truncate: bool, passes: PassConfig) -> float:
    """Building random weights, which no file needs, is forgotten."""
    torch.set_num_threads(1)
    teacher = loaded(each.key)
    teacher.run_as(passes)
    if truncate:
        teacher.keep_only([each.tap])
    given = inputs(teacher, each.batch)
    (SELF / "clear_refs").write_text("5")  # forgets the peak so far
    if truncate:
        teacher.features(*given, [each.tap])
    else:
        _whole(teacher, *given)()
    return peak_so_far() / GB


def peak_so_far() -> int:
    """Bytes. Not ``getrusage``: its peak begins with what the parent held when it started this process."""
    found = re.search(r"VmHWM:\s*(\d+) kB", (SELF / "status").read_text())
    assert found
    return 1024 * int(found[1])
