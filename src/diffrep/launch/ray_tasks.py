"""Shards as Ray tasks, on this machine or on a cluster that grows and shrinks (extra ``ray``).

Ray hands a task to another worker when one dies. All workers must see the folder of the set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from diffrep.errors import Interrupted, RunError, UserError
from diffrep.launch.jobs import THREAD_VARIABLES, Engine, Images, Job, Stop

RETRIES = 10  # of one shard, when its worker dies
LATE = 5.0  # seconds after which a shared file must be seen everywhere


def on_ray(address: str) -> Engine:
    """An engine of Ray tasks.

    Args:
        address: ``local`` (a Ray of this machine's cores, gone afterwards), ``auto`` (the cluster this machine
            belongs to), or a cluster's address.
    """
    ray = _installed()

    def run(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
        with _connected(ray, address), _token(Path(job.folder)) as token:
            _all(ray, job.anywhere(), numbers, token, report, stop)

    return run


def _installed() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray; install it with: pip install 'diffrep[ray]'") from None
    return ray


@contextlib.contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    if ray.is_initialized():  # by the program that calls us
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray of one machine must not join a cluster that RAY_ADDRESS names.
    where = {"address": "local", "include_dashboard": False} if address == "local" else {"address": address}
    threads = {"env_vars": dict.fromkeys(THREAD_VARIABLES, "1")}
    try:
        ray.init(**where, runtime_env=threads, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:160]
        hint = "ray start --head starts a cluster, --ray local needs none"
        raise UserError(f"--ray {address}: no Ray cluster answers there ({why}); {hint}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[str]:
    """A file by which workers know that they see the folder itself and not one of the same name."""
    path = folder / f".shared-{secrets.token_hex(8)}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _all(ray: ModuleType, job: Job, numbers: Sequence[int], token: str, report: Images, stop: Stop) -> None:
    """Hand out every shard at once: by the tasks that wait, a cluster knows that it should grow."""
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_make)
    waiting = {task.remote(job, number, token): number for number in numbers}
    try:
        while waiting:
            finished, _ = ray.wait(list(waiting), timeout=0.5)
            for done in finished:
                report(_answer(ray, done, waiting.pop(done)))
            if stop():
                raise Interrupted("stopped; the same command goes on from here")
    finally:
        for left in waiting:
            ray.cancel(left)


def _answer(ray: ModuleType, done: Any, number: int) -> int:
    """What a task returned; what it raised, as it raised it."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        why = type(error).__name__
        raise RunError(f"shard {number}: its workers died ({why}); the same command goes on from here") from None


def _make(job: Job, number: int, token: str) -> int:
    """One task: the images of one shard."""
    _see(Path(job.folder), token)
    torch.set_num_threads(1)
    return int(job.make(number)["images"])


def _see(folder: Path, token: str) -> None:
    end = time.monotonic() + LATE
    while not (folder / token).exists():
        if time.monotonic() > end:
            what = f"the worker on {socket.gethostname()} does not see {folder}"
            raise UserError(f"{what}: choose an --out that all machines share")
        time.sleep(0.1)
