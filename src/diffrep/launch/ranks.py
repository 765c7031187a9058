"""Shards by number over the processes of torchrun: process r makes every world-th of the missing ones.

Process 0 alone holds the lock and writes what belongs to the whole set; it waits for the others at a barrier. When
one dies, torchrun ends all of them, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from diffrep.errors import Interrupted, RunError
from diffrep.launch.jobs import Images, Job, Noted, Stop

PATIENCE = timedelta(days=100)  # one process may have a shard more to make than another, however long that takes


def world() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def group() -> Iterator[int]:
    """Meet the other processes; yields this one's rank."""
    if world() == 1:
        yield 0
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def by_rank(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
    """The engine of process 0: tell the others what is missing, make a share, wait for theirs."""
    _meet(stop)
    dist.broadcast_object_list([list(numbers)])
    mine = numbers[:: world()]
    theirs = Noted(job, [n for n in numbers if n not in set(mine)], report)

    def told(images: int) -> None:
        report(images)
        theirs.look()

    _share(job, mine, told, stop)
    _meet(stop, theirs)


def help_out(job: Job, stop: Stop) -> None:
    """What every other process does. It says nothing of its own when process 0 refused."""
    try:
        _meet(stop)
    except (Interrupted, RunError):
        return
    told: list[list[int]] = [[]]
    dist.broadcast_object_list(told)
    _share(job, told[0][dist.get_rank() :: world()], lambda images: None, stop)
    _meet(stop)


def _share(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
    gpus = torch.cuda.device_count()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else None
    for number in numbers:
        replace(job, device=job.device or device).make(number, report, stop)


def _meet(stop: Stop, theirs: Noted | None = None) -> None:
    """Wait until every process is here; asks ``stop`` meanwhile, which a blocking barrier could not."""
    meeting = dist.barrier(async_op=True)
    while not meeting.is_completed():
        if stop():
            raise Interrupted("stopped; the same command goes on from here")
        if theirs:
            theirs.look()
        time.sleep(0.1)
    try:
        meeting.wait()
    except RuntimeError:
        raise RunError("another process of torchrun ended early; the same command goes on from here") from None
    if theirs:
        theirs.look()
