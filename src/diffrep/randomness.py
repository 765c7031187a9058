"""Randomness is an argument: every draw is a function of (seed, purpose, index), never of what ran before.

``stream`` gives a generator for one purpose. ``Rows`` gives the draws of one training step, the same for a sample
whatever process or micro-batch it lands in. ``seeded`` is for libraries that only know global random state.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def derived_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A 63-bit seed from (seed, purpose, index...): BLAKE2b of their text, so streams are independent."""
    text = "/".join([str(int(seed)), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, purpose: str, *index: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose; equal arguments give equal draws on one device and build."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, *index))


@contextlib.contextmanager
def seeded(seed: int, purpose: str, *index: int | str) -> Iterator[None]:
    """Seed torch, numpy and ``random`` for the block and restore them after it (initialisation, dropout)."""
    value = derived_seed(seed, purpose, *index)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(value)
            np.random.seed(value % 2**32)
            torch.manual_seed(value)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def hashed_uniform(seed: int, purpose: str, index: Tensor, view: Tensor) -> Tensor:
    """One number for each (index, view), whatever stands beside it: splitmix64 of the two, on the CPU.

    Args:
        seed: which draw; purpose: what for; numbers of two purposes are independent.
        index, view: (B,) int64, on any device.

    Returns:
        (B,) float64 in [0, 1), on the CPU.
    """
    key = np.uint64(derived_seed(seed, purpose))
    mixed = _splitmix64(key + index.cpu().numpy().astype(np.uint64) * _GOLDEN)
    mixed = _splitmix64(mixed + view.cpu().numpy().astype(np.uint64) * _GOLDEN)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """The next output of the generator in ``state``, uint64 with wrap-around. Source: Steele, Lea, Flood 2014."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Rows:
    """The draws of one step for some rows of its global batch.

    Each call draws for the whole batch of ``total`` samples and keeps ``rows``: so sample k of step s gets the same
    numbers on one process or eight, in one micro-batch or four. Calls must come in the same order everywhere.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: Sequence[int] | None = None) -> None:
        self.generator, self.total = generator, total
        self.rows = None if rows is None else torch.as_tensor(rows, device=generator.device)

    def _keep(self, drawn: Tensor) -> Tensor:
        return drawn if self.rows is None else drawn[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 standard normal."""
        return self._keep(torch.randn(self.total, *shape, generator=self.generator, device=self.generator.device))

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1)."""
        return self._keep(torch.rand(self.total, *shape, generator=self.generator, device=self.generator.device))

    def integers(self, low: int, high: int) -> Tensor:
        """(B,) int64 in [low, high)."""
        drawn = torch.randint(low, high, (self.total,), generator=self.generator, device=self.generator.device)
        return self._keep(drawn)

    def shared(self) -> float:
        """One number in [0, 1) for all rows of the step."""
        return float(torch.rand((), generator=self.generator, device=self.generator.device))

    def categorical(self, probs: Tensor) -> Tensor:
        """probs (B, A) -> (B,) int64, one draw per row by inverting the cumulative distribution."""
        threshold = self.uniform(1).to(probs.device, probs.dtype) * probs.sum(1, keepdim=True)
        return (probs.cumsum(1) <= threshold).sum(1).clamp_(max=probs.shape[1] - 1)


class PerImage(Rows):
    """Draws of one generator per image: image k gets its own numbers, whoever stands beside it."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators])


def cycle(seed: int, purpose: str, size: int, start: int, count: int) -> Tensor:
    """Positions ``start .. start+count`` of an endless sequence of permutations of 0..size-1, (count,) int64.

    Every epoch is its own permutation; any stretch can be had without drawing what comes before it.
    """
    parts, position = [], start
    while position < start + count:
        epoch, offset = divmod(position, size)
        taken = min(size - offset, start + count - position)
        parts.append(_permutation(seed, purpose, size, epoch)[offset : offset + taken])
        position += taken
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


_recent: dict[tuple[int, str, int, int], Tensor] = {}


def _permutation(seed: int, purpose: str, size: int, epoch: int) -> Tensor:
    key = (seed, purpose, size, epoch)
    if key not in _recent:
        if len(_recent) >= 4:
            _recent.pop(next(iter(_recent)))
        _recent[key] = torch.randperm(size, generator=stream(seed, purpose, epoch))
    return _recent[key]
