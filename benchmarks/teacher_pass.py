"""A teacher's pass by tap and by option: how deep it goes; precision, layout, attention, memory budget."""

from __future__ import annotations

from typing import Any

from benchmarks.published_teachers import Published, inputs, loaded, peak_alone, truncated
from benchmarks.timing import REPEATS, line, rivals
from diffrep.frozen.passes import PassConfig

DEEPER = ("up_blocks.0", "up_blocks.1", "up_blocks.2")
READ = {"ddpm-cifar10-32": ("mid_block", 8), "adm-64": ("middle_block", 1)}  # key: tap, batch

# compile is left out: the first pass up to mid_block took 3 min 30 s here, the later ones 0.9 of the plain time.
OPTIONS = {
    "bf16": PassConfig(precision="bf16"),
    "channels-last": PassConfig(channels_last=True),
    "bf16 and channels-last": PassConfig(precision="bf16", channels_last=True),
}
UNCHANGED, WRITTEN_OUT, SPLIT = PassConfig(), PassConfig(attention="plain"), PassConfig(memory_mb=32)


def measure() -> list[dict[str, Any]]:
    """The taps behind the middle of the published CIFAR-10 U-Net; each option, up to the middle; a memory budget."""
    teacher = loaded("ddpm-cifar10-32")
    deeper = [truncated(teacher, "ddpm-cifar10-32", tap, 8, REPEATS) for tap in DEEPER]
    return [*deeper, *(row for key in READ for row in _options(key)), _split()]


def _options(key: str) -> list[dict[str, Any]]:
    plain = "float32, contiguous, attention fused"
    found = [_compared(key, words, config, plain, UNCHANGED) for words, config in OPTIONS.items()]
    return [*found, _compared(key, "attention fused", UNCHANGED, "attention written out", WRITTEN_OUT)]


def _compared(key: str, words: str, ours: PassConfig, rival: str, theirs: PassConfig) -> dict[str, Any]:
    tap, batch = READ[key]
    teachers = [loaded(key) for _ in range(2)]
    given = inputs(teachers[0], batch)
    for teacher, config in zip(teachers, (ours, theirs), strict=True):
        teacher.run_as(config)
    runs = [lambda teacher=teacher: teacher.features(*given, [tap]) for teacher in teachers]
    return line(f"{key} up to {tap}: {words}", rival, *rivals(*runs), unit=f"CPU s, batch {batch}")


def _split() -> dict[str, Any]:
    each = Published("ddpm-cifar10-32", "mid_block", batch=64)
    ours, theirs = (peak_alone(each, True, passes) for passes in (SPLIT, UNCHANGED))
    name = f"{each.key} up to {each.tap}: peak of a process, split for memory_mb={SPLIT.memory_mb}"
    return line(name, "the batch at once", ours, theirs, unit=f"GB, batch {each.batch}")
