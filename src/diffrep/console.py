"""What a person sees while waiting, and how one asks to stop.

A bar on a terminal, plain lines elsewhere, nothing for the first two seconds.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache

QUIET_SECONDS = 2.0
LINE_EVERY = 10.0  # seconds between plain lines

Report = Callable[[int, int], None]  # (done, total)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counts(numbers: Sequence[int], most: int = 24) -> str:
    """``16 15 12 8 1``; of many only the first and the last."""
    if len(numbers) <= most:
        return " ".join(map(str, numbers))
    return f"{counts(numbers[:4])} ... {counts(numbers[-4:])}"


def status_line(label: str, done: int, total: int, elapsed: float, began_at: int = 0) -> str:
    """``label 240/600, 12.1/s, 30 s left``; work done before a resume does not count into the rate."""
    rate = (done - began_at) / elapsed if elapsed > 0 else 0.0
    left = f", {duration((total - done) / rate)} left" if rate > 0 else ""
    return f"{label} {done}/{total}, {rate:.1f}/s{left}"


@cache
def notice(line: str) -> None:
    """One line on stderr, once in a process, however often it is said."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yields a function to call with (done, total)."""
    with _bar(label) if sys.stderr.isatty() else contextlib.nullcontext(_Lines(label)) as report:
        yield report


class _Lines:
    """Plain lines on stderr, at most one in ``LINE_EVERY`` seconds."""

    def __init__(self, label: str) -> None:
        self.label, self.said = label, 0.0
        self.began, self.began_at = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.began:  # loading before the first step says nothing about the rate
            self.began, self.began_at = now, done
        if now - self.began < QUIET_SECONDS or now - self.said < LINE_EVERY:
            return
        self.said = now
        print(status_line(self.label, done, total, now - self.began, self.began_at), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}/s"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, rate="0.0")
    first: list[tuple[float, int]] = []

    def report(done: int, total: int) -> None:
        if not first:
            first.append((time.monotonic(), done))
        began, began_at = first[0]
        elapsed = time.monotonic() - began
        if elapsed > QUIET_SECONDS:
            bar.start()
            bar.update(task, completed=done, total=total, rate=f"{(done - began_at) / elapsed:.1f}")

    try:
        yield report
    finally:
        bar.stop()


@contextlib.contextmanager
def wish_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM becomes a question the loop asks after each step; a second Ctrl-C ends at once."""
    wished = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wished.is_set
        return

    def note(_number: int, _frame: object) -> None:
        wished.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wished.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
