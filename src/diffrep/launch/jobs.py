"""A shard as a task that any process can do: everything it needs, in one value that can be sent.

An engine is a function (job, numbers, report, stop) that has ``job.make(number)`` called for each number, somewhere;
what a number stands for, a shard or some images, is the job's own business. What is made is written aside and renamed,
so two workers that make the same do no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from diffrep.files import located
from diffrep.frozen.pipelines import load_generator
from diffrep.methods.synthesis import Synthesis, SynthesisConfig

Images = Callable[[int], None]  # told of images as they are done
Stop = Callable[[], bool]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Opened(Protocol):
    """A job with its networks loaded."""

    def is_made(self, folder: Path, number: int) -> bool:
        """Whether some worker has made this piece."""

    def rows(self, number: int) -> Sized:
        """The images of one piece."""


class Job(Protocol):
    """Work in numbered pieces: a frozen dataclass, so that it can be sent."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def folder(self) -> str:
        """Where results go."""

    @property
    def device(self) -> str | None:
        """Where to compute; None: a GPU where the worker has one."""

    def open(self) -> Opened:
        """Once per process."""

    def make(self, number: int, report: Images = ..., stop: Stop = ...) -> dict[str, Any]:
        """Make one piece; ``images`` says how many it holds."""

    def anywhere(self) -> Job:
        """The same job for a worker that starts in another folder."""


@dataclass(frozen=True)
class ShardJob:
    """What a worker has to know.

    synthesis: the plain values of a ``SynthesisConfig``, as JSON text.
    device:    where to compute; None: a GPU where the worker has one.
    """

    generator: str
    synthesis: str
    seed: int
    folder: str
    device: str | None = None
    allow_code: bool = False

    def open(self) -> Synthesis:
        """The set's plan with its generator loaded, once per process."""
        return _opened(self.generator, self.synthesis, self.seed, self.allow_code)

    def make(self, number: int, report: Images = lambda images: None, stop: Stop = lambda: False) -> dict[str, Any]:
        """Make one shard, whatever else was made; returns its note."""
        return self.open().make_shard(Path(self.folder), number, self.place(), report, stop)

    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def anywhere(self) -> ShardJob:
        """The same job for a worker that starts in another folder: paths in full."""
        synthesis = _in_full(json.loads(self.synthesis))
        return replace(self, generator=_full_path(self.generator), synthesis=json.dumps(synthesis))


Engine = Callable[[Job, Sequence[int], Images, Stop], None]


@lru_cache(maxsize=1)
def _opened(generator: str, synthesis: str, seed: int, allow_code: bool) -> Synthesis:
    config = SynthesisConfig.model_validate_json(synthesis)
    return Synthesis(load_generator(generator, prompts(config), allow_code), config, seed, allow_code)


def close() -> None:
    """Let go of the generator: the next job loads it anew."""
    _opened.cache_clear()


def prompts(config: SynthesisConfig) -> list[str] | None:
    """One per class, for a text-to-image generator."""
    return [config.prompt.replace("{}", name) for name in config.class_names or ()] if config.prompt else None


def _in_full(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _full_path(v) if k == "reference" else _in_full(v) for k, v in value.items()}


def _full_path(reference: str) -> str:
    """``reference`` itself, unless it is a file or a folder here."""
    head, path = ("random:", reference[7:]) if reference.startswith("random:") else ("", reference)
    found = located(path)
    return head + str(found.resolve()) if found.exists() else reference


def here(job: Job, numbers: Sequence[int], report: Images, stop: Stop) -> None:
    """The engine without any machinery: one shard after the other, in this process."""
    for number in numbers:
        job.make(number, report, stop)


class Noted:
    """Tells of shards that others make, from the notes they leave in the folder."""

    def __init__(self, job: Job, numbers: Sequence[int], report: Images) -> None:
        self.opened, self.folder, self.report = job.open(), Path(job.folder), report
        self.waiting = set(numbers)

    def look(self) -> None:
        for number in [n for n in self.waiting if self.opened.is_made(self.folder, n)]:
            self.waiting.remove(number)
            self.report(len(self.opened.rows(number)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Processes that are started here compute with one thread: several change rounding, and collide."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
