"""From a recipe to a finished run folder: data, method, training, export, scores, in that order.

Everything that only loading can show is refused before the run folder is written.
"""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import counting, dense
from diffrep.console import Report
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, ImageSet, hide_labels, label_subset, load_data
from diffrep.data.feed import Feed
from diffrep.data.shards import read_manifest
from diffrep.data.transforms import augmentation
from diffrep.errors import UserError
from diffrep.evaluation.classify import classifier_scores, load_student, student_scores
from diffrep.evaluation.tokenize import reconstruction_scores
from diffrep.files import locked
from diffrep.frozen.tokens import load_tokenizer
from diffrep.methods.addp import ADDP
from diffrep.methods.base import Method
from diffrep.methods.clean_input import CleanInput
from diffrep.methods.contrastive import Contrastive
from diffrep.methods.denoiser import Denoiser
from diffrep.methods.dmkd import DMKD
from diffrep.methods.finetune import Finetune
from diffrep.methods.mae import MAE
from diffrep.methods.mixing import Mixing
from diffrep.methods.repfusion import RepFusion
from diffrep.methods.token_predictor import TokenPredictorMethod
from diffrep.methods.tokenizer import TokenizerMethod
from diffrep.randomness import seeded
from diffrep.recipes.base import Recipe, is_same, recipe_hash, to_yaml
from diffrep.training import best
from diffrep.training.checkpoint import latest
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

METHODS = {
    "repfusion": RepFusion,
    "finetune": Finetune,
    "contrastive": Contrastive,
    "denoiser": Denoiser,
    "dmkd": DMKD,
    "tokenizer": TokenizerMethod,
    "token_predictor": TokenPredictorMethod,
    "addp": ADDP,
    "clean_input": CleanInput,
    "mixing": Mixing,
    "mae": MAE,
}
TIMED_MULTIPLY_ADDS = 10**11  # of a step that a CPU only times: some seconds
TIMED_SECONDS = 20  # after which no further step is timed
STATISTICS_IMAGES = 4096  # at most, that a method's ``prepare`` looks at


@dataclass(frozen=True)
class Assembled:
    """The objects one recipe describes."""

    train: ImageSet
    test: ImageSet
    labelled: Tensor | None  # positions whose labels training may use; None: all
    feed: Feed
    method: Method

    @property
    def image_size(self) -> int:
        return self.train.image_size[0]

    @property
    def num_labelled(self) -> int:
        """How many images have a label that training may use."""
        available = 0 if self.train.labels is None else len(self.train)
        return available if self.labelled is None else len(self.labelled)


Parts = Assembled | dense.DenseParts


def assemble(recipe: Recipe, allow_code: bool = False) -> Parts:
    """Load the data and build the method; nothing is written.

    Raises:
        UserError: whatever does not fit.
    """
    if recipe.method.kind in dense.TASKS:
        return dense.assembled(recipe, default_device())
    return _of_images(recipe, allow_code)


def _of_images(recipe: Recipe, allow_code: bool) -> Assembled:
    train = load_data(recipe.data, "train")
    test = load_data(test_data(recipe), "test")
    if len(train) == 0:
        raise UserError(f"data.source {recipe.data.source}: no images to train on")
    labelled = _labelled(recipe, train)
    seen = copy.copy(train)
    if train.labels is not None and labelled is not None:
        seen.labels = hide_labels(train.labels, labelled)
    with seeded(recipe.seed, "initialisation"):
        method = METHODS[recipe.method.kind](recipe.method, len(train.classes), _square(train, recipe), allow_code)
        method.check_data(train.fingerprint, recipe.data.augment, len(train))
    _views_possible(recipe, train)
    if isinstance(method, DMKD):
        method.watch(_held_out(recipe))
    _scores_possible(recipe, method, train, test)
    timm = recipe.method.augment if recipe.method.kind == "finetune" else None
    feed = Feed(seen, recipe.data, recipe.train.batch_size, recipe.seed, labelled, timm)
    return Assembled(train, test, labelled, feed, method)


def test_data(recipe: Recipe) -> DataConfig:
    """Where the test images come from: the training source, unless ``evaluate.source`` names another."""
    return recipe.data.model_copy(update={"source": recipe.evaluate.source or recipe.data.source, "augment": "none"})


def _held_out(recipe: Recipe) -> Callable[[], list[Batch]]:
    """The training source's validation images, read when they are first asked for."""
    feeds: list[Feed] = []

    def batches() -> list[Batch]:
        if not feeds:
            images = load_data(recipe.data, "validation", default_device())
            feeds.append(Feed(images, recipe.data, recipe.train.batch_size, recipe.seed, None))
        return feeds[0].sweep(256, default_device())

    return batches


def label_seed(recipe: Recipe) -> int:
    """Which draw of labelled images: training, reward, head and probe all use this one."""
    return recipe.seed if recipe.data.label_seed is None else recipe.data.label_seed


def _labelled(recipe: Recipe, train: ImageSet) -> Tensor | None:
    """The positions whose labels training may use; None: all there are."""
    readers = list(recipe.method.label_readers()) + ["data.labels"] * bool(recipe.data.labels)
    if train.labels is None:
        if readers:
            raise UserError(
                f"data.source {recipe.data.source} has no labels, but this recipe needs them for: {readers[0]}"
            )
        return None
    if recipe.method.label_readers() and len(train.classes) < 2:
        only = f"one class, {train.classes[0]!r}" if train.classes else "no class"
        raise UserError(f"data.source {recipe.data.source} has {only}; {readers[0]} learns to tell two or more apart")
    return label_subset(train.labels, recipe.data.labels, label_seed(recipe)) if recipe.data.labels else None


def _scores_possible(recipe: Recipe, method: Method, train: ImageSet, test: ImageSet) -> None:
    """Refuse now what would only fail after the training."""
    if isinstance(method, Denoiser):
        method.schedule.respaced(recipe.evaluate.num_sampling_steps)
    elif recipe.evaluate.protocol == "classifier":
        _classifier_possible(recipe, method, test)
    elif train.labels is not None:
        if test.labels is None:
            raise UserError(f"data.source {recipe.data.source}: its test split has no labels to score against")
        for count in recipe.evaluate.probe_labels:
            label_subset(train.labels, count, label_seed(recipe))


def _classifier_possible(recipe: Recipe, method: Method, test: ImageSet) -> None:
    where = recipe.evaluate.source or recipe.data.source
    classes = getattr(getattr(getattr(method, "student", None), "backbone", None), "num_classes", 0)
    if test.labels is None:
        raise UserError(f"evaluate.source {where}: its test split has no labels to score against")
    if classes != len(test.classes):
        told = f"the student learns {classes} classes, evaluate.source {where} has {len(test.classes)}"
        raise UserError(f"evaluate.protocol 'classifier': {told}")


def _views_possible(recipe: Recipe, train: ImageSet) -> None:
    if augmentation(recipe.data.augment).reach >= min(train.image_size):
        height, width = train.image_size
        raise UserError(f"data.augment '{recipe.data.augment}' moves {height}x{width} images out of sight")


def _square(images: ImageSet, recipe: Recipe) -> int:
    height, width = images.image_size
    if height != width:
        raise UserError(
            f"data.source {recipe.data.source}: images are {height}x{width}; set data.image_size for square ones"
        )
    return height


def train(
    recipe: Recipe,
    run_dir: Path,
    stop: Callable[[], bool] = lambda: False,
    progress: Report = lambda *_: None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Run a recipe in ``run_dir``, or go on where it stopped, or return what it found when it finished before."""
    run = RunDir(run_dir)
    if (found := _finished(run, recipe)) is not None:
        return found
    run.check(partial(is_same, recipe))
    parts = assemble(recipe, allow_code)
    writes = is_main_process()
    run = RunDir(run_dir, writes)
    trainer = Trainer(parts.method, parts.feed, recipe.optim, recipe.train, recipe.seed, run)
    with locked(run_dir) if writes else contextlib.nullcontext():
        run.begin(to_yaml(recipe), partial(is_same, recipe))
        began = time.monotonic()
        device = trainer.accelerator.device
        if latest(run_dir / "checkpoints") is None:  # a checkpoint holds what was prepared
            parts.method.prepare(parts.feed.sweep(256, device, STATISTICS_IMAGES))
        budget = trainer.fit(stop, progress)
        if not writes:
            return {}
        result = describe(recipe, parts) | budget
        result |= parts.method.export(run_dir)
        result["scores"] = scores(recipe, parts, run_dir, device)
        parts.method.illustrate(run_dir, recipe.evaluate.samples, recipe.evaluate.num_sampling_steps, recipe.seed)
        result["wall_seconds"] = round(time.monotonic() - began, 2)
        run.finish(result)
    return result


def _finished(run: RunDir, recipe: Recipe) -> dict[str, Any] | None:
    result = run.result()
    wanted = (recipe_hash(recipe), recipe.seed)
    if result is not None and (result.get("recipe_hash"), result.get("seed")) != wanted:
        raise UserError(f"{run.path} belongs to another recipe (see its recipe.yaml); choose another --out")
    return result


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_main_process() -> bool:
    """Whether this process writes; the others of a torchrun only compute."""
    return int(os.environ.get("RANK", "0")) == 0


def scores(recipe: Recipe, parts: Parts, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Of the exported student or tokenizer; a diffusion model is judged by whoever learns from it."""
    if isinstance(parts, dense.DenseParts):
        return dense.scores(recipe, parts, run_dir, device)
    if isinstance(parts.method, TokenizerMethod):
        return reconstruction_scores(load_tokenizer(str(run_dir)), parts.test, device)
    student = getattr(parts.method, "student", None)
    if student is not None and recipe.evaluate.protocol == "classifier":
        return _classifier(recipe, parts, run_dir, device)
    if student is None or parts.train.labels is None:
        return {}
    counts = recipe.evaluate.probe_labels or (recipe.data.labels or len(parts.train),)
    knn = recipe.evaluate.knn
    return student_scores(student, parts.train, parts.test, counts, knn, label_seed(recipe), device)


def _classifier(recipe: Recipe, parts: Assembled, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Of the last network, and of the one that held-out images chose, where there is one."""
    teacher = parts.method.judge if isinstance(parts.method, DMKD) else None
    student, views = parts.method.student.eval().to(device), recipe.evaluate.views
    found = classifier_scores(student, parts.test, device, teacher, views)
    if best.known(run_dir) is None:
        return found
    chosen = classifier_scores(load_student(str(run_dir / best.BEST)).eval().to(device), parts.test, device)
    return found | {"best_top1": chosen["top1"]}


def describe(recipe: Recipe, parts: Parts) -> dict[str, Any]:
    """What a result says of its origin and its budget."""
    counted = multiply_adds_per_image(parts.method, parts.image_size)
    images = recipe.train.steps * recipe.train.batch_size
    return {
        "name": recipe.name,
        "kind": recipe.method.kind,
        "about": recipe.about,
        "recipe_hash": recipe_hash(recipe),
        "seed": recipe.seed,
        "licence": parts.method.licence,
        "notes": list(parts.method.notes),
        "data": {"source": recipe.data.source, "licence": parts.train.licence, "fingerprint": parts.train.fingerprint,
                 "train_images": len(parts.train), "test_images": len(parts.test), "skipped": parts.train.skipped,
                 "skipped_names": list(parts.train.skipped_names[:20])},
        "labels_seen": labels_seen(recipe, parts),
        "labels_behind": parts.method.labels_behind | generator_labels(recipe.data.source),
        "parameters": sum(p.numel() for p in parts.method.parameters() if p.requires_grad),
        "multiply_adds": counted * images,
    }  # fmt: skip


def labels_seen(recipe: Recipe, parts: Parts) -> dict[str, int]:
    """How many labels each part of training looked at: the report prints it, a test holds it."""
    return dict.fromkeys(recipe.method.label_readers(), parts.num_labelled)


def generator_labels(source: str) -> dict[str, int]:
    """Labels that the generator of a synthetic set saw, which the images carry on."""
    kind, _, location = source.partition(":")
    if kind != "synthetic":
        return {}
    seen = read_manifest(location)[1]["generator"]["labels_seen"]
    return {f"generator: {part}": count for part, count in seen.items()}


def multiply_adds_per_image(method: Method, image_size: int) -> int:
    """Of one training step: forward and backward of what is trained, forward of what is frozen."""
    # Batch norm in training refuses a single image, hence two.
    kept = {id(v): v for k, v in vars(method).items() if not k.startswith("_")}
    clone = copy.deepcopy(method, kept).to("meta").train()
    images = torch.zeros(2, 3, image_size, image_size, device="meta")
    return counting.multiply_adds(lambda: clone.dry_step(images)) // 2 + method.frozen_multiply_adds()


def estimate(recipe: Recipe, allow_code: bool = False) -> dict[str, Any]:
    """What a run will cost, from counting and from up to three real steps whose result is thrown away."""
    parts = assemble(recipe, allow_code)
    run = RunDir(Path("nothing-is-written-here"), writes=False)
    per_image = multiply_adds_per_image(parts.method, parts.image_size)
    timed = _timed_images(recipe, per_image)
    changes = {"track": (), "steps": max(recipe.train.steps, 1), "batch_size": timed, "precision": _timed_in(recipe)}
    config = recipe.train.model_copy(update=changes)
    trainer = Trainer(parts.method, parts.feed, recipe.optim, config, recipe.seed, run)
    parts.method.train()
    times = []
    for step in range(min(3, recipe.train.steps)):
        began = time.process_time()
        trainer.step(step)
        times.append(time.process_time() - began)
        if sum(times) > TIMED_SECONDS:
            break
    tensors = sum(p.numel() * p.element_size() for p in parts.method.parameters())
    copies = 1 + {"sgd": 1, "lars": 1, "muon": 1}.get(recipe.optim.name, 2) + (1 if recipe.train.ema_decay else 0)
    images = recipe.train.steps * recipe.train.batch_size
    return {
        "multiply_adds": per_image * images,
        "images": images,
        "seconds": min(times, default=0.0) * recipe.train.steps * recipe.train.batch_size / timed,
        "batch_size": recipe.train.batch_size,
        "timed_images": timed,
        "timed_in": config.precision,
        "memory_bytes": peak_memory(),
        "disk_bytes": tensors * (2 * copies + 1),
        "licences": {"data": parts.train.licence, "weights": parts.method.licence},
    }


def _timed_images(recipe: Recipe, per_image: int) -> int:
    """How many images of a batch are timed: on a CPU no more than give an answer soon, and stay in its memory."""
    batch_size = recipe.train.batch_size
    if torch.cuda.is_available() or recipe.method.compares_images():
        return batch_size
    return min(batch_size, max(2, TIMED_MULTIPLY_ADDS // max(1, per_image)))  # batch norm refuses a single image


def _timed_in(recipe: Recipe) -> str:
    """The precision of the steps that are timed; a CPU has no fp16."""
    precision = recipe.train.precision
    return "fp32" if precision == "fp16" and not torch.cuda.is_available() else precision


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
