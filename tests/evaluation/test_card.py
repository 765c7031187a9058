"""The numbers of a data card, on sets whose faults were planted: pytest tests/evaluation/test_card.py"""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import nn

from diffrep import cli
from diffrep.data.datasets import DataConfig, ImageSet, load_data
from diffrep.data.shards import Sample, write_manifest, write_shard
from diffrep.errors import UserError
from diffrep.evaluation import distances, memorisation
from diffrep.evaluation.card import data_card, without_pictures
from diffrep.evaluation.distances import frechet_distance, gaussian, nearest
from diffrep.evaluation.fidelity import frechet, halves, matched
from diffrep.evaluation.memorisation import in_turn, nearer_than_usual
from diffrep.evaluation.survey import Survey, Witness, open_whole, survey
from diffrep.frozen.classifier import ClassifierTeacher

CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The Frechet distance


def test_frechet_of_independent_columns_is_a_sum_over_them():
    """Closed form for diagonal covariances: |m - n|^2 + sum of (s - t)^2 over the standard deviations."""
    mean, other = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 1.0, 0.5]).double()
    s, t = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    wanted = (mean - other).square().sum() + (s - t).square().sum()
    assert frechet_distance((mean, s.square().diag()), (other, t.square().diag())) == pytest.approx(float(wanted))


@pytest.mark.parametrize("width", [1, 2, 7, 30])
def test_frechet_agrees_with_the_root_of_the_product(width):
    """The formula as it is usually written, with scipy's root of a matrix that is not symmetric."""
    first, second = numbers(4 * width + 5, width), 2 * numbers(3 * width + 5, width, seed=1) @ numbers(width, width) + 1
    (m, s), (n, t) = ((np.mean(x.numpy(), 0), np.atleast_2d(np.cov(x.numpy().T))) for x in (first, second))
    wanted = np.sum((m - n) ** 2) + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert frechet_distance(gaussian(first), gaussian(second)) == pytest.approx(wanted, rel=1e-7)


def test_frechet_does_not_mind_a_singular_covariance():
    """Fewer images than features; a set is at distance 0 from itself, and symmetric."""
    few, many = gaussian(numbers(5, 20)), gaussian(numbers(400, 20, seed=1))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, many) == pytest.approx(frechet_distance(many, few), rel=1e-9)


def test_moments_do_not_depend_on_blocks(monkeypatch):
    x = numbers(50, 6) + 1e4
    monkeypatch.setattr(distances, "KEY_BLOCK", 7)
    mean, covariance = gaussian(x.float())
    assert np.allclose(mean, x.float().double().mean(0)) and np.allclose(covariance, np.cov(x.float().double().T))


# Neighbours


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("is_same", [True, False])
def test_neighbours_in_blocks_are_those_of_the_whole_table(kind, is_same, monkeypatch):
    monkeypatch.setattr(distances, "QUERY_BLOCK", 5)
    monkeypatch.setattr(distances, "KEY_BLOCK", 7)
    x = (numbers(33, 12) * 40 + 128).clamp(0, 255).to(torch.uint8 if kind == "uint8" else torch.float32)
    queries, keys = (x, x) if is_same else (x[:12], x[12:])
    table = cdist(queries.double().numpy(), keys.double().numpy())
    if is_same:
        np.fill_diagonal(table, np.inf)
    done = []
    found, where = nearest(queries, keys, CPU, lambda *d: done.append(d), is_same)
    assert where.tolist() == table.argmin(1).tolist()
    assert np.allclose(found, table.min(1), rtol=1e-12)
    assert done[-1] == (len(queries), len(queries))


def test_an_equal_vector_is_at_distance_zero():
    x = torch.randint(0, 256, (40, 3072), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found, where = nearest(x[7:9], x, CPU)
    assert found.tolist() == [0.0, 0.0] and where.tolist() == [7, 8]


def test_too_near_is_below_the_first_percentile_of_real_distances():
    usual = torch.arange(1, 1001).double()  # its 1st percentile, interpolated: 1 + 0.01 * 999 = 10.99
    found = nearer_than_usual(torch.tensor([0.0, 10.0, 10.995, 11.0, 500.0]).double(), usual)
    assert found["threshold"] == pytest.approx(10.99) and found["count"] == 2 and found["share"] == 40
    assert found["noise"] == pytest.approx(100 * (0.01 * 0.99 * (1 / 5 + 1 / 1000)) ** 0.5)


def test_reports_of_several_jobs_add_up():
    told = []
    first, second = in_turn(lambda *d: told.append(d), [30, 10])
    first(1, 3), first(3, 3), second(1, 2), second(2, 2)
    assert told == [(10, 40), (30, 40), (35, 40), (40, 40)]


# Equal label histograms


labels = st.lists(st.integers(-1, 4), min_size=1, max_size=60).map(torch.tensor)


@settings(deadline=None, max_examples=60)
@given(labels, labels)
def test_matched_sets_and_halves_have_equal_histograms(first, second):
    ours, theirs = matched(first, second)
    assert sorted(first[ours].tolist()) == sorted(second[theirs].tolist())
    wanted = sum(min(int((first == k).sum()), int((second == k).sum())) for k in range(5))
    assert len(set(ours.tolist())) == len(ours) == wanted
    a, b = halves(first, ours)
    assert sorted(first[a].tolist()) == sorted(first[b].tolist()) and not set(a.tolist()) & set(b.tolist())
    assert set(a.tolist()) | set(b.tolist()) <= set(ours.tolist())
    assert torch.equal(matched(first, second)[0], ours)


def seen(labels, pooled, classes=2):
    """A survey of images nobody looks at."""
    images = ImageSet(
        "made up", "whole", tuple(map(str, range(classes))), "", torch.zeros(len(pooled), 3, 1, 1), labels
    )
    nothing = torch.empty(0)
    return Survey(images, [], nothing, nothing, nothing, nothing, pooled.float())


def test_other_class_proportions_are_no_distance():
    """Two classes far apart; the set has nine times as many of one. Unmatched, that alone is a large distance."""

    def drawn(counts, seed):
        labels = torch.tensor([0] * counts[0] + [1] * counts[1])
        return seen(labels, numbers(len(labels), 3, seed=seed) + 20 * labels[:, None])

    skewed, real, held_out = drawn((900, 100), 0), drawn((500, 500), 1), drawn((300, 300), 2)
    unmatched = frechet_distance(gaussian(skewed.pooled), gaussian(real.pooled))
    found = frechet("judge", skewed, real, held_out)
    assert unmatched > 50 and found["is_matched"] and found["left_out"] == []
    assert [row["images"] for row in found["rows"]] == [600, 300, 300, 300]
    assert all(row["value"] < 1 and row["is_reliable"] for row in found["rows"])


def test_what_makes_a_distance_unreliable_is_said():
    unlabelled, real = seen(None, numbers(30, 20)), seen(torch.arange(40) % 2, numbers(40, 20, seed=1))
    found = frechet("judge", unlabelled, real, real)
    assert not found["is_matched"] and found["rows"][0]["images"] == 30 and not found["rows"][0]["is_reliable"]
    lonely = seen(torch.zeros(90, dtype=torch.int64), numbers(90, 20))
    assert frechet("judge", lonely, real, real)["left_out"] == ["1"]


# Whole cards of digits


def nearest_mean() -> ClassifierTeacher:
    """Which class's mean is nearest: a linear classifier of pixels, whose pooled features are the pixels."""
    train = load_data(DataConfig(source="digits"), "train")
    pixels, labels = train.gather(torch.arange(len(train))).float().flatten(1) / 255, train.labels
    means = torch.stack([pixels[labels == k].mean(0) for k in range(10)])
    layer = nn.Linear(192, 10)
    layer.weight.data, layer.bias.data = means, -means.square().sum(1) / 2
    return ClassifierTeacher(nn.Sequential(nn.Flatten(), layer), "nearest mean", 10, (0, 0, 0), (1, 1, 1), 8)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A set of 400 held-out digits, of which 40 are training images, 20 repeat the first image, 30 are mislabelled."""
    folder = tmp_path_factory.mktemp("set") / "faulty"
    train, test = (load_data(DataConfig(source="digits"), split) for split in ("train", "test"))
    pixels, labels = test.gather(torch.arange(400)).numpy(), test.labels[:400].clone()
    pixels[100:140], labels[100:140] = train.gather(torch.arange(40)).numpy(), train.labels[:40]
    pixels[200:220], labels[200:220] = pixels[0], labels[0]
    labels[300:330] = (labels[300:330] + 1) % 10
    samples = [Sample(f"{k:08d}", pixels[k], int(labels[k]), {}) for k in range(400)]
    notes = [write_shard(folder, n, samples[200 * n : 200 * n + 200], "png", {}) for n in range(2)]
    generator = {"name": "no generator", "licence": "CC BY-NC 4.0", "labels_seen": {"nobody": 7}}
    about = {"generator": generator, "classes": [str(k) for k in range(10)], "counts": {}, "calls_per_image": 3}
    write_manifest(folder, {"seed": 0, "synthesis": {"sampling": {"sampler": "ddim"}}}, notes, about)
    (folder / "cost.json").write_text(json.dumps({"cpu_seconds": 1.5, "network_calls": 1200, "multiply_adds": 10}))
    return folder, pixels, labels


@pytest.fixture(scope="module")
def card(faulty):
    return data_card(str(faulty[0]), nearest_mean(), "digits")


def test_every_image_of_a_set_is_looked_at(faulty):
    """Also what runs hold out of it; each with its own name and label."""
    folder, pixels, labels = faulty
    images, names = open_whole(f"synthetic:{folder}", None)
    numbers = [int(name[-8:]) for name in names]
    assert sorted(numbers) == list(range(400))
    assert np.array_equal(images.gather(torch.arange(400)).numpy(), pixels[numbers])
    assert torch.equal(images.labels, labels[numbers])


def test_planted_copies_and_repeats_are_counted(card):
    assert card["repeats"] == {"repeated": 20, "most": 21, "copies": 40}
    pixels = card["spaces"][0]
    assert pixels["name"] == "pixels" and pixels["within"]["pairs"][0]["distance"] == 0
    assert pixels["against"]["pairs"][0]["distance"] == 0 and pixels["against"]["count"] >= 40


def test_distances_to_training_images_are_those_of_numpy(card, faulty):
    digits = [load_data(DataConfig(source="digits"), s) for s in ("train", "test")]
    train, held_out = (x.gather(torch.arange(len(x))).flatten(1).double().numpy() for x in digits)
    ours = cdist(faulty[1].reshape(400, -1), train).min(1) / 192**0.5
    theirs = cdist(held_out, train).min(1) / 192**0.5
    found = card["spaces"][0]["against"]
    assert found["threshold"] == pytest.approx(np.percentile(theirs, 1))
    assert found["count"] == int((ours < np.percentile(theirs, 1)).sum()) and found["real_images"] == 539
    assert found["quantiles"]["drawn"] == pytest.approx(np.percentile(ours, range(101)))


def test_cosine_distances_are_one_minus_the_cosine(card, faulty):
    near = card["spaces"][1]
    assert near["unit"] == "cosine distance" and near["name"] == "nearest mean's pooled features"
    train = load_data(DataConfig(source="digits"), "train")
    real = train.gather(torch.arange(len(train))).flatten(1).numpy() / 255
    found = cdist(faulty[1].reshape(400, -1) / 255, real, "cosine").min(1)
    assert near["against"]["quantiles"]["drawn"] == pytest.approx(np.percentile(found, range(101)), abs=1e-6)


def test_agreement_is_that_of_numpy(card, faulty):
    _, pixels, labels = faulty
    teacher = nearest_mean()
    logits = teacher.logits(torch.from_numpy(pixels).float() / 255)
    probs = np.exp(logits.numpy().astype(float))
    probs /= probs.sum(1, keepdims=True)
    asked = probs[np.arange(400), labels]
    others = np.where(np.eye(10, dtype=bool)[labels], 0, probs).max(1)
    opinion = card["opinion"]
    assert opinion["all"]["agreement"] == pytest.approx(100 * np.mean(probs.argmax(1) == labels.numpy()), abs=1e-3)
    assert opinion["all"]["margin"] == pytest.approx(np.mean(asked - others), abs=1e-5)
    row = opinion["rows"][3]
    assert row["confidence"] == pytest.approx(100 * probs.max(1)[labels == 3].mean(), abs=1e-3)
    assert row["class"] == "3" and row["images"] == int((labels == 3).sum())
    worst = np.argsort(asked - others, kind="stable")[0]
    assert opinion["doubted"][0]["image"].endswith(f"{worst:08d}")
    assert 80 < opinion["real"]["agreement"] < 95 and opinion["real"]["images"] == 539


def test_facts_are_read_from_the_manifest(card, faulty):
    assert card["set"]["counts"] == np.bincount(faulty[2], minlength=10).tolist()
    assert card["made"]["generator"]["name"] == "no generator" and card["made"]["cost"]["network_calls"] == 1200
    assert card["set"]["licence"] == "CC BY-NC 4.0" and card["real"]["train_images"] == 1078
    assert card["frechet"]["rows"][0]["images"] == 400 and card["said"] == []


def test_programs_get_no_pictures(card):
    assert "base64" in json.dumps(card) and "base64" not in json.dumps(without_pictures(card))
    assert card["sheet"]["rows"][0]["png"].startswith("data:image/png;base64,")


def test_unseen_real_images_are_as_near_as_chance_has_it():
    """The held-out split as the set: by construction one in a hundred; all digits: their training images are copies."""
    found = data_card("digits", real="digits")
    assert found["repeats"]["copies"] == 1078 and found["opinion"] is found["frechet"] is None
    test = load_data(DataConfig(source="digits"), "test")
    train = load_data(DataConfig(source="digits"), "train")
    looked = [survey(s, None, CPU) for s in (test, train, test)]
    (space,) = memorisation.spaces(looked[0], (looked[1], looked[2]), None)
    near = memorisation.neighbours(space, CPU, [lambda *_: None] * 5)["against"]
    assert near["count"] == 6  # of 539: those below the interpolated 1st percentile, at rank 5.38


def test_without_labels_counts_and_agreement_are_left_out():
    found = data_card("noise:20x8", nearest_mean(), "digits")
    assert found["set"]["counts"] is None and "no labels" in found["said"][0]
    assert found["opinion"]["all"]["agreement"] is None and found["opinion"]["rows"] == []
    assert found["opinion"]["real"]["images"] == 539 and not found["frechet"]["is_matched"]
    assert len(found["sheet"]["rows"]) == 2


def test_a_teacher_of_other_classes_is_not_asked_for_agreement(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for k in range(3):
            Image.new("L", (12, 8), 40 * k).save(tmp_path / name / f"{k}.png")
    found = data_card(f"folder:{tmp_path}", nearest_mean(), "digits", image_size=8)
    assert any("knows 10 classes, the set has 2" in line for line in found["said"])
    assert any("labels cannot be matched" in line for line in found["said"])
    assert found["opinion"]["all"]["agreement"] is None and found["repeats"]["repeated"] == 3
    assert found["set"]["counts"] == [3, 3] and found["set"]["image_size"] == [8, 8]


def test_a_network_without_a_linear_end_has_no_pooled_features():
    network = nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())
    teacher = ClassifierTeacher(network, "convolutions", 10, (0, 0, 0), (1, 1, 1))
    assert Witness(teacher)(torch.zeros(2, 3, 8, 8))[1].shape == (2, 0)
    found = data_card("digits", teacher, "digits")
    assert found["frechet"] is None and len(found["spaces"]) == 1 and "pooled" in found["said"][0]


def test_an_image_alone_has_no_neighbour(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "only.png")
    found = data_card(f"folder:{tmp_path}", real="digits")
    assert found["spaces"][0]["within"] == {"images": 1, "pairs": []} and found["repeats"]["repeated"] == 0


# What cannot be used


def test_refusals_say_what_would_do(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    for reference, words in [
        ("no_such_set", "no such set"),
        (str(tmp_path / "begun"), "not finished"),
        (str(tmp_path / "mine"), f"folder:{tmp_path / 'mine'}"),
    ]:
        with pytest.raises(UserError, match=words):
            data_card(reference)
    with pytest.raises(UserError, match="set --image-size 8"):
        data_card("noise:4x12", real="digits")
    with pytest.raises(UserError, match="set --image-size 8"):
        data_card("noise:4x12", nearest_mean())


def test_a_changed_shard_is_noticed(faulty, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in faulty[0].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="shard-000001"):
        data_card(str(folder))


def test_the_verb_writes_a_page_and_prints_sentences_or_json(faulty, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["diffrep", "data", "card", str(faulty[0]), "--real", "digits", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert json.loads(said)["repeats"]["copies"] == 40 if more else "40 images equal a training image" in said
    assert "<svg" in (tmp_path / "card.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits", "--out", "."], "is a folder"),
        (["digits", "--mean", "0.5"], "belong to a --teacher"),
        (["digits", "--teacher", "x", "--std", "a,b"], "numbers separated by commas"),
        (["digits", "--teacher", "nothing_here"], "nothing_here"),
    ],
)
def test_the_verb_refuses_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffrep", "data", "card", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and words in said and "\n" not in said
    assert not list(tmp_path.iterdir())
