"""accelerate, set up for one run: it finds devices and torchrun's processes by itself."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.training.sharding import finite


def accelerator(precision: str, track: Sequence[str], run_dir: Path, uses_all_parameters: bool) -> Accelerator:
    """An Accelerator with this run's precision and trackers.

    Raises:
        UserError: fp16 without a GPU, or a tracker that is not installed.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a GPU; on a CPU use 'bf16' or 'fp32'")
    for name in track:  # accelerate would leave it out with a warning
        if find_spec(name) is None:
            raise UserError(f"train.track: '{name}' is not installed; install it with: pip install 'diffrep[trackers]'")
    AcceleratorState._reset_state()  # several runs may share a process, each with its own precision
    # Without this word accelerate takes torchrun's processes on CPUs for strangers, each with the whole batch.
    on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    unused = DistributedDataParallelKwargs(find_unused_parameters=not uses_all_parameters)
    try:
        made = Accelerator(
            cpu=on_cpus,
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(track) or None,
            project_dir=str(run_dir),
            kwargs_handlers=[unused],
        )
    except ImportError as error:
        raise UserError(f"train.track: {error}; install it with: pip install 'diffrep[trackers]'") from None
    return made


def attention(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Which attention a step takes: torch's fastest, but by its formula in bfloat16 on a CPU.

    There the fused one is several times slower backwards: ``python -m benchmarks attention``.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


def in_shares(rows: range, size: int | None) -> list[range]:
    """A device's rows in stretches of at most ``size``: its micro-batches."""
    size = size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def agreed(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes to stop: each for itself, they would stop at different steps."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device)).item())


def gathered(accelerator: Accelerator, pending: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of each logged part the values of all steps, (steps, ...), as their mean over the processes."""
    return {n: accelerator.reduce(torch.stack([parts[n] for parts in pending]), "mean") for n in pending[0]}


def non_finite_weight(accelerator: Accelerator, method: nn.Module, position: int) -> tuple[str, int, str] | None:
    """Like :func:`first_non_finite`, of what is trained: a finite loss may have an infinite gradient.

    All processes find the same, also where each holds a share of a weight.
    """
    names, good = zip(*((name, finite(value)) for name, value in method.named_parameters()), strict=True)
    bad = accelerator.reduce((~torch.stack(good)).float())
    return next(((f"weight {names[k]}", position, "not finite") for k in bad.nonzero()[:1, 0].tolist()), None)


def first_non_finite(parts: dict[str, Tensor]) -> tuple[str, int, str] | None:
    """Of logged parts, {name: (steps, ...)}: the first that is not finite, its position, and what it is."""
    found = []
    for name, values in parts.items():
        bad = ~torch.isfinite(values.reshape(len(values), -1))
        if bad.any():
            position = int(bad.any(1).nonzero()[0])
            value = float(values.reshape(len(values), -1)[position][bad[position]][0])
            found.append((name, position, "NaN" if math.isnan(value) else "infinite"))
    # A part explains the weighted sum, so at equal steps it is named before "loss".
    return min(found, key=lambda item: (item[1], item[0] == "loss"), default=None)
