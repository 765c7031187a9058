"""A probe computes the features of no more images than it can depend on."""

import torch

from diffrep.data.datasets import DataConfig, label_subset, load_data
from diffrep.evaluation import classify
from diffrep.evaluation.classify import outputs, relevant, student_scores
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
