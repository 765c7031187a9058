"""Scores of a network that somebody names: a student of ours by probes, anybody's classifier by its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffrep.config import validate
from diffrep.data.datasets import DataConfig, load_data
from diffrep.errors import UserError
from diffrep.evaluation.classify import EvaluateConfig, classifier_scores, load_student, student_scores


def own_scores(
    model: str, data: dict[str, Any], labels: Sequence[int], knn: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Linear probe and neighbours of the frozen features, top-1 where there is a classifier.

    Args:
        data: the fields of a ``DataConfig``.
    """
    config = validate(DataConfig, data, "evaluate --data")
    wanted = validate(EvaluateConfig, {"probe_labels": tuple(labels), "knn": knn}, "evaluate")
    student = load_student(model)
    train, test = load_data(config, "train"), load_data(config, "test")
    counts = wanted.probe_labels or (len(train),)
    return student_scores(student, train, test, counts, wanted.knn, seed, device)


def foreign_scores(model: str, data: dict[str, Any], look: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Top-1, top-5 and calibration of its own answers.

    Args:
        look: the fields of a ``ClassifierConfig`` besides its reference.
    """
    from diffrep.frozen.classifier import ClassifierConfig, load_classifier

    classifier = load_classifier(validate(ClassifierConfig, {"reference": model, **look}, "evaluate"))
    test = load_data(validate(DataConfig, data, "evaluate --data"), "test")
    if test.labels is None or len(test.classes) != classifier.num_classes:
        told = f"{len(test.classes)} classes" if test.labels is not None else "no labels"
        raise UserError(f"evaluate: {classifier.name} knows {classifier.num_classes} classes, {test.name} has {told}")
    return classifier_scores(classifier.logits, test, device)
