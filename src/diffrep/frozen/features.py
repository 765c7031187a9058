"""A store of a teacher's features: written once in constant memory, read by memory map, replayed exactly.

One ``.npy`` file per tap with axes (timestep, view, image, C, h, w); how it is filled: stores.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.console import Report
from diffrep.errors import RunError, UserError, nearest
from diffrep.files import read_json
from diffrep.frozen import stores
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig
from diffrep.randomness import PerImage, stream


class FeatureConfig(Config):
    """What is read from the teacher, and how it is kept."""

    taps: tuple[str, ...] = Field(min_length=1)  # dotted module paths
    timesteps: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(min_length=1)
    pool: int | None = Field(None, ge=1)  # cells per side each map is pooled to; None keeps whole maps
    dtype: Literal["float16", "float32"] = "float16"  # float32 keeps every bit of what the teacher said
    noise: Literal["forward"] | None = None  # None: clean image; forward: x_t, with noise of its own per image
    # labels: a class-conditional teacher is told each image's own; its features then hold the answer.
    condition: Literal["labels"] | None = None
    block_size: int = Field(64, ge=1)  # images per pass; part of the result, because rounding depends on it
    passes: PassConfig = PassConfig()

    @field_validator("timesteps", "taps")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("one is named twice")
        return values


def write_features(
    folder: Path,
    teacher: DiffusionTeacher,
    config: FeatureConfig,
    images: Callable[[int, Tensor], Tensor],
    num_images: int,
    num_views: int,
    source: dict[str, Any],
    seed: int = 0,
    progress: Report = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """Fill ``folder``; returns the manifest. Running it again continues, or returns at once when it is complete.

    Args:
        images: (view, index (B,) int64) -> (B, 3, H, W) float32 in [0, 1]; called block by block.
        source: what the images are (name, split, fingerprint, augment), kept in the manifest.
        progress: called with (blocks done, in all).
        stop: asked after each block.
        labels: (N,) int64, the class each image is told to be of, where ``config.condition`` asks for it.

    Raises:
        Interrupted: ``stop()`` said so; what is done was noted.
    """
    settings = store_settings(teacher, config, num_images, num_views, source, seed)
    teacher.checked_timestep(torch.tensor(config.timesteps), torch.empty(len(config.timesteps)))
    teacher.run_as(config.passes)

    def make(place: stores.Place) -> dict[str, np.ndarray]:
        step, view, rows = place
        index = torch.arange(rows.start, rows.stop)
        told = None if labels is None else labels[index]
        return _block(teacher, config, images(view, index), index, config.timesteps[step], view, seed, told)

    places = _places(config, num_images, num_views)
    return stores.fill(folder, settings, _arrays(settings), places, make, progress, stop)


def store_settings(
    teacher: DiffusionTeacher, config: FeatureConfig, num_images: int, num_views: int, source: dict[str, Any], seed: int
) -> dict[str, Any]:
    """What decides a store's content."""
    return {
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "teacher_labels_seen": teacher.labels_seen | ({"told to the teacher": num_images} if config.condition else {}),
        "licence": teacher.licence,
        "source": source,
        "num_images": num_images,
        "num_views": num_views,
        "seed": seed,
        **config.model_dump(mode="json"),
        "shapes": {tap: list(_kept_shape(teacher, tap, config.pool)) for tap in config.taps},
    }


def feature_bytes(teacher: DiffusionTeacher, config: FeatureConfig, num_images: int, num_views: int) -> int:
    """Disk that a store will take."""
    cells = sum(math.prod(_kept_shape(teacher, tap, config.pool)) for tap in config.taps)
    return cells * np.dtype(config.dtype).itemsize * num_images * num_views * len(config.timesteps)


def write_empty_store(folder: Path, settings: dict[str, Any]) -> None:
    """A store of zeros that takes no disk."""
    stores.write_empty(folder, settings, _arrays(settings))


def _arrays(settings: dict[str, Any]) -> stores.Arrays:
    lead = (len(settings["timesteps"]), settings["num_views"], settings["num_images"])
    return {tap: (settings["dtype"], (*lead, *shape)) for tap, shape in settings["shapes"].items()}


def _places(config: FeatureConfig, num_images: int, num_views: int) -> list[stores.Place]:
    """(timestep's position, view, images) of every block."""
    rows = [slice(f, min(f + config.block_size, num_images)) for f in range(0, num_images, config.block_size)]
    return [(s, v, r) for s in range(len(config.timesteps)) for v in range(num_views) for r in rows]


def _block(
    teacher: DiffusionTeacher,
    config: FeatureConfig,
    images: Tensor,
    index: Tensor,
    timestep: int,
    view: int,
    seed: int,
    labels: Tensor | None,
) -> dict[str, np.ndarray]:
    rng = None
    if config.noise:  # image k's noise is a function of (seed, timestep, view, k), whatever the block
        rng = PerImage([stream(seed, "feature noise", timestep, view, k) for k in index.tolist()])
    features = teacher.features(images, timestep, config.taps, noise=config.noise, labels=labels, rng=rng)
    kept = {
        t: f if config.pool is None or f.dim() != 4 else F.adaptive_avg_pool2d(f.float(), config.pool)
        for t, f in features.items()
    }
    return {tap: _cast(value, config.dtype, f"{tap} at t = {timestep}") for tap, value in kept.items()}


def _cast(value: Tensor, dtype: str, what: str) -> np.ndarray:
    """As the store keeps it; a feature that float16 cannot hold is no feature."""
    with np.errstate(over="ignore"):
        kept = value.cpu().numpy().astype(dtype)
    if not np.isfinite(kept).all():
        raise RunError(f"the feature of {what} is not finite in {dtype}; use dtype float32 (--dtype float32)")
    return kept


def _kept_shape(teacher: DiffusionTeacher, tap: str, pool: int | None) -> tuple[int, ...]:
    shape = teacher.tap(tap).shape
    return (shape[0], pool, pool) if pool and len(shape) == 3 else shape


class FeatureStore:
    """A finished feature folder, read only."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / stores.MANIFEST).exists():
            what = f"is no finished feature folder (no {stores.MANIFEST})"
            raise UserError(f"{folder} {what}: write it with diffrep features")
        self.manifest = read_json(self.folder / stores.MANIFEST)
        self.timesteps: list[int] = self.manifest["timesteps"]
        self.teacher, self.licence = self.manifest["teacher"], self.manifest["licence"]
        self.teacher_sha256: str = self.manifest["teacher_sha256"]
        self._held: dict[tuple[str, torch.device], Tensor] = {}

    def check(self, tap: str, grid: int | None) -> None:
        """Refuse a tap that is not in the store, or maps pooled to another grid; None: any that were not pooled."""
        if tap not in self.manifest["shapes"]:
            raise UserError(f"{self.folder} has no tap '{tap}'; {nearest(tap, self.manifest['shapes'])}")
        shape = self.manifest["shapes"][tap]
        if grid is None and self.manifest["pool"] is not None:
            raise UserError(f"{self.folder} holds '{tap}' pooled, and method.hint_grid null asks for whole maps")
        if grid is not None and shape[1:] != [grid, grid]:
            raise UserError(f"{self.folder} holds '{tap}' as {shape}, not on a {grid}x{grid} grid (method.hint_grid)")

    def check_timesteps(self, timesteps: Iterable[int]) -> None:
        missing = [t for t in timesteps if t not in self.timesteps]
        if missing:
            raise UserError(f"{self.folder} has no timestep {missing[0]}; it holds {self.timesteps}")

    def check_source(self, fingerprint: str, augment: str) -> None:
        """Refuse features of other images, or of other views of them."""
        stores.check_source(self.folder, self.manifest["source"], fingerprint, augment)

    def channels(self, tap: str) -> int:
        return self.manifest["shapes"][tap][0]

    def array(self, tap: str) -> np.ndarray:
        """(T, V, N, C, h, w), memory-mapped."""
        return stores.mapped(self.folder / f"{tap}.npy")

    def gather(self, tap: str, timestep: Tensor, view: Tensor | None, index: Tensor, device: torch.device) -> Tensor:
        """(B, C, h, w) float32 for each image's own timestep and view."""
        row = torch.searchsorted(torch.tensor(sorted(self.timesteps)), timestep.cpu())
        row = torch.argsort(torch.tensor(self.timesteps))[row]  # the store keeps the order it was asked for
        shown = torch.zeros_like(index) if view is None else view
        held = self._resident(tap, device)
        if held is not None:
            return held[row.to(device), shown.to(device), index.to(device)].float()
        array = self.array(tap)
        return torch.from_numpy(array[row.numpy(), shown.cpu().numpy(), index.cpu().numpy()]).float().to(device)

    def _resident(self, tap: str, device: torch.device) -> Tensor | None:
        if (tap, device) not in self._held:
            array = self.array(tap)
            if array.nbytes > stores.RESIDENT_BYTES:
                return None
            self._held[tap, device] = torch.from_numpy(np.array(array)).to(device)
        return self._held[tap, device]
