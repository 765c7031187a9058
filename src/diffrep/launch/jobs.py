"""A shard as a task that any process can do: everything it needs, in one value that can be sent.

An engine is a function (job, numbers, report, stop) that has ``job.make(number)`` called for each number, somewhere.
Shards are written aside and renamed, so two workers that make the same one do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffrep.frozen.pipelines import load_generator
from diffrep.methods.synthesis import Synthesis, SynthesisConfig

Images = Callable[[int], None]  # told of images as they are done
Stop = Callable[[], bool]


@dataclass(frozen=True)
class ShardJob:
    """What a worker has to know. synthesis: the plain values of a ``SynthesisConfig``, as JSON text."""

    generator: str
    synthesis: str
    seed: int
    folder: str
    device: str
    allow_code: bool = False

    def open(self) -> Synthesis:
        """The set's plan with its generator loaded, once per process."""
        return _opened(self)

    def make(self, number: int, report: Images = lambda images: None, stop: Stop = lambda: False) -> dict[str, Any]:
        """Make one shard, whatever else was made; returns its note."""
        return self.open().make_shard(Path(self.folder), number, self.device, report, stop)


Engine = Callable[[ShardJob, Sequence[int], Images, Stop], None]


@lru_cache(maxsize=1)
def _opened(job: ShardJob) -> Synthesis:
    config = SynthesisConfig.model_validate_json(job.synthesis)
    generator = load_generator(job.generator, prompts(config), job.allow_code)
    return Synthesis(generator, config, job.seed, job.allow_code)


def prompts(config: SynthesisConfig) -> list[str] | None:
    """One per class, for a text-to-image generator."""
    return [config.prompt.replace("{}", name) for name in config.class_names or ()] if config.prompt else None


def here(job: ShardJob, numbers: Sequence[int], report: Images, stop: Stop) -> None:
    """The engine without any machinery: one shard after the other, in this process."""
    for number in numbers:
        job.make(number, report, stop)
