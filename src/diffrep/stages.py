"""What a study's stages, and the verbs behind them, do: write features or answers, sweep, draw a set, train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import assemble
from diffrep.console import Report
from diffrep.data.datasets import DataConfig, Split, load_data
from diffrep.data.feed import Feed
from diffrep.evaluation.sweep import sweep
from diffrep.files import locked, write_json
from diffrep.frozen.answers import store_settings, write_answers
from diffrep.frozen.classifier import load_classifier
from diffrep.frozen.diffusion import DiffusionTeacher, load_teacher
from diffrep.frozen.features import write_features
from diffrep.launch.jobs import Engine, ShardJob, here
from diffrep.methods.synthesis import begin, finish
from diffrep.recipes.base import AnswerTask, FeatureTask, Recipe, SweepTask, SynthesisTask, Task, recipe_hash, to_yaml
from diffrep.training.run import RunDir

SWEEP, COST = "sweep.json", "cost.json"


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
    run = RunDir(run_dir)
    found = run.result()
    if found is not None and (found["recipe_hash"], found["seed"]) == (recipe_hash(task), task.seed):
        return found
    run.check(to_yaml(task))
    began = time.process_time()
    work = PREPARED[task.kind](task, allow_code)
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
    views = _Views(task.data, task.split, task.features.block_size, task.seed)
    teacher.check_size(*views.images.image_size)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        manifest = write_features(
            run_dir, teacher, task.features, views, len(views.images), views.count, views.source, task.seed,
            progress, stop,
        )  # fmt: skip
        passes = views.total * len(task.features.timesteps)
        return {"shapes": manifest["shapes"], **_about(teacher, task.features.taps, passes)}

    return work


def _answers(task: AnswerTask, allow_code: bool) -> Work:
    teacher = load_classifier(task.teacher, allow_code=allow_code)
    views = _Views(task.data, task.split, task.answers.block_size, task.seed)
    settings = store_settings(teacher, task.answers, len(views.images), views.count, views.source)
    each = teacher.multiply_adds(views.images.image_size[0])  # refuses images of a size it does not take

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        write_answers(run_dir, teacher, settings, views, progress, stop)
        budget = {"images_seen": views.total, "multiply_adds": views.total * each}
        return {"teacher": teacher.name, "licence": teacher.licence, **budget}

    return work


class _Views:
    """Every view of every image of a split: (view, index (B,)) -> images (B, 3, H, W)."""

    def __init__(self, config: DataConfig, split: Split, block_size: int, seed: int) -> None:
        self.images = load_data(config, split)
        self.feed = Feed(self.images, config, block_size, seed, None)
        self.count = self.feed.augmentation.num_views
        self.total = len(self.images) * self.count
        self.source = {
            "name": self.images.name,
            "split": self.images.split,
            "fingerprint": self.images.fingerprint,
            "augment": config.augment,
        }

    def __call__(self, view: int, index: Tensor) -> Tensor:
        return self.feed.gather(index, torch.full_like(index, view), assemble.default_device()).images


def _synthesis(task: SynthesisTask, allow_code: bool, engine: Engine = here) -> Work:
    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        return draw(task, run_dir, progress, stop, allow_code, engine)

    shard_job(task, Path(), allow_code).open()  # refuses what does not fit
    return work


def shard_job(task: SynthesisTask, run_dir: Path, allow_code: bool) -> ShardJob:
    """The set as a value that workers understand."""
    synthesis = task.synthesis.model_dump_json()
    device = assemble.default_device().type
    return ShardJob(task.generator, synthesis, task.seed, str(run_dir.resolve()), device, allow_code)


def draw(
    task: SynthesisTask, run_dir: Path, progress: Report, stop: Stop, allow_code: bool, engine: Engine
) -> dict[str, Any]:
    """Make the missing shards of a set, then its manifest, then its cost."""
    job, began, done = shard_job(task, run_dir, allow_code), time.process_time(), 0
    synthesis = job.open()
    begin(run_dir, synthesis)
    missing = synthesis.missing(run_dir)
    size, total = task.synthesis.shard_size, len(synthesis.slots)
    whole = sum(min(size, total - n * size) for n in missing)

    def report(images: int) -> None:
        nonlocal done
        done += images
        progress(total - whole + done, total)

    engine(job, missing, report, stop)
    manifest = finish(run_dir, synthesis, task.generator)
    calls = manifest["images"] * manifest["calls_per_image"]
    macs = manifest["images"] * synthesis.generator.multiply_adds(task.synthesis.sampling)
    cost = {"cpu_seconds": round(time.process_time() - began, 2), "network_calls": calls, "multiply_adds": macs}
    write_json(run_dir / COST, cost | {"images_made": whole})
    return {
        "images": manifest["images"],
        "content_hash": manifest["content_hash"],
        "counts": manifest["counts"],
        "generator": manifest["generator"]["name"],
        "licence": manifest["generator"]["licence"],
        "labels_behind": {f"generator: {k}": n for k, n in manifest["generator"]["labels_seen"].items()},
        "images_seen": calls,
        "multiply_adds": macs,
        "network_calls": calls,
    }


def _sweep(task: SweepTask, allow_code: bool) -> Work:
    teacher = _checked_teacher(task.teacher, task.sweep.taps, task.sweep.timesteps, allow_code)
    train, held_out = load_data(task.data, "train"), load_data(task.data, task.sweep.split)
    teacher.check_size(*train.image_size)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        rows = sweep(teacher, train, held_out, task.sweep, task.seed, assemble.default_device(), progress, stop)
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


PREPARED: dict[str, Callable[..., Work]] = {
    "features": _features,
    "probe": _sweep,
    "answers": _answers,
    "synthesis": _synthesis,
}
