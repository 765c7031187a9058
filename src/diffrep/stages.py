"""What a study's stages, and the verbs behind them, do: write features or answers, sweep, draw a set, train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffrep import assemble
from diffrep.config import validate
from diffrep.console import Report
from diffrep.data.datasets import DataConfig, ImageSet, Split, load_data
from diffrep.data.feed import Feed
from diffrep.data.shards import check_shards, read_manifest
from diffrep.errors import UserError
from diffrep.evaluation.generation import check_ready, score_images
from diffrep.evaluation.kept import Kept
from diffrep.evaluation.probing import Probe, best_recipe
from diffrep.files import locked, read_json, write_atomic, write_json
from diffrep.frozen.answers import store_settings, write_answers
from diffrep.frozen.classifier import load_classifier
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.features import write_features
from diffrep.frozen.teachers import load_teacher
from diffrep.launch import generate, generation_cost, held_out
from diffrep.launch.jobs import Engine, ShardJob, close, here
from diffrep.launch.repair import boxed
from diffrep.methods.synthesis import estimate, finish, write_stand_in
from diffrep.recipes.base import (
    AnswerTask,
    FeatureTask,
    GenerationTask,
    Recipe,
    SweepTask,
    SynthesisTask,
    Task,
    is_same,
    recipe_hash,
    to_yaml,
)  # fmt: skip
from diffrep.training.run import RunDir
from diffrep.wordnet import labels_among

SWEEP, LEVELS, BEST = "sweep.json", "levels.json", "best.yaml"  # of a probe
COST, MENDED = "cost.json", "mended.png"


def run_task(
    task: Task, run_dir: Path, stop: Callable[[], bool] = lambda: False, progress: Report = lambda *_: None,
    allow_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run any task in its folder; a finished one returns its result at once."""
    if isinstance(task, Recipe):
        return assemble.train(task, run_dir, stop, progress, allow_code)
    return _once(task, run_dir, lambda: PREPARED[task.kind](task, allow_code), progress, stop)


Stop = Callable[[], bool]
Work = Callable[[Path, Report, Stop], dict[str, Any]]  # what is left once everything was loaded
Say = Callable[[dict[str, Any]], None]


def _once(task: Task, run_dir: Path, prepare: Callable[[], Work], progress: Report, stop: Stop) -> dict[str, Any]:
    """The result of a folder that is finished, else of the work that ``prepare`` loads."""
    run = RunDir(run_dir)
    found = run.result()
    is_mine = found is not None and (found["recipe_hash"], found["seed"]) == (recipe_hash(task), task.seed)
    if found is not None and is_mine and (task.kind != "synthesis" or _is_whole(run_dir)):
        return found
    run.check(partial(is_same, task))
    began = time.process_time()
    return _recorded(task, run, prepare(), progress, stop, began)


def _recorded(task: Task, run: RunDir, work: Work, progress: Report, stop: Stop, began: float) -> dict[str, Any]:
    """Do the work with the folder locked, and leave its result there."""
    with locked(run.path):
        run.begin(to_yaml(task), partial(is_same, task))
        result = {"name": task.name, "kind": task.kind, "recipe_hash": recipe_hash(task), "seed": task.seed}
        result |= work(run.path, progress, stop)
        result.setdefault("cpu_seconds", round(time.process_time() - began, 2))
        run.finish(result)
    return result


def _features(task: FeatureTask, allow_code: bool) -> Work:
    teacher = _checked_teacher(task.teacher, task.features.taps, task.features.timesteps, allow_code)
    views = _Views(task.data, task.split, task.features.block_size, task.seed)
    teacher.check_size(*views.images.image_size)
    labels = _told(teacher, views.images) if task.features.condition else None
    teacher.keep_only(task.features.taps)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        manifest = write_features(
            run_dir, teacher, task.features, views, len(views.images), views.count, views.source, task.seed,
            progress, stop, labels,
        )  # fmt: skip
        passes = views.total * len(task.features.timesteps)
        return {"shapes": manifest["shapes"], **_about(teacher, task.features.taps, passes)}

    return work


def _told(teacher: DiffusionTeacher, images: ImageSet) -> Tensor:
    """The teacher's class of each image, (N,)."""
    if teacher.num_classes is None or images.labels is None:
        without = images.name if images.labels is None else teacher.name
        raise UserError(f"condition 'labels': {without} knows no classes")
    if bool((images.labels < 0).any()):
        raise UserError(f"condition 'labels': images of {images.name} have no label (data.labels hides them)")
    return torch.tensor(labels_among(images.classes, teacher.num_classes))[images.labels]


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


def synthesize(
    task: SynthesisTask,
    run_dir: Path,
    engine: Engine,
    stop: Stop = lambda: False,
    progress: Report = lambda *_: None,
    allow_code: bool = False,
    say: Say = lambda found: None,
) -> dict[str, Any]:
    """Draw a set with any engine; a finished one has its shards checked, and damaged ones made again.

    Args:
        say: told, before the first image, what has to be made and what that takes.
    """
    run, began = RunDir(run_dir), time.process_time()
    run.check(partial(is_same, task))
    return _recorded(task, run, _synthesis(task, allow_code, engine, say), progress, stop, began)


def _synthesis(task: SynthesisTask, allow_code: bool, engine: Engine = here, say: Say = lambda found: None) -> Work:
    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        try:
            return _draw(task, shard_job(task, run_dir, allow_code), progress, stop, engine, say)
        finally:
            close()

    shard_job(task, Path(), allow_code).open()  # refuses what does not fit
    return work


def shard_job(task: SynthesisTask, run_dir: Path, allow_code: bool) -> ShardJob:
    """The set as a value that workers understand."""
    synthesis = task.synthesis.model_dump_json()
    return ShardJob(task.generator, synthesis, task.seed, str(run_dir.resolve()), allow_code=allow_code)


def _draw(task: SynthesisTask, job: ShardJob, progress: Report, stop: Stop, engine: Engine, say: Say) -> dict[str, Any]:
    """Make the missing shards of a set, then its manifest, then its cost."""
    synthesis, folder = job.open(), Path(job.folder)
    missing = synthesis.begin(folder)
    wanted, total = synthesis.counted(missing), len(synthesis.plan)
    done = total - wanted["images"]

    def report(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    say({"all": total, "licence": synthesis.generator.licence, **wanted})
    report(0)
    engine(job, missing, report, stop)
    manifest, cost = finish(folder, synthesis, task.model_dump(mode="json"))
    if not missing and (folder / COST).exists():  # as it was found, also where the shards' own notes are lost
        cost = read_json(folder / COST)
    write_json(folder / COST, cost)
    return {
        "images": manifest["images"],
        "content_hash": manifest["content_hash"],
        "counts": manifest["counts"],
        "generator": manifest["generator"]["name"],
        "licence": manifest["generator"]["licence"],
        "labels_behind": {f"generator: {k}": n for k, n in manifest["generator"]["labels_seen"].items()},
        "images_seen": cost["network_calls"],
        **cost,
    }


def again(known: dict[str, Any], generator: str | None, allow_code: bool) -> SynthesisTask:
    """The task behind a manifest.

    Args:
        generator: where it lies now, if no longer where it lay.

    Raises:
        UserError: the generator or a teacher is not here, or has other weights than the one of the manifest.
    """
    recipe = known.get("recipe")
    values = recipe | ({"generator": generator} if generator else {}) if isinstance(recipe, dict) else {}
    task = validate(SynthesisTask, values, "--from: the manifest's recipe")
    found = shard_job(task, Path(), allow_code).open().settings()
    for key, value in known["settings"].items():
        if found.get(key) != value:
            what = f"{task.generator} has other weights than the generator" if key == "generator" else f"another {key}"
            raise UserError(f"--from: {what} of the set {known['content_hash'][:12]}")
    return task


def differences(known: dict[str, Any], found: dict[str, Any]) -> str:
    """In what two sets of the same settings differ: their first other shard, and where they were made."""
    pairs = zip(known["shards"], found["shards"], strict=True)
    shard = next(old["name"] for old, new in pairs if old["sha256"] != new["sha256"])
    then, now = known.get("environment", {}), found["environment"]
    other = [f"{k} {now.get(k)} (was {then.get(k)})" for k in {**then, **now} if now.get(k) != then.get(k)]
    return f"first in {shard}; " + (", ".join(other) or "what is known of the two machines is the same")


def synthesis_cost(task: SynthesisTask, allow_code: bool = False, stand_in: Path | None = None) -> dict[str, Any]:
    """What a set will take; black images of its number and size go to ``stand_in``, where it is given."""
    job = shard_job(task, stand_in or Path(), allow_code)
    found, pixels = estimate(job.open(), job.place())
    if stand_in:
        write_stand_in(stand_in, job.open(), pixels.shape[-1])
    return found | {"memory_bytes": assemble.peak_memory()}


def _is_whole(folder: Path) -> bool:
    """Whether a finished set still has every byte."""
    try:
        check_shards(*read_manifest(folder))
    except UserError:
        return False
    return True


def _sweep(task: SweepTask, allow_code: bool, say: Say = lambda found: None) -> Work:
    made, train, held_out = opened_probe(task, allow_code)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        hashes = {
            "teacher": made.teacher.sha256,
            "training set": train.fingerprint,
            "held-out set": held_out.fingerprint,
        }
        say(made.planned())
        found = made.run(Kept(run_dir / LEVELS, hashes), progress, stop)
        write_json(run_dir / SWEEP, found["rows"])
        pair = yaml.safe_dump(best_recipe(found["best"], task.sweep), sort_keys=False)
        write_atomic(run_dir / BEST, f"# To be laid on a recipe of RepFusion: put a line 'base: RECIPE' above.\n{pair}")
        return found | {"teacher_sha256": made.teacher.sha256}

    return work


def opened_probe(task: SweepTask, allow_code: bool) -> tuple[Probe, ImageSet, ImageSet]:
    """The probe, everything checked, and the images it is made on."""
    if task.sweep.control and task.teacher.startswith("random:"):
        raise UserError(f"probe: {task.teacher} is untrained itself; leave the control out")
    teacher = load_teacher(task.teacher, allow_code)
    train, held_out = load_data(task.data, "train"), load_data(task.data, task.sweep.split)
    untrained = load_teacher(f"random:{task.teacher}", allow_code) if task.sweep.control else None
    made = Probe(teacher, train, held_out, task.sweep, task.seed, assemble.default_device(), untrained)
    return made, train, held_out


def probe_cost(task: SweepTask, allow_code: bool = False) -> dict[str, Any]:
    """What a probe will take, counted, and timed on one block; nothing is written."""
    return opened_probe(task, allow_code)[0].cost() | {"memory_bytes": assemble.peak_memory()}


def probe(
    task: SweepTask,
    run_dir: Path,
    stop: Stop,
    progress: Report,
    allow_code: bool = False,
    say: Say = lambda found: None,
) -> dict[str, Any]:
    """Probe a teacher in its folder; a finished one returns its result at once.

    Args:
        say: told, before the first image, how many passes there will be.
    """
    return _once(task, run_dir, lambda: _sweep(task, allow_code, say), progress, stop)


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


def _generation(task: GenerationTask, allow_code: bool) -> Work:
    job = generate_job(task, Path())
    opened, parts = job.open(), generation_cost.counted(job.open()).values()
    calls, added = (task.images * sum(each) for each in zip(*parts, strict=True))
    if task.reference is not None:
        check_ready(task.reference, task.score, allow_code)
    mend = _mend(task, opened, allow_code)

    def work(run_dir: Path, progress: Report, stop: Stop) -> dict[str, Any]:
        try:
            found = generate.fill(generate_job(task, run_dir), here, stop, progress)
        finally:
            generate.close()
        result = {"images": found["images"], "licence": opened.network.licence, "images_seen": calls}
        return result | {"multiply_adds": added} | _generation_scores(task, run_dir, allow_code) | mend(run_dir)

    return work


def generate_job(task: GenerationTask, run_dir: Path) -> generate.GenerateJob:
    """Its images as a value that workers understand; a run's images do not overlap with those of another seed."""
    config = task.model_dump(include={"by", "alternation", "rounding", "block_size"}, exclude_unset=True)
    seeds = range(task.seed * task.images, (task.seed + 1) * task.images)
    return generate.GenerateJob(task.model, json.dumps(config), seeds, str(run_dir))


def _generation_scores(task: GenerationTask, run_dir: Path, allow_code: bool) -> dict[str, Any]:
    if task.reference is None:
        return {}
    images = f"folder:{run_dir / generate.IMAGES}"
    found = score_images(images, task.reference, task.score, assemble.default_device(), allow_code=allow_code)
    return {"scores": {score_key(score.name): score.value for score in found.scores}, "protocol": found.to_json()}


def _mend(task: GenerationTask, opened: generate.Generation, allow_code: bool) -> Callable[[Path], dict[str, Any]]:
    """The reference's test images with a hole mended, and through the tokenizer; what does not fit is refused now."""
    if task.reference is None or task.hole is None:
        return lambda run_dir: {}
    region = boxed(task.hole, opened.image_size, "hole")
    real = load_data(validate(DataConfig, {"source": task.reference}, "reference"), "test")
    if real.image_size != opened.image_size:
        raise UserError(f"reference {task.reference}: images are {real.image_size}, the model's {opened.image_size}")
    judge = load_classifier(task.score.features, allow_code=allow_code) if task.score.features else None

    def work(run_dir: Path) -> dict[str, Any]:
        write_atomic(run_dir / MENDED, held_out.mended(real, opened, region))
        if judge is None or real.labels is None:
            return {}
        return {"held_out": held_out.read_share(real, opened.tokenizer, judge)}

    return work


def score_key(name: str) -> str:
    """The short name under which a result keeps a score; ``protocol`` beside it says of what."""
    return {"Frechet": "frechet", "kernel": "kernel"}.get(name.split()[0], name.lower().replace(" ", "_"))


PREPARED: dict[str, Callable[..., Work]] = {
    "features": _features,
    "probe": _sweep,
    "answers": _answers,
    "synthesis": _synthesis,
    "generation": _generation,
}
