"""``diffrep run --slurm``: one run as one Slurm job of several processes, through submitit (extra ``slurm``).

Each process starts ``python -m diffrep run`` with the variables that torchrun would set. Shortly before its time limit,
or when it is preempted, the first one is told: all of them stop at one step, a checkpoint is written, and Slurm queues
the job again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrep.console import wish_to_stop
from diffrep.errors import Interrupted, RunError, UserError
from diffrep.launch.ranks import world
from diffrep.launch.slurm import LOGS, cluster, installed

SAVING = 80  # seconds for a last checkpoint: submitit is told 90 before the end
FIRST_PORT, PORTS = 20_000, 40_000

_children: list[subprocess.Popen[str]] = []  # of this process: one


@dataclass(frozen=True)
class Process:
    """One of the job's processes; what submitit runs on another machine. arguments: of ``diffrep``."""

    arguments: tuple[str, ...]

    def __call__(self) -> tuple[int, str]:
        """Exit code, and the last line that was said of it."""
        command, line = [sys.executable, "-m", "diffrep", *self.arguments], ""
        told = {"env": os.environ | variables(installed().JobEnvironment()), "preexec_fn": _deaf}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **told) as child:  # type: ignore[call-overload]
            _children.append(child)
            try:
                for said in child.stderr:
                    print(said, end="", file=sys.stderr, flush=True)
                    line = said.strip() or line
                return child.wait(), line
            finally:
                _end(child)

    def checkpoint(self) -> Any:
        """submitit's word for: queue me again, as I am. It is said to the first process; the others stop with it."""
        for child in _children:
            _end(child)
        return installed().helpers.DelayedSubmission(self)


def _deaf() -> None:
    """Slurm's warning goes to all processes, and is submitit's to hear; the run is told by SIGTERM."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end(child: subprocess.Popen[str]) -> None:
    """A run that is told to end writes a checkpoint first."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=SAVING)
    except subprocess.TimeoutExpired:
        child.kill()


def variables(job: Any) -> dict[str, str]:
    """What torchrun would tell a process, from what submitit knows; nothing to one that is alone."""
    if job.num_tasks == 1:
        return {}
    first = "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0]
    port = FIRST_PORT + int("".join(filter(str.isdigit, job.job_id)) or 0) % PORTS
    told = {"RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank}
    told |= {"LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes, "MASTER_ADDR": first, "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def train_on_slurm(
    task: Any,
    arguments: Sequence[str],
    run_dir: Path,
    partition: str,
    nodes: int = 1,
    tasks: int = 1,
    executor: Callable[[Path], Any] | None = None,
) -> None:
    """Submit a run and wait for its end; one that has finished before is left as it is.

    Args:
        task: the recipe. arguments: of ``diffrep``, which run it in ``run_dir``, a folder that all machines see.
        partition: "" leaves it to the cluster. tasks: processes of a node, each with a GPU where there are some.
        executor: what makes submitit's executor from its log folder; tests give submitit's local one.

    Raises:
        UserError: a study, a batch that cannot be shared, no Slurm here; or what the run refused.
        RunError: the job did not end well. Interrupted: it was cancelled; it wrote a checkpoint first.
    """
    _check(task, nodes, tasks)
    if (run_dir / "result.json").exists():
        return
    submitit = installed()
    if executor is None and not shutil.which("sbatch"):
        raise UserError("--slurm: there is no sbatch on this machine; run it where Slurm jobs are submitted from")
    logs = run_dir / LOGS
    made = executor(logs) if executor else cluster(submitit, logs, partition, nodes, tasks)
    job = made.submit(Process(tuple(arguments)))
    with wish_to_stop() as stop:
        _wait(job, stop)
    _checked(job)
    shutil.rmtree(logs, ignore_errors=True)


def _check(task: Any, nodes: int, tasks: int) -> None:
    if world() > 1:
        raise UserError("torchrun and --slurm at once: --slurm starts its processes itself (--tasks)")
    if task.kind != "recipe":
        raise UserError(f"--slurm: {task.name} is a study; submit its stages one by one, or run it inside of one job")
    if task.train.batch_size % (nodes * tasks):
        shared = f"cannot be split over {nodes * tasks} processes (--nodes {nodes} --tasks {tasks})"
        raise UserError(f"train.batch_size {task.train.batch_size} {shared}")


def _wait(job: Any, stop: Callable[[], bool]) -> None:
    try:
        while not job.task(0).done():
            if stop():
                raise Interrupted(f"stopped, and job {job.job_id} cancelled; the same command goes on from there")
            time.sleep(0.5)
    except BaseException:
        job.cancel(check=False)
        raise


def _checked(job: Any) -> None:
    """Raise what the job's first process ended with."""
    first = job.task(0)
    where = f"its log is {first.paths.stderr}; the same command goes on from there"
    failed = first.exception()
    if failed is not None:
        told = (str(failed).strip().splitlines() or [type(failed).__name__])[-1][:160]
        raise RunError(f"job {job.job_id} did not end well ({told}); {where}")
    code, line = first.result()
    line = line.removeprefix("diffrep: ")
    if code in (UserError.exit_code, Interrupted.exit_code):
        raise (UserError if code == UserError.exit_code else Interrupted)(line)
    if code:
        raise RunError(f"job {job.job_id}: {line[:300]}; {where}")
