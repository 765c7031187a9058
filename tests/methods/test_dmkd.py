"""A classifier teaches a student on any images: pytest tests/methods/test_dmkd.py"""

import copy
import json

import pytest
import torch
from filled import OURS, drawn_images, fill
from safetensors.torch import load_file, save_file

from diffrep.assemble import assemble
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.feed import Feed
from diffrep.errors import UserError
from diffrep.evaluation.classify import EvaluateConfig, calibration_error
from diffrep.frozen.answers import AnswerConfig, LiveAnswers, StoredAnswers, store_settings, write_answers
from diffrep.frozen.classifier import ClassifierConfig
from diffrep.methods.base import save_student
from diffrep.methods.dmkd import DMKD, DMKDConfig, KdLossConfig, kd_distance
from diffrep.models import convert
from diffrep.models.students import Student, StudentConfig, create
from diffrep.randomness import Rows, seeded, stream
from diffrep.recipes.base import Recipe
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TINY = {"in_chans": 1, "widths": [4, 8], "pool": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small untrained classifier of digits in a weights file, and how to load it."""
    with seeded(3, "teacher"):
        network = create("conv_small", 10, **TINY)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(network.state_dict(), path)
    half = (0.5, 0.5, 0.5)
    return ClassifierConfig(reference=str(path), architecture="conv_small", options=TINY, mean=half, std=half)


def built(teacher, classes=10, **settings):
    config = DMKDConfig(teacher=teacher, student=StudentConfig(name="conv_small", options=TINY), **settings)
    with seeded(0, "student"):
        return DMKD(config, classes, 8)


def batch(count=6, labels=True):
    rng = stream(0, "batch")
    images = torch.rand(count, 3, 8, 8, generator=rng)
    return Batch(images, torch.arange(count) % 10 if labels else None, torch.arange(count), torch.zeros(count).long())


def parts(method, what=None):
    return method(what or batch(), Rows(stream(0, "x"), 6), 0.0)


@pytest.mark.golden(of=lambda case: {"teacher", "student", "T", "steps"} <= case.meta.keys())
def test_golden_three_steps_of_the_official_training(golden_case, tmp_path):
    meta = golden_case.meta
    name, options = OURS[meta["teacher"]]
    state = fill(meta["state_dict_teacher"], meta["seed"], meta["gain"])
    save_file(state, tmp_path / "teacher.safetensors")
    given = ClassifierConfig(reference=str(tmp_path / "teacher.safetensors"), architecture=name, options=options, **RAW)
    name, options = OURS[meta["student"]]
    config = DMKDConfig(
        teacher=given,
        student=StudentConfig(name=name, options=options, **RAW),
        loss=KdLossConfig(kd_temperature=meta["T"]),
    )
    images = [golden_case.get(f"inputs/x{i}") for i in range(meta["steps"])]
    torch.testing.assert_close(images[0], drawn_images(meta["seed"] + 10, meta["B"], images[0].shape[-1]))
    method = DMKD(config, meta["K"], images[0].shape[-1])
    first = convert.fitted(
        fill(meta["state_dict_student"], meta["seed"] + 1, meta["gain"]), method.student.backbone.state_dict(), "golden"
    )
    method.student.backbone.load_state_dict(first)
    optimizer = torch.optim.SGD(method.parameters(), lr=meta["lr"], momentum=0.9, weight_decay=meta["wd"])
    found = []
    for x in images:
        method.train()
        shown = Batch(x, None, torch.arange(len(x)))
        loss = method(shown, Rows(stream(0, "x"), len(x)), 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    torch.testing.assert_close(
        torch.stack(found).double(), golden_case.get("outputs/losses").double().view(-1), rtol=2e-3, atol=2e-3
    )
    after = convert.rename(golden_case.under("outputs/after/"))
    own = method.student.backbone.state_dict()
    assert after.keys() <= own.keys()
    for key, value in after.items():
        assert float((own[key] - value).abs().max()) <= 2e-3 * max(1.0, float(value.square().mean().sqrt())), key
    with torch.no_grad():
        logits = method.student.eval()(images[0])
    torch.testing.assert_close(logits, golden_case.get("outputs/eval_logits"), rtol=2e-3, atol=2e-3)


def test_the_teacher_is_untouched_and_has_no_gradient(teacher):
    method = built(teacher)
    network = method.teacher.network.module
    before = copy.deepcopy(network.state_dict())
    method.train()
    for _ in range(3):
        parts(method)["loss"].backward()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert not network.training and all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not [n for n, _ in method.named_parameters() if "teacher" in n]  # nor does an optimiser or checkpoint see it
    assert all(p.grad is not None for p in method.student.parameters())


def test_every_weight_counts_and_labels_are_read_only_where_asked(teacher):
    plain = parts(built(teacher))
    doubled = parts(built(teacher, loss=KdLossConfig(kd_weight=2)))
    torch.testing.assert_close(doubled["loss"], 2 * plain["loss"])
    mixed = parts(built(teacher, loss=KdLossConfig(kd_weight=0.5, label_weight=3)))
    torch.testing.assert_close(mixed["loss"], 0.5 * plain["loss"] + 3 * mixed["label_loss"])
    only = parts(built(teacher, loss=KdLossConfig(kd_weight=0, label_weight=1)))
    torch.testing.assert_close(only["loss"], only["label_loss"])
    torch.testing.assert_close(parts(built(teacher), batch(labels=False))["loss"], plain["loss"])
    assert "label_loss" not in plain
    with pytest.raises(ValueError, match="nothing is learnt"):
        KdLossConfig(kd_weight=0)


@pytest.mark.parametrize(
    "one, other",
    [
        ({"name": "dkd", "alpha": 1}, {"name": "dkd", "alpha": 2}),
        ({"name": "dkd", "beta": 1}, {"name": "dkd", "beta": 2}),
        ({"name": "dist", "beta": 1}, {"name": "dist", "beta": 2}),
        ({"name": "dist", "gamma": 1}, {"name": "dist", "gamma": 2}),
        ({}, {"standardise": True}),
        ({}, {"kd_temperature": 2}),
        ({}, {"name": "mse"}),
    ],
)
def test_each_setting_of_the_loss_changes_it(one, other):
    student, teacher = (torch.randn(8, 5, generator=stream(k, "logits")) for k in (0, 1))
    labels = torch.arange(8) % 5
    found = [float(kd_distance(KdLossConfig(**s), student, teacher, labels)) for s in (one, other)]
    assert abs(found[0] - found[1]) > 1e-3


def test_other_classes_than_the_teachers_are_harmless_until_someone_reads_labels(teacher):
    assert built(teacher, classes=0).student.backbone.num_classes == 10 and not built(teacher, classes=0).notes
    assert "knows 10 classes, the images have 3" in built(teacher, classes=3).notes[0]
    for loss in (KdLossConfig(label_weight=1), KdLossConfig(name="dkd")):
        with pytest.raises(UserError, match=r"knows 10 classes, the images have 3: set method\.loss\.label_weight=0"):
            built(teacher, classes=3, loss=loss)


# Stored answers


def stored(teacher, folder, config, data):
    images = load_data(data, "train").subset(torch.arange(120))
    feed = Feed(images, data, config.block_size, 0, None)
    live = LiveAnswers(teacher, False)
    source = {"fingerprint": images.fingerprint, "augment": data.augment}
    settings = store_settings(live.network, config, len(images), feed.augmentation.num_views, source)

    def shown(view, index):
        return feed.gather(index, torch.full_like(index, view), torch.device("cpu")).images

    write_answers(folder, live.network, settings, shown)
    return live, StoredAnswers(folder), feed


def some(feed, size=40, steps=5):
    return [feed.batch(s, list(range(size)), torch.device("cpu")) for s in range(steps)]


@pytest.mark.parametrize("config", [{"dtype": "float32"}, {"dtype": "float32", "top_k": 10}, {}, {"top_k": 3}])
def test_a_replay_says_what_the_teacher_says(teacher, tmp_path, config):
    data = DataConfig(source="digits", augment="shift:1")
    live, store, feed = stored(teacher, tmp_path / "store", AnswerConfig(block_size=40, **config), data)
    for shown in some(feed):
        wanted, found = live.logits(shown), store.logits(shown)
        if config.get("dtype") == "float32":
            assert torch.equal(found, wanted)  # bit for bit, as the blocks are as large as the batches
        elif "top_k" not in config:
            torch.testing.assert_close(found, wanted.half().float(), rtol=0, atol=1e-3)
        else:
            top = wanted.topk(3, 1).indices
            torch.testing.assert_close(found.gather(1, top), wanted.gather(1, top), rtol=0, atol=2e-3)
            rest = torch.ones_like(wanted).scatter(1, top, 0).bool()
            spread = found[rest].view(len(found), -1)
            torch.testing.assert_close(spread.amin(1), spread.amax(1))
            torch.testing.assert_close(found.softmax(1).sum(1), torch.ones(len(found)))
            lost = wanted.softmax(1)[rest].view(len(found), -1).sum(1)
            torch.testing.assert_close(found.softmax(1)[rest].view(len(found), -1).sum(1), lost, rtol=0, atol=2e-3)


def test_training_from_a_store_is_training_with_the_teacher(teacher, tmp_path):
    data = DataConfig(source="digits", augment="shift:1")
    config = AnswerConfig(dtype="float32", block_size=40)
    _, _, feed = stored(teacher, tmp_path / "store", config, data)
    weights = []
    for answers in (None, str(tmp_path / "store")):
        method = built(teacher, answers=answers)
        run = RunDir(tmp_path / f"run-{bool(answers)}", writes=False)
        Trainer(method, feed, OptimConfig(lr=1e-2), TrainConfig(steps=12, batch_size=40), 0, run).fit()
        weights.append(method.student.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_store_refuses_other_images_other_views_and_other_folders(teacher, tmp_path):
    data = DataConfig(source="digits", augment="shift:1")
    _, store, feed = stored(teacher, tmp_path / "store", AnswerConfig(), data)
    store.check_data(feed.images.fingerprint, "shift:1")
    with pytest.raises(UserError, match="written for other images"):
        store.check_data("other", "shift:1")
    with pytest.raises(UserError, match="written for other augment"):
        store.check_data(feed.images.fingerprint, "none")
    with pytest.raises(UserError, match="is no finished store of answers"):
        StoredAnswers(tmp_path)
    with pytest.raises(UserError, match=r"top_k = 11: .* has 10 classes"):
        store_settings(LiveAnswers(teacher, False).network, AnswerConfig(top_k=11), 1, 1, {})


# The whole recipe


def recipe(teacher, images, **evaluate):
    return Recipe(
        name="tiny_pupil",
        data=DataConfig(source=images),
        method=DMKDConfig(teacher=teacher, student=StudentConfig(name="conv_small", options=TINY)),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(steps=6, batch_size=16, checkpoint_every=2),
        evaluate=EvaluateConfig(protocol="classifier", **evaluate),
    )


def test_unlabelled_images_teach_and_a_real_test_set_judges(teacher, tmp_path):
    from diffrep.assemble import train

    found = train(recipe(teacher, "noise:60x8", source="digits"), tmp_path / "run")
    scores = found["scores"]
    assert scores["test_images"] == 539 and {"top1", "top5", "agreement", "ece", "best_top1"} <= scores.keys()
    assert found["labels_seen"] == {} and (tmp_path / "run" / "best" / "weights.safetensors").exists()
    lines = RunDir(tmp_path / "run").metrics()
    assert {"kd_loss", "agreement"} <= lines[-1].keys()


def test_a_test_set_that_does_not_fit_is_refused_before_training(teacher):
    with pytest.raises(UserError, match="no labels to score against"):
        assemble(recipe(teacher, "noise:60x8"))


def test_held_out_images_choose_without_labels_or_real_images(teacher):
    method = built(teacher)
    assert method.held_out_score() is None
    method.watch(lambda: [batch(5, labels=False)])
    logits = method.student.eval()(batch(5).images)
    distance = kd_distance(KdLossConfig(), logits, method.judge(batch(5).images), None)
    assert method.held_out_score() == pytest.approx(-float(distance), rel=1e-4)
    method.train()
    method.held_out_score()
    assert method.student.training


def test_calibration_error_of_known_answers():
    certain = torch.tensor([[9.0, -9.0]]).repeat(4, 1)
    assert calibration_error(certain, torch.tensor([0, 0, 0, 1])) == pytest.approx(25, abs=1e-3)
    assert calibration_error(certain, torch.zeros(4).long()) == pytest.approx(0, abs=1e-3)


# Where a student starts


def start(folder, **changes):
    """A finished run with a student without a classifier."""
    folder.mkdir()
    with seeded(7, "start"):
        save_student(folder, Student(StudentConfig(name="conv_small", options=TINY | changes)))
    card = {"licence": "MIT", "labels_seen": {"policy": 50}, "labels_behind": {"teacher: student": 20}}
    (folder / "result.json").write_text(json.dumps(card))
    return str(folder)


def test_a_student_goes_on_from_a_run_whose_labels_it_inherits(teacher, tmp_path):
    place = start(tmp_path / "run")
    method, fresh = built(teacher, init=place), built(teacher)
    own, given = method.student.backbone.state_dict(), load_file(tmp_path / "run" / "weights.safetensors")
    assert given and all(torch.equal(own[name], value) for name, value in given.items())
    assert torch.equal(own["head.weight"], fresh.student.backbone.state_dict()["head.weight"])  # is new
    assert method.labels_behind == {"before: policy": 50, "before: teacher: student": 20}
    assert method.licence.startswith("MIT; taught by") and method.notes[0].startswith(f"started from {place}: matched")
    assert fresh.labels_behind == {} and fresh.notes == ()


def test_a_start_that_does_not_fit_is_refused(teacher, tmp_path):
    wide = start(tmp_path / "wide", widths=[4, 16])
    with pytest.raises(UserError, match="does not fit conv_small: matched"):
        built(teacher, init=wide)
    with pytest.raises(UserError, match="is no finished run"):
        built(teacher, init=str(tmp_path / "nowhere"))
