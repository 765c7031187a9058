"""What a study's stages, and the verbs behind them, do: write features, sweep a teacher, train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import assemble
from diffrep.console import Report
from diffrep.data.datasets import load_data
from diffrep.data.feed import Feed
from diffrep.evaluation.sweep import sweep
from diffrep.files import locked, write_json
from diffrep.frozen.diffusion import DiffusionTeacher, load_teacher
from diffrep.frozen.features import write_features
from diffrep.recipes.base import FeatureTask, Recipe, SweepTask, Task, recipe_hash, to_yaml
from diffrep.training.run import RunDir

SWEEP = "sweep.json"


def run_task(
    task: Task,
    run_dir: Path,
    stop: Callable[[], bool] = lambda: False,
    progress: Report = lambda *_: None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Run any task in its folder; a finished one returns its result at once."""
    if isinstance(task, Recipe):
        return assemble.train(task, run_dir, stop, progress, allow_code)
    assert isinstance(task, FeatureTask | SweepTask)
    run = RunDir(run_dir)
    found = run.result()
    if found is not None and (found["recipe_hash"], found["seed"]) == (recipe_hash(task), task.seed):
        return found
    run.check(to_yaml(task))
    began = time.process_time()
    work = _features(task, allow_code) if isinstance(task, FeatureTask) else _sweep(task, allow_code)
    with locked(run_dir):
        run.begin(to_yaml(task))
        result = {"name": task.name, "kind": task.kind, "recipe_hash": recipe_hash(task), "seed": task.seed}
        result |= work(run_dir, progress, stop)
        result["cpu_seconds"] = round(time.process_time() - began, 2)
        run.finish(result)
    return result


Stop = Callable[[], bool]
Work = Callable[[Path, Report, Stop], dict[str, Any]]  # what is left once everything was loaded


def _features(task: FeatureTask, allow_code: bool) -> Work:
    teacher = _checked_teacher(task.teacher, task.features.taps, task.features.timesteps, allow_code)
    images = load_data(task.data, task.split)
    teacher.check_size(*images.image_size)
    feed = Feed(images, task.data, task.features.block_size, task.seed, None)
    views = feed.augmentation.num_views
    source = {
        "name": images.name,
        "split": images.split,
        "fingerprint": images.fingerprint,
        "augment": task.data.augment,
    }

    def view_of(view: int, index: Tensor) -> Tensor:
        return feed.gather(index, torch.full_like(index, view), default_device()).images

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        manifest = write_features(
            run_dir, teacher, task.features, view_of, len(images), views, source, task.seed, progress, stop
        )
        passes = len(images) * views * len(task.features.timesteps)
        return {"shapes": manifest["shapes"], **_about(teacher, task.features.taps, passes)}

    return work


def _sweep(task: SweepTask, allow_code: bool) -> Work:
    teacher = _checked_teacher(task.teacher, task.sweep.taps, task.sweep.timesteps, allow_code)
    train, held_out = load_data(task.data, "train"), load_data(task.data, task.sweep.split)
    teacher.check_size(*train.image_size)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        rows = sweep(teacher, train, held_out, task.sweep, task.seed, default_device(), progress, stop)
        write_json(run_dir / SWEEP, rows)
        passes = (len(train) + len(held_out)) * len(task.sweep.timesteps)
        labels = {"probe": task.sweep.labels or len(train)}
        best = max(rows[1:], key=lambda row: row["mean"])
        return {"rows": rows, "best": best, "labels_seen": labels, **_about(teacher, task.sweep.taps, passes)}

    return work


def _checked_teacher(
    reference: str, taps: Sequence[str], timesteps: Sequence[int], allow_code: bool
) -> DiffusionTeacher:
    """The teacher, after every tap and timestep was found in it."""
    teacher = load_teacher(reference, allow_code)
    for tap in taps:
        teacher.tap(tap)
    teacher.checked_timestep(torch.tensor(timesteps), torch.empty(len(timesteps)))
    return teacher


def _about(teacher: DiffusionTeacher, taps: Sequence[str], passes: int) -> dict[str, Any]:
    each = max(teacher.multiply_adds(tap) for tap in taps)
    return {"teacher": teacher.name, "licence": teacher.licence, "images_seen": passes, "multiply_adds": passes * each}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
