"""Shards side by side on this machine: spawned processes of one thread each, one to a GPU where there are GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from diffrep.errors import RunError
from diffrep.launch.jobs import Engine, Images, Job, Stop, one_thread


def side_by_side(jobs: int) -> Engine:
    """An engine of ``jobs`` processes."""

    def run(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
        context = multiprocessing.get_context("spawn")
        news, wish, turn = context.SimpleQueue(), context.Value("b", 0, lock=False), context.Value("i", 0)
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(news, wish, turn))
        try:
            with one_thread():  # workers are spawned as they are needed, the last with the last shard
                waiting = {pool.submit(_make, job, number) for number in numbers}
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                while not news.empty():
                    report(news.get())
                for future in finished:
                    future.result()
                wish.value |= stop()
        except BrokenProcessPool:
            raise RunError("a worker died (out of memory?); the same command goes on from here") from None
        except KeyboardInterrupt:  # the second Ctrl-C
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            wish.value = 1
            pool.shutdown(wait=True, cancel_futures=True)

    return run


_news: Any = None
_wish: Any = None
_device: str | None = None


def _begin(news: Any, wish: Any, turn: Any) -> None:
    """Set up one worker: one thread, its own GPU, and signals as a wish of all to stop after the current block."""
    global _news, _wish, _device
    _news, _wish = news, wish
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _wish_to_stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    with turn.get_lock():
        mine, turn.value = turn.value, turn.value + 1
    if torch.cuda.is_available():
        _device = f"cuda:{mine % torch.cuda.device_count()}"


def _wish_to_stop(*_: object) -> None:
    _wish.value = 1


def _end_with_parent() -> None:
    """Nobody would collect what the workers of a killed command make."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(job: Job, number: int) -> None:
    replace(job, device=job.device or _device).make(number, _news.put, lambda: bool(_wish.value))
