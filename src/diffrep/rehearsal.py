"""What a study will cost, before it runs: every stage is costed against stand-ins of the stages before it.

A stand-in has the right shapes and nothing learnt: a network as initialised, a feature store of zeros that takes no
disk. It lives in a temporary folder and goes with it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffrep.assemble import assemble, default_device, estimate, peak_memory
from diffrep.data.datasets import load_data
from diffrep.data.transforms import augmentation
from diffrep.files import write_json
from diffrep.frozen import answers, stores
from diffrep.frozen.classifier import load_classifier
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.features import feature_bytes, store_settings, write_empty_store
from diffrep.frozen.teachers import load_teacher
from diffrep.launch import generation_cost
from diffrep.launch.generate import write_stand_in
from diffrep.recipes.base import (
    AnswerTask,
    FeatureTask,
    GenerationTask,
    Recipe,
    Study,
    SweepTask,
    SynthesisTask,
    recipe_hash,
)
from diffrep.stages import generate_job, probe_cost, synthesis_cost
from diffrep.studies import instances


def rehearse(study: Study, allow_code: bool = False) -> dict[str, dict[str, Any]]:
    """Each stage's cost for one seed: images, multiply-adds, CPU seconds, memory and disk bytes, licences."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        for instance in instances(study.model_copy(update={"seeds": study.seeds[:1]}), Path(folder)):
            costs[instance.name] = _cost(instance.task, Path(folder) / instance.key, allow_code)
    return costs


def _cost(task: Any, stand_in: Path, allow_code: bool) -> dict[str, Any]:
    if isinstance(task, Recipe):
        found = estimate(task, allow_code)
        assemble(task, allow_code).method.export(stand_in)
        card = {"name": task.name, "licence": found["licences"]["weights"], "recipe_hash": recipe_hash(task)}
        write_json(stand_in / "result.json", card)
        return found
    if isinstance(task, FeatureTask):
        return _features(task, stand_in, allow_code)
    if isinstance(task, AnswerTask):
        return _answers(task, stand_in, allow_code)
    if isinstance(task, SynthesisTask):
        return synthesis_cost(task, allow_code, stand_in)
    if isinstance(task, GenerationTask):
        generation = generate_job(task, stand_in).open()
        write_stand_in(stand_in, generation)
        return generation_cost.estimate(generation, default_device().type)
    assert isinstance(task, SweepTask)
    return probe_cost(task, allow_code)


def _features(task: FeatureTask, stand_in: Path, allow_code: bool) -> dict[str, Any]:
    teacher, images = load_teacher(task.teacher, allow_code), load_data(task.data, task.split)
    teacher.run_as(task.features.passes)
    views = augmentation(task.data.augment).num_views
    source = {"fingerprint": images.fingerprint, "augment": task.data.augment}
    settings = store_settings(teacher, task.features, len(images), views, source, task.seed)
    write_empty_store(stand_in, settings)
    passes = len(images) * views * len(task.features.timesteps)
    found = _passes(teacher, task.features.taps, passes, task.features.block_size)
    return found | {"disk_bytes": feature_bytes(teacher, task.features, len(images), views)}


def _answers(task: AnswerTask, stand_in: Path, allow_code: bool) -> dict[str, Any]:
    teacher, images = load_classifier(task.teacher, allow_code=allow_code), load_data(task.data, task.split)
    views = augmentation(task.data.augment).num_views
    source = {"fingerprint": images.fingerprint, "augment": task.data.augment}
    settings = answers.store_settings(teacher, task.answers, len(images), views, source)
    arrays = answers.arrays(settings)
    stores.write_empty(stand_in, settings, arrays)
    block = torch.zeros(task.answers.block_size, 3, *images.image_size)
    passes, each = len(images) * views, teacher.multiply_adds(images.image_size[0])
    found = _timed(lambda: teacher.logits(block), len(block), passes, each, teacher.licence)
    return found | {"disk_bytes": sum(math.prod(shape) * np.dtype(kind).itemsize for kind, shape in arrays.values())}


def _passes(teacher: DiffusionTeacher, taps: Sequence[str], passes: int, block_size: int) -> dict[str, Any]:
    """Cost of ``passes`` images through the teacher, from one timed block."""
    images = torch.zeros(block_size, 3, teacher.image_size, teacher.image_size)
    each = max(teacher.multiply_adds(tap) for tap in taps)
    return _timed(lambda: teacher.features(images, 0, taps), block_size, passes, each, teacher.licence)


def _timed(run: Callable[[], Any], block: int, passes: int, each: int, licence: str) -> dict[str, Any]:
    """Cost of ``passes`` images at ``each`` multiply-adds, where ``run`` does ``block`` of them."""
    times = []
    for _ in range(2):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return {
        "images": passes,
        "multiply_adds": passes * each,
        "seconds": min(times) * passes / block,
        "memory_bytes": peak_memory(),
        "disk_bytes": 0,
        "licences": {"weights": licence},
    }
