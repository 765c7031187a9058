"""Shards as an array of Slurm jobs, through submitit (extra ``slurm``); a training is one: slurm_training.py.

A job makes a stretch of shards. At its time limit, or when it is preempted, it is queued again and makes what is still
missing. All else that a cluster wants stands in Slurm's own variables (SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...), which
outrank what is asked for here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from diffrep.errors import DiffrepError, Interrupted, RunError, UserError
from diffrep.launch.jobs import Engine, Images, Job, Noted, Stop

LOGS = ".slurm"  # inside the set's folder, because all machines must see it; gone when all went well
MOST = 64  # jobs of one array, unless told otherwise
MINUTES = 24 * 60  # of one job
TIMEOUTS = 20  # how often one job may be queued again after its time


@dataclass(frozen=True)
class Stretch:
    """Some shards, one after the other; what submitit runs on another machine."""

    job: Job
    numbers: tuple[int, ...]

    def __call__(self) -> tuple[int, str]:
        """Exit code and line of what went wrong, (0, "") if nothing did."""
        torch.set_num_threads(1)
        folder = Path(self.job.folder)
        try:
            for number in self.numbers:
                if not self.job.open().is_made(folder, number):
                    self.job.make(number)
        except DiffrepError as error:
            return error.exit_code, str(error)
        return 0, ""

    def checkpoint(self) -> Any:
        """submitit's word for: queue me again, as I am."""
        return installed().helpers.DelayedSubmission(self)


def on_slurm(partition: str, jobs: int | None = None, executor: Callable[[Path], Any] | None = None) -> Engine:
    """An engine of Slurm jobs.

    Args:
        partition: "" leaves it to the cluster.
        jobs: of the array; default one per shard, up to 64.
        executor: what makes submitit's executor from its log folder; tests give submitit's local one.
    """
    submitit = installed()
    if executor is None and not shutil.which("sbatch"):
        raise UserError("--slurm: there is no sbatch on this machine; run it where Slurm jobs are submitted from")

    def run(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
        if not numbers:
            return
        logs = Path(job.folder) / LOGS
        made = executor(logs) if executor else cluster(submitit, logs, partition)
        count = min(jobs or MOST, len(numbers))
        stretches = [Stretch(job.anywhere(), tuple(numbers[k::count])) for k in range(count)]
        submitted = made.map_array(Stretch.__call__, stretches)
        try:
            _wait(submitted, Noted(job, numbers, report), stop)
        except BaseException:
            for each in submitted:
                each.cancel(check=False)
            raise
        shutil.rmtree(logs, ignore_errors=True)

    return run


def installed() -> ModuleType:
    """submitit."""
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit; install it with: pip install 'diffrep[slurm]'") from None
    return submitit


def cluster(submitit: ModuleType, logs: Path, partition: str, nodes: int = 1, tasks: int = 1) -> Any:
    """submitit's executor of jobs that have ``tasks`` processes on each of ``nodes`` machines, and GPUs for them."""
    made = submitit.SlurmExecutor(folder=logs, max_num_timeout=TIMEOUTS)
    asked: dict[str, Any] = {"job_name": "diffrep", "time": MINUTES, "nodes": nodes, "ntasks_per_node": tasks}
    asked |= {"cpus_per_task": 1, "setup": ["export OMP_NUM_THREADS=1"]}
    asked |= {"partition": partition} if partition else {}
    asked |= {"gpus_per_node": tasks} if _has_gpus(partition) else {}
    made.update_parameters(**asked)
    return made


def _has_gpus(partition: str) -> bool:
    """Whether Slurm's own table says so; what the user's variables ask for is not asked for again."""
    if any(name.startswith(("SBATCH_GPUS", "SBATCH_GRES")) for name in os.environ):
        return False
    command = ["sinfo", "--noheader", "--format=%G", *(["--partition", partition] if partition else [])]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return "gpu" in found.stdout


def _wait(submitted: Sequence[Any], shards: Noted, stop: Stop) -> None:
    waiting = list(submitted)
    while waiting:
        if stop():
            raise Interrupted("stopped, and the jobs cancelled; the same command goes on from here")
        for job in [each for each in waiting if each.done()]:
            waiting.remove(job)
            _checked(job)
        shards.look()
        time.sleep(0.2)


def _checked(job: Any) -> None:
    """Raise what a job ended with."""
    failed = job.exception()
    if failed is not None:
        told = (str(failed).strip().splitlines() or [type(failed).__name__])[-1][:160]
        where = f"its log is {job.paths.stderr}"
        raise RunError(f"job {job.job_id} did not end well ({told}); {where}; the same command goes on from here")
    code, line = job.result()
    if code:
        raise (UserError if code == UserError.exit_code else RunError)(line)
