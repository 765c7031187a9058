"""Dense tasks from a recipe: pictures with masks, points or objects in, a method, a feed and scores out.

What :mod:`diffrep.assemble` does for whole images; the loop, the run folder and the report are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffrep.data.datasets import DataConfig
from diffrep.data.dense import DenseSet, load_dense, some_pictures
from diffrep.data.dense_feed import DenseFeed, Views
from diffrep.data.detect_views import DetectTraining
from diffrep.data.landmark_views import LandmarkTraining
from diffrep.data.segment_views import SegmentTraining
from diffrep.errors import UserError
from diffrep.evaluation.detection import detection_scores
from diffrep.evaluation.landmarks import landmark_scores
from diffrep.evaluation.segmentation import segmentation_scores
from diffrep.methods.dense import DenseConfig, DenseMethod
from diffrep.methods.detect import Detect
from diffrep.methods.landmark import Landmark
from diffrep.methods.segment import Segment
from diffrep.randomness import seeded
from diffrep.recipes.base import Recipe
from diffrep.training import best

SAMPLES = "samples"  # folder of the pictures that a report shows


@dataclass(frozen=True)
class DenseTask:
    """One dense task.

    views: (method's settings, training set) -> how training sees a picture.
    scores: (method, pictures, device, folder for the worst ones or None, how many) -> numbers by name, in percent.
    headline: the number that chooses between checkpoints; larger_is_better says how.
    """

    method: Callable[..., DenseMethod]
    views: Callable[[Any, DenseSet], Views]
    scores: Callable[[DenseMethod, DenseSet, torch.device, Path | None, int], dict[str, Any]]
    headline: str
    larger_is_better: bool = True


TASKS: dict[str, DenseTask] = {
    "segment": DenseTask(
        Segment, lambda c, images: SegmentTraining(c.views, images, c.student.mean), segmentation_scores, "miou"
    ),
    "landmark": DenseTask(
        Landmark, lambda c, images: LandmarkTraining(c.views, images), landmark_scores, "nme", larger_is_better=False
    ),
    "detect": DenseTask(Detect, lambda c, images: DetectTraining(c.views, images), detection_scores, "box_ap"),
}


@dataclass(frozen=True)
class DenseParts:
    """The objects one dense recipe describes."""

    train: DenseSet
    test: DenseSet
    feed: DenseFeed
    method: DenseMethod

    @property
    def image_size(self) -> int:
        return self.method.image_size

    @property
    def num_labelled(self) -> int:
        return len(self.train)


def assembled(recipe: Recipe, device: torch.device) -> DenseParts:
    """Load the data and build the method; nothing is written.

    Raises:
        UserError: whatever does not fit.
    """
    config = of_dense(recipe)
    task, kind = TASKS[config.kind], config.kind
    train = load_dense(recipe.data, "train", kind, holds_out=config.select == "held_out")
    test = load_dense(_test_data(recipe), "test", kind)
    if train.classes != test.classes:
        told = f"{len(train.classes)} classes, {test.name} has {len(test.classes)}"
        raise UserError(f"evaluate.source: {train.name} has {told}, or others by name")
    with seeded(recipe.seed, "initialisation"):
        method = task.method(config, train)
    method.opinion = _opinion(recipe, task, method, train, device)
    if recipe.data.labels is not None:
        seed = recipe.seed if recipe.data.label_seed is None else recipe.data.label_seed
        train = train.subset(some_pictures(len(train), recipe.data.labels, seed))
    feed = DenseFeed(train, task.views(config, train), recipe.train.batch_size, recipe.seed)
    return DenseParts(train, test, feed, method)


def of_dense(recipe: Recipe) -> DenseConfig:
    """The method's settings of a recipe that is one of a dense task."""
    assert isinstance(recipe.method, DenseConfig)
    return recipe.method


def _test_data(recipe: Recipe) -> DataConfig:
    return recipe.data.model_copy(update={"source": recipe.evaluate.source or recipe.data.source})


def _opinion(
    recipe: Recipe, task: DenseTask, method: DenseMethod, train: DenseSet, device: torch.device
) -> Callable[[], float] | None:
    """What chooses between checkpoints: the headline number on a split that is not trained on."""
    config = of_dense(recipe)
    if config.select == "last":
        return None
    held_out = load_dense(recipe.data, "test" if config.select == "test" else "validation", config.kind)

    def opinion() -> float:
        was_training = method.training
        found = task.scores(method.eval(), held_out, device, None, 0)[task.headline]
        method.train(was_training)
        return found if task.larger_is_better else -found

    return opinion


def scores(recipe: Recipe, parts: DenseParts, run_dir: Path, device: torch.device) -> dict[str, Any]:
    """Of the network that is kept: the best by held-out pictures where one was chosen, else the last."""
    method = parts.method.eval().to(device)
    chosen = best.known(run_dir)
    if chosen is not None:
        method.load(run_dir / best.BEST)
    samples = run_dir / SAMPLES
    found = TASKS[recipe.method.kind].scores(method, parts.test, device, samples, recipe.evaluate.samples)
    return found | ({"best_step": chosen["step"]} if chosen else {})
