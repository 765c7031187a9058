"""Commands as processes of their own, without paying for the imports of each.

A fork server imports torch, timm and diffusers once. Every command is then a fork of it that runs
``python -m diffrep ARGUMENTS`` in a folder: a process like any other, to be signalled, killed and waited for.
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["commands_preload"])


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (-9: killed), and what it said."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What it said on stderr, which has to be one line."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Command:
    """``diffrep ARGUMENTS`` in ``folder``, running."""

    def __init__(self, folder: Path, *arguments: object, **environment: str) -> None:
        self.said = [folder.parent / f"{folder.name}-{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
        target = (str(folder), [str(a) for a in arguments], environment, [str(s) for s in self.said])
        with _import_path():
            self.process = FORKS.Process(target=_child, args=target)
            self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, number: int) -> None:
        """A signal to this process alone; nothing happens when it has just ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 100) -> Done:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s")
        return Done(self.process.exitcode, *(s.read_text() if s.exists() else "" for s in self.said))

    def until(self, reached: Callable[[], bool], timeout: float = 60) -> None:
        """Wait for a moment of the running command."""
        end = time.monotonic() + timeout
        while not reached():
            assert self.process.is_alive() and time.monotonic() < end, self.wait(0.1)
            time.sleep(0.002)


def run(folder: Path, *arguments: object, **environment: str) -> Done:
    """``diffrep ARGUMENTS`` in ``folder``, to its end."""
    return Command(folder, *arguments, **environment).wait()


@contextlib.contextmanager
def _import_path():
    """Server and children find this file, and start with one thread."""
    here, before = str(Path(__file__).parent), dict(os.environ)
    os.environ.update(PYTHONPATH=here, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(folder: str, arguments: list[str], environment: dict[str, str], said: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if limit := environment.pop("TEST_FILE_LIMIT", None):  # bytes; the kernel then acts as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    if prepare := environment.pop("TEST_PREPARE", None):  # module:function called before the command begins
        module, _, name = prepare.partition(":")
        sys.path.insert(0, folder)
        getattr(importlib.import_module(module), name)()
    os.environ.update(environment)
    sys.argv = ["diffrep", *arguments]
    runpy.run_module("diffrep", run_name="__main__")
