"""accelerate, set up for one run: it finds devices and torchrun's processes by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from diffrep.errors import UserError


def accelerator(precision: str, track: Sequence[str], run_dir: Path, uses_all_parameters: bool) -> Accelerator:
    """An Accelerator with this run's precision and trackers.

    Raises:
        UserError: fp16 without a GPU, or a tracker that is not installed.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision 'fp16' needs a GPU; on a CPU use 'bf16' or 'no'")
    AcceleratorState._reset_state()  # several runs may share a process, each with its own precision
    unused = DistributedDataParallelKwargs(find_unused_parameters=not uses_all_parameters)
    try:
        made = Accelerator(
            mixed_precision=precision, log_with=list(track) or None, project_dir=str(run_dir), kwargs_handlers=[unused]
        )
    except ImportError as error:
        raise UserError(f"train.track: {error}; install it with: pip install 'diffrep[trackers]'") from None
    if track:
        made.init_trackers("diffrep")
    return made


def worst_of(values: Tensor) -> str:
    """What a non-finite tensor holds, in a word."""
    flat = values.flatten()
    number = float(flat[~torch.isfinite(flat)][0])
    return "NaN" if math.isnan(number) else "infinite"
