"""Landmarks: what is minimised, what is learnt, what is refused: pytest tests/methods/test_landmark.py"""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from toy_faces import face, face_set

from diffrep.assemble import multiply_adds_per_image
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.dense_feed import DenseFeed
from diffrep.data.landmark_views import LandmarkTraining, LandmarkViews
from diffrep.errors import UserError
from diffrep.evaluation.landmarks import landmark_scores
from diffrep.files import write_json
from diffrep.methods.base import save_student
from diffrep.methods.landmark import Landmark, LandmarkConfig
from diffrep.models import heatmaps
from diffrep.models.students import Student, StudentConfig
from diffrep.randomness import Rows, seeded, stream

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RESNET = StudentConfig(name="resnet18", options={"channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}, **IMAGENET)
VIT = StudentConfig(
    name="vit_base_patch16_224", options={"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2}
)  # fmt: skip
HRNET = StudentConfig(name="hrnet_w18_small", **IMAGENET)
STILL = {"flip": 0.0, "scale_jitter": 0.0, "rotation_share": 0.0}
HEADS = pytest.mark.parametrize(
    ("student", "settings", "side"),
    [
        (RESNET, {"deconv": (16, 16, 16)}, 16),
        (RESNET, {"deconv": ()}, 2),
        (VIT, {"deconv": (16, 16)}, 16),
        (HRNET, {"head": "concat", "fuse_upsample": "bilinear"}, 16),
        (RESNET, {"head": "concat"}, 16),
        (StudentConfig(name="conv_small"), {"head": "concat", "maps": ("layer1", "layer2")}, 32),
    ],
    ids=["deconv", "plain", "vit", "hrnet", "concat", "taps"],
)


def toys(**options):
    return face_set([face(x=50.0 + k, y=45.0 + 2 * k, half=18.0 + k) for k in range(4)], **options)


def build(images=None, **settings):
    settings = {"student": RESNET, "deconv": (16, 16, 16), "views": LandmarkViews(size=64)} | settings
    with seeded(0, "test"):
        return Landmark(LandmarkConfig(**settings), images or toys()).train()


def batch_of(images, method, rows=(0, 1, 2, 3), step=0):
    views = LandmarkTraining(method.config.views, images)
    return DenseFeed(images, views, 4, 0).batch(step, list(rows), torch.device("cpu"))


def draws():
    return Rows(stream(0, "step"), 4)


# What is minimised


@HEADS
def test_every_parameter_learns(student, settings, side):
    method, images = build(student=student, **settings), toys()
    batch = batch_of(images, method)
    assert method.network(batch.images).shape == (4, 5, side, side)
    method(batch, draws(), 0.0)["loss"].backward()
    idle = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    groups = method.parameter_groups()
    assert sum(len(g) for g in groups.values()) == sum(p.requires_grad for p in method.parameters())
    assert groups["student"] and groups["head"]


@HEADS
def test_what_a_step_costs_is_counted_without_computing(student, settings, side):
    method = build(student=student, **settings)
    assert multiply_adds_per_image(method, method.image_size) > 0 and method.image_size == 64


def test_the_loss_is_the_mean_square_to_the_drawn_points(monkeypatch):
    """A network that draws nothing: the mean square of the Gaussians, point by point in Python."""
    images = face_set([face(visible=[1, 1, 0, 1, 1])] * 4)
    method = build(images, views=LandmarkViews(size=64, target="unbiased", **STILL))
    batch = batch_of(images, method)
    monkeypatch.setattr(method.network, "forward", lambda x: torch.zeros(len(x), 5, 16, 16))
    total = 0.0
    for k in (0, 1, 3, 4):
        x, y = (batch.target["points"][0, k] / 4).tolist()
        total += sum(math.exp(-((c - x) ** 2 + (r - y) ** 2) / 4) for c in range(16) for r in range(16))
    found = method(batch, draws(), 0.0)
    assert float(found["loss"]) == pytest.approx(total / (5 * 16 * 16), rel=1e-5)


def test_the_training_error_is_the_distance_of_the_peaks(monkeypatch):
    """In percent of the crop's side, over points that have a part."""
    images = face_set([face(visible=[1, 1, 0, 1, 1])] * 4)
    method = build(images, views=LandmarkViews(size=64, **STILL))
    batch = batch_of(images, method)
    drawn = torch.zeros(4, 5, 16, 16)
    drawn[:, :, 8, 4] = 1.0  # at (16, 32) of 64 pixels
    monkeypatch.setattr(method.network, "forward", lambda x: drawn)
    points = batch.target["points"][0, [0, 1, 3, 4]]
    expected = float((points - torch.tensor([16.0, 32.0])).norm(dim=-1).mean()) / 64 * 100
    assert float(method(batch, draws(), 0.0)["train_error"]) == pytest.approx(expected, rel=1e-5)


def test_halves_of_a_batch_add_up_to_the_whole():
    """Without batch statistics."""
    method, images = build().eval(), toys()
    whole = batch_of(images, method)
    parts = [batch_of(images, method, rows) for rows in ((0, 1), (2, 3))]
    losses = [float(method(b, draws(), 0.0)["loss"].detach()) for b in (whole, *parts)]
    assert sum(losses[1:]) / 2 == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("target", ["msra", "unbiased", "udp"])
def test_each_target_has_its_loss(target):
    method = build(views=LandmarkViews(size=64, target=target), decoding="udp" if target == "udp" else "default")
    found = method(batch_of(toys(), method), draws(), 0.0)
    assert found["loss"].isfinite() and found["loss"] > 0 and found["loss"].dtype == torch.float32


def test_in_bf16_the_loss_itself_is_float32():
    method = build()
    batch = batch_of(toys(), method)
    exact = float(method(batch, draws(), 0.0)["loss"].detach())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(batch, draws(), 0.0)["loss"]
    assert rounded.dtype == torch.float32 and float(rounded.detach()) == pytest.approx(exact, rel=0.02)


def test_nothing_of_a_step_stays_on_another_device():
    """On shapes alone, where a tensor left on the CPU would be refused."""
    for encoding, decoding in (("msra", "default"), ("udp", "udp")):
        method = build(views=LandmarkViews(size=64, target=encoding), decoding=decoding)
        batch = batch_of(toys(), method)
        away = Batch(
            batch.images.to("meta"), None, batch.index, None, {k: v.to("meta") for k, v in batch.target.items()}
        )
        assert all(value.device.type == "meta" for value in method.to("meta")(away, draws(), 0.0).values())
        for how in ("default", "unbiased", "megvii", "udp"):
            assert heatmaps.cells_of(torch.zeros(2, 5, 16, 16, device="meta"), how)[0].device.type == "meta"


# What is learnt


def test_four_real_faces_to_near_zero_loss(shared):
    """98 points each, on maps of 16 x 16: the loss falls below a fiftieth, and the points are found."""
    config = DataConfig(source=f"wflw:{shared / 'data/fixtures/wflw'}", only_part="test")
    images = load_dense(config, "train", "landmark")
    views = LandmarkViews(size=64, target="unbiased", **STILL)
    method = build(images, deconv=(64, 64, 64), views=views, decoding="unbiased", flip_test=False)
    before = landmark_scores(method.eval(), images, torch.device("cpu"))
    optimizer, losses, steps = torch.optim.Adam(method.train().parameters(), 1e-2), [], 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, 2 * (1 - step / steps))
        loss = method(batch_of(images, method, step=step), draws(), step / steps)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = landmark_scores(method.eval(), images, torch.device("cpu"))
    assert losses[-1] < losses[0] / 50 and losses[-1] < 1e-3
    assert before["nme"] > 30 and before["fr10"] == 100
    assert after["nme"] < 5 and after["fr10"] == 0 and after["auc10"] > 50


# Where it starts, and what is kept


def test_the_backbone_starts_from_a_distilled_student(tmp_path):
    with seeded(3, "another"):
        student = Student(RESNET, 7)
    save_student(tmp_path, student)
    write_json(tmp_path / "result.json", {"licence": "CC0", "labels_seen": {}, "labels_behind": {"teacher": 12}})
    method = build(init=str(tmp_path), backbone_std=0.5)  # the latter is of fresh ones
    taught, own = student.backbone.state_dict(), method.backbone.net.state_dict()
    assert own and all(torch.equal(own[name], taught[name]) for name in own)
    assert set(taught) - set(own) == {"fc.weight", "fc.bias"}
    assert method.licence == "CC0" and method.labels_behind == {"before: teacher": 12} and method.notes
    scratch = build()
    assert not torch.equal(scratch.backbone.net.conv1.weight, method.backbone.net.conv1.weight)


def test_a_fresh_hrnet_begins_as_mmposes():
    method = build(student=HRNET, head="concat", backbone_std=0.001)
    filters = [value for name, value in method.backbone.net.state_dict().items() if value.dim() == 4]
    assert all(float(f.std()) == pytest.approx(0.001, rel=0.15) for f in filters if f.numel() > 1000)
    assert float(build(student=HRNET, head="concat").backbone.net.conv1.weight.detach().std()) > 0.01


def test_a_finished_network_is_loaded_again(tmp_path):
    method, images = build(), toys()
    method(batch_of(images, method), draws(), 0.0)  # moves batch statistics
    method.export(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["task"] == "landmark" and card["normaliser"] == [0, 1] and len(card["classes"]) == 5
    with seeded(1, "other"):
        other = Landmark(method.config, images)
    other.load(tmp_path)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.eval().network(x), method.eval().network(x))
    with pytest.raises(UserError, match="weights do not fit"):
        build(deconv=(16, 16, 8)).load(tmp_path)
    write_json(tmp_path / "config.json", card | {"task": "segment"})
    with pytest.raises(UserError, match="holds no network of the task 'landmark'"):
        other.load(tmp_path)


def test_the_full_size_networks_have_the_official_parameters():
    """Spec section 7: HRNet-W18 of 9,562,260, read as 270 channels; counts of heads: tests/models/test_heatmaps.py."""
    faces = face_set([face()])
    with torch.device("meta"):
        hrnet = Landmark(LandmarkConfig(student=StudentConfig(name="hrnet_w18"), head="concat"), faces)
        resnet = Landmark(LandmarkConfig(student=StudentConfig(name="resnet50")), faces)
    assert sum(p.numel() for p in hrnet.backbone.parameters()) == 9_562_260
    assert hrnet.network.keypoint_head.final_layer[0].weight.shape == (270, 270, 1, 1)
    assert resnet.network.keypoint_head.deconv_layers[0].weight.shape == (2048, 256, 4, 4)


# What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"decoding": "udp"},
        {"views": {"target": "udp"}},
        {"decoding": "dark"},
        {"head": "deconvolution"},
        {"backbone_std": 0},
        {"select": "train"},
        {"views": {"sigmas": 1}},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValidationError):
        LandmarkConfig(student=RESNET, **wrong)


def test_defaults_are_the_published_ones():
    config = LandmarkConfig(student=RESNET)
    assert (config.decoding, config.flip_test, config.select) == ("default", True, "held_out")
    assert config.deconv == (256, 256, 256) and config.head == "deconv" and config.label_readers() == ("student",)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"student": HRNET}, "'deconv' reads the coarsest map alone; hrnet_w18_small is for 'concat'"),
        ({"student": VIT, "views": LandmarkViews(size=72)}, "method.views.size = 72: vit_base_patch16_224 takes"),
        ({"student": RESNET, "fuse_upsample": "bilinear"}, "fuse_upsample"),
        ({"student": RESNET, "maps": ("layer9",)}, "layer9"),
    ],
)
def test_networks_that_do_not_fit_are_one_line(settings, told):
    with pytest.raises(UserError) as refused:
        build(**settings)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_batch_says_what_it_is_of():
    method, images = build(), toys()
    batch = batch_of(images, method)
    assert isinstance(batch, Batch) and batch.labels is None and sorted(batch.index.tolist()) == [0, 1, 2, 3]
