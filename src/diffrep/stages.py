"""What a study's stages, and the verbs behind them, do: write features, sweep a teacher, train."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import assemble
from diffrep.assemble import Progress
from diffrep.data.datasets import load_data
from diffrep.data.feed import Feed
from diffrep.evaluation.sweep import sweep
from diffrep.files import locked, write_json
from diffrep.frozen.diffusion import load_teacher
from diffrep.frozen.features import write_features
from diffrep.recipes.base import FeatureTask, Recipe, SweepTask, Task, recipe_hash, to_yaml
from diffrep.training.run import RunDir

SWEEP = "sweep.json"


def run_task(
    task: Task,
    run_dir: Path,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda d, t: None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Run any task in its folder; a finished one returns its result at once."""
    if isinstance(task, Recipe):
        return assemble.train(task, run_dir, stop, progress, allow_code)
    found = RunDir(run_dir).result()
    if found is not None and found["recipe_hash"] == recipe_hash(task):
        return found
    work = _features if isinstance(task, FeatureTask) else _sweep
    began = time.process_time()
    with locked(run_dir):
        RunDir(run_dir).begin(to_yaml(task))
        result = {
            "name": task.name,
            "kind": task.kind,
            "recipe_hash": recipe_hash(task),
            "seed": task.seed,
            **work(task, run_dir, progress, allow_code),
        }
        result["cpu_seconds"] = round(time.process_time() - began, 2)
        RunDir(run_dir).finish(result)
    return result


def _features(task: FeatureTask, run_dir: Path, progress: Progress, allow_code: bool) -> dict[str, Any]:
    teacher = load_teacher(task.teacher, allow_code)
    images = load_data(task.data, task.split)
    feed = Feed(images, task.data, task.features.block_size, task.seed, None)
    device = default_device()

    def view_of(view: int, index: Tensor) -> Tensor:
        return feed.gather(index, torch.full_like(index, view), device).images

    source = {
        "name": images.name,
        "split": images.split,
        "fingerprint": images.fingerprint,
        "augment": task.data.augment,
    }
    views = feed.augmentation.num_views
    manifest = write_features(run_dir, teacher, task.features, view_of, len(images), views, source, task.seed, progress)
    passes = len(images) * views * len(task.features.timesteps)
    each = max(teacher.multiply_adds(tap) for tap in task.features.taps)
    return {
        "teacher": teacher.name,
        "licence": teacher.licence,
        "shapes": manifest["shapes"],
        "images_seen": passes,
        "multiply_adds": passes * each,
    }


def _sweep(task: SweepTask, run_dir: Path, progress: Progress, allow_code: bool) -> dict[str, Any]:
    teacher = load_teacher(task.teacher, allow_code)
    train, held_out = load_data(task.data, "train"), load_data(task.data, task.sweep.split)
    rows = sweep(teacher, train, held_out, task.sweep, task.seed, default_device(), progress)
    write_json(run_dir / SWEEP, rows)
    best = max(rows[1:], key=lambda row: row["mean"])
    passes = (len(train) + len(held_out)) * len(task.sweep.timesteps)
    each = max(teacher.multiply_adds(tap) for tap in task.sweep.taps)
    return {"teacher": teacher.name, "licence": teacher.licence, "rows": rows, "best": best, "labels_seen": {"probe": task.sweep.labels or len(train)},
            "images_seen": passes, "multiply_adds": passes * each}  # fmt: skip


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
