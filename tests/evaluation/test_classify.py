"""A probe computes the features of no more images than it can depend on; six views are averaged as published."""

import pytest
import torch

from diffrep.config import validate
from diffrep.data.datasets import DataConfig, label_subset, load_data
from diffrep.errors import UserError
from diffrep.evaluation import classify
from diffrep.evaluation.classify import (
    EvaluateConfig,
    classifier_scores,
    outputs,
    relevant,
    six_views,
    student_scores,
)
from diffrep.models.students import Student, StudentConfig

DIGITS = DataConfig(source="digits")
CPU = torch.device("cpu")


def student():
    torch.manual_seed(0)
    return Student(StudentConfig(name="conv_small", options={"in_chans": 1}), num_classes=10)


def test_draws_point_at_the_same_images_among_the_relevant_ones(monkeypatch):
    monkeypatch.setattr(classify, "STATISTICS_IMAGES", 40)
    train = load_data(DIGITS, "train")
    draws = [label_subset(train.labels, n, seed=3) for n in (20, 50)]
    kept, moved = relevant(train, draws)
    assert 50 <= len(kept) <= 90
    for draw, there in zip(draws, moved, strict=True):
        assert torch.equal(kept.gather(there), train.gather(draw))
        assert torch.equal(kept.labels[there], train.labels[draw])


def test_small_sets_are_looked_at_whole_and_score_as_ever():
    train, test = load_data(DIGITS, "train"), load_data(DIGITS, "test")
    kept, _ = relevant(train, [label_subset(train.labels, 20, seed=0)])
    assert len(kept) == len(train) and torch.equal(kept.labels, train.labels)
    scores = student_scores(student(), train, test, (20,), 1, 0, CPU)
    assert scores["test_images"] == len(test) == 539 and 0 < scores["linear_probe_20"] < 100


def test_features_of_unneeded_images_are_not_computed(monkeypatch):
    monkeypatch.setattr(classify, "STATISTICS_IMAGES", 40)
    seen = []

    def counted(network, images, device, block_size=256):
        seen.append(len(images))
        return outputs(network, images, device, block_size)

    monkeypatch.setattr(classify, "outputs", counted)
    train, test = load_data(DIGITS, "train"), load_data(DIGITS, "test")
    student_scores(student(), train, test, (20,), 1, 0, CPU)
    assert max(seen) == len(test) and min(seen) <= 60


def test_six_views_weigh_the_image_as_much_as_both_shifts():
    """The answer of this classifier is its input, so that the average can be read off pixel by pixel."""
    images = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    found = six_views(lambda x: x[:, :, 1:-1, 1:-1], images)
    up_left, down_right = images[:, :, :-2, :-2], images[:, :, 2:, 2:]  # inside, no reflected pixel is seen
    mean = 0.5 * images[:, :, 1:-1, 1:-1] + 0.25 * up_left + 0.25 * down_right
    torch.testing.assert_close(found, 0.5 * mean + 0.5 * mean.flip(-1))
    corner = six_views(lambda x: x[:, :, 0, 0], images)
    # Reflection: what lies outside the corner (0, c) is, for both shifts, the pixel (1, inner) diagonally inside.
    told = [0.25 * images[:, :, 0, c] + 0.25 * images[:, :, 1, inner] for c, inner in ((0, 1), (4, 3))]
    torch.testing.assert_close(corner, told[0] + told[1])


def test_the_score_of_six_views_stands_beside_the_plain_one():
    test = load_data(DIGITS, "test").subset(torch.arange(200))
    plain, both = (classifier_scores(student().eval(), test, CPU, views=views) for views in (1, 6))
    assert both.pop("top1_six_views") >= 0 and both == plain and "top1_six_views" not in plain

    def left(images):
        """Sure of 0 where the first column is dark, of 1 where the last one is."""
        return torch.stack([-images[:, 0, :, 0].sum(1), -images[:, 0, :, -1].sum(1)], 1)

    averaged = outputs(lambda x: six_views(left, x), test, CPU)
    torch.testing.assert_close(averaged[:, 0], averaged[:, 1])  # mirror images make them equal
    assert not torch.allclose(*outputs(left, test, CPU).unbind(1))


def test_six_views_of_features_are_refused():
    with pytest.raises(UserError, match="views 6 averages a classifier's answers"):
        validate(EvaluateConfig, {"views": 6}, "here")
