"""Segmentation: losses against the official numbers, and what a network learns: pytest tests/methods/test_segment.py"""

import math

import pytest
import torch
from golden_segment import is_bisenet, is_upernet
from torch import nn
from toy_masks import blocks, mask_set, random_mask

from diffrep import _torchvision_compat
from diffrep.assemble import multiply_adds_per_image
from diffrep.counting import multiply_adds, on_meta
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.dense_feed import DenseFeed
from diffrep.data.segment_views import SegmentTraining, SegmentViews
from diffrep.errors import UserError
from diffrep.evaluation.segmentation import segmentation_scores
from diffrep.methods import segment
from diffrep.methods.segment import (
    Segment,
    SegmentConfig,
    hard_cross_entropy,
    pixel_accuracy,
    pixel_cross_entropy,
    synchronised,
)
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, seeded, stream

VIEWS = SegmentViews(base=(64, 64), crop=64)
RESNET = StudentConfig(name="resnet10t", options={"stem_width": 8, "channels": [8, 16, 32, 64]})
VIT = StudentConfig(
    name="vit_base_patch16_224", options={"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2}
)  # fmt: skip
BISENET = {"student": RESNET, "views": VIEWS}
UPERNET = {"student": VIT, "views": VIEWS, "head": "upernet", "side_width": 8}
BOTH = pytest.mark.parametrize("settings", [BISENET, UPERNET], ids=["bisenet", "upernet"])
MASKS = [blocks(64, 64, seed=k) for k in range(4)]


def build(settings, images=None, **changes):
    with seeded(0, "test"):
        return Segment(SegmentConfig(**settings | changes), images or mask_set(MASKS)).train()


def batch(count=2, side=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    label = torch.stack([random_mask(side, side, seed=seed + k) for k in range(count)]).long()
    return Batch(torch.rand(count, 3, side, side, generator=rng), None, torch.arange(count), None, label)


def rows(count=2):
    return Rows(stream(0, "step"), count)


# Losses


@pytest.mark.golden(of=is_bisenet)
def test_golden_losses_of_three_heads(golden_case):
    label, total = golden_case.get("inputs/label").squeeze(1), 0
    for head in ("decode_head", "aux0", "aux1"):
        logits = golden_case.get(f"outputs/{head}/logits")
        loss = pixel_cross_entropy(logits, label)
        torch.testing.assert_close(loss, golden_case.get(f"outputs/{head}/loss_ce"), rtol=1e-5, atol=0)
        accuracy = 100 * pixel_accuracy(logits, label)
        torch.testing.assert_close(accuracy, golden_case.get(f"outputs/{head}/acc_seg").squeeze(), rtol=1e-5, atol=0)
        total = total + loss
    torch.testing.assert_close(total, golden_case.get("outputs/loss_total"), rtol=1e-5, atol=0)


@pytest.mark.golden(of=is_upernet)
def test_golden_losses_of_two_heads(golden_case):
    label = golden_case.get("inputs/label").squeeze(1)
    main = pixel_cross_entropy(golden_case.get("outputs/logits"), label)
    torch.testing.assert_close(main, golden_case.get("outputs/loss_ce"), rtol=1e-5, atol=0)
    weight = golden_case.meta["auxiliary_head"]["loss_decode"]["loss_weight"]
    side = weight * pixel_cross_entropy(golden_case.get("outputs/aux_logits"), label)
    torch.testing.assert_close(side, golden_case.get("outputs/aux_loss_ce"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [pixel_cross_entropy, lambda *given: hard_cross_entropy(*given, 0.7, 1 / 16)])
def test_a_batch_without_any_class_has_loss_zero(loss):
    """14 training masks of ADE20k are like that."""
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    found = loss(logits, torch.full((2, 8, 8), 255))
    found.backward()
    assert float(found.detach()) == 0 and not logits.grad.any()


def test_ignored_pixels_count_in_the_denominator_alone():
    logits, label = torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    half = label.clone()
    half[:, 4:] = 255
    other = logits.clone()
    other[:, :, 4:] = 9.0
    whole, upper = pixel_cross_entropy(logits, label), pixel_cross_entropy(logits, half)
    torch.testing.assert_close(upper, pixel_cross_entropy(other, half))
    torch.testing.assert_close(upper + pixel_cross_entropy(logits.flip(2), half), whole)
    assert float(pixel_accuracy(logits, torch.full_like(label, 255))) == 0


def probabilities(values):
    """Logits (1, 2, 1, N) in which class 0 has these probabilities, and a label of class 0."""
    true = torch.tensor(values)
    return torch.stack([true.log(), (1 - true).log()])[None, :, None], torch.zeros(1, 1, len(values), dtype=torch.int64)


def test_hard_pixels_by_hand():
    logits, label = probabilities([0.9, 0.1, 0.69, 0.71, 0.5, 0.99, 0.2, 0.95])
    hard = [0.1, 0.2, 0.5, 0.69]
    mean = sum(-math.log(p) for p in hard) / 4
    assert float(hard_cross_entropy(logits, label, 0.7, 1 / 8)) == pytest.approx(mean, rel=1e-5)
    at_least = sum(-math.log(p) for p in [*hard, 0.71, 0.9]) / 6  # fewer are hard than six: the hardest six
    assert float(hard_cross_entropy(logits, label, 0.7, 6 / 8)) == pytest.approx(at_least, rel=1e-5)
    label[0, 0, 1] = 255  # the hardest is ignored
    mean = sum(-math.log(p) for p in hard[1:]) / 3
    assert float(hard_cross_entropy(logits, label, 0.7, 1 / 8)) == pytest.approx(mean, rel=1e-5)


@BOTH
def test_side_heads_count_as_much_as_published(settings):
    parts = build(settings)(batch(), rows(), 0.0)
    weight = 0.4 if settings is UPERNET else 1.0
    torch.testing.assert_close(parts["loss"], parts["main_loss"] + weight * parts["side_loss"])


def test_side_heads_count_as_much_as_said():
    parts = build(UPERNET, side_weight=3.0)(batch(), rows(), 0.0)
    torch.testing.assert_close(parts["loss"], parts["main_loss"] + 3 * parts["side_loss"])
    alone = build(UPERNET, side_weight=0.0)(batch(), rows(), 0.0)
    assert torch.equal(alone["loss"], alone["main_loss"])


@BOTH
def test_micro_batches_add_up_to_the_whole(settings):
    """Of cross-entropy with norms at rest: it is divided by all pixels, however many a half ignores."""
    method, whole = build(settings).eval(), batch(4)
    whole.target[1] = 255
    halves = [Batch(whole.images[k], None, whole.index[k], None, whole.target[k]) for k in ([0, 1], [2, 3])]
    together = method(whole, rows(4), 0.0)["loss"]
    torch.testing.assert_close(sum(method(half, rows(2), 0.0)["loss"] for half in halves) / 2, together)


@BOTH
def test_in_bf16_the_losses_themselves_are_float32(settings):
    method = build(settings)
    with torch.autocast("cpu", torch.bfloat16):
        parts = method(batch(), rows(), 0.0)
    parts["loss"].backward()
    assert all(value.dtype == torch.float32 for value in parts.values())


# The network


@BOTH
def test_a_checkpoint_holds_the_backbone_once(settings):
    method = build(settings)
    stored = sum(value.numel() for value in method.state_dict().values())
    assert stored == sum(value.numel() for value in method.network.state_dict().values())
    assert {id(p) for p in method.backbone.parameters()} <= {id(p) for p in method.network.parameters()}


@BOTH
def test_every_parameter_learns_in_its_group(settings):
    method = build(settings)
    method(batch(), rows(), 0.0)["loss"].backward()
    groups = method.parameter_groups()
    trained = {id(p) for group in groups.values() for p in group}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}
    assert all(p.grad is not None for group in groups.values() for p in group)
    assert {id(p) for p in groups["student"]} <= {id(p) for p in method.backbone.parameters()}


@BOTH
def test_a_step_is_counted(settings):
    """Three times the forward pass, but for the first layers, which send nothing back to pixels."""
    method = build(settings)
    counted = multiply_adds_per_image(method, method.image_size)
    forward = multiply_adds(on_meta(method.network.eval(), torch.zeros(1, 3, 64, 64)))
    assert 2.5 * forward < counted < 4 * forward  # the side heads are of training alone


@BOTH
def test_what_is_exported_can_be_loaded(settings, tmp_path):
    method, other = build(settings), build(settings)
    for p in method.parameters():
        p.data += 0.1
    method.export(tmp_path)
    other.load(tmp_path)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(other.eval().network(image), method.eval().network(image))
    assert method.facts == {"classes": ["background", "left", "right", "hat"], "label_order": "toy"}


def test_norms_are_synchronised_where_several_gpus_train(monkeypatch):
    _torchvision_compat.install()
    plain = build(BISENET).network
    assert synchronised(plain) is plain
    monkeypatch.setattr(segment, "_has_several_gpus", lambda: True)
    method = build(BISENET)
    norms = [m for m in method.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert method.network.state_dict().keys() == plain.state_dict().keys()
    method.network.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(method.eval().network(image), plain.eval()(image))
    assert multiply_adds_per_image(method, 64) > 0


# What is refused

SLIDING = {"test": "slide", "window": 50, "stride": 8}


@BOTH
def test_one_picture_at_a_time_is_refused(settings):
    with pytest.raises(UserError, match=r"train\.batch_size, train\.micro_batch_size: .*two or more"):
        build(settings)(batch(1), rows(1), 0.0)


@pytest.mark.parametrize(
    ("settings", "changes", "told"),
    [
        (BISENET, {"student": VIT}, "reads four maps of strides 4, 8, 16, 32; the backbone gives 4 of strides 16"),
        (UPERNET, {"views": SegmentViews(base=(64, 64), crop=60)}, "crop = 60: .* multiples of 16"),
        (UPERNET, {"views": VIEWS.model_copy(update=SLIDING)}, "window = 50: .* multiples of 16"),
        (UPERNET, {"spatial": (1, 2, 3, 4)}, "method.spatial: 'upernet' has no spatial path"),
        (BISENET, {"maps": ("layer2", "layer9")}, "no map 'layer9'"),
    ],
)
def test_networks_that_do_not_fit_are_refused(settings, changes, told):
    with pytest.raises(UserError, match=told):
        build(settings, **changes)


# What is learnt


STILL = {"ratio_range": (1.0, 1.0), "flip": 0.0, "colour": "none", "cat_max_ratio": 1.0}  # each crop a whole picture


def by_heart(settings, images, views, steps, lr=1e-2):
    """All pictures in every step; the rate rests for half of them, then falls to 0. Returns parts and scores."""
    method = build(settings, images, views=views)
    feed = DenseFeed(images, SegmentTraining(views, images), len(images), 0)
    optimizer = torch.optim.AdamW(method.parameters(), lr)
    found = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 - 2 * step / steps)
        with seeded(0, "dropout", step):
            parts = method(feed.batch(step, list(range(len(images))), torch.device("cpu")), None, step / steps)
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(value.detach()) for name, value in parts.items()})
    return found, segmentation_scores(method.eval(), images, torch.device("cpu"))


@BOTH
def test_it_learns_toy_pictures_by_heart(settings):
    quarters = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[3, 0], [1, 2]]), torch.tensor([[2, 2], [0, 1]])]
    masks = [q.to(torch.uint8).repeat_interleave(32, 0).repeat_interleave(32, 1) for q in quarters]
    found, scores = by_heart(settings, mask_set(masks), VIEWS.model_copy(update=STILL), 80)
    assert found[0]["main_loss"] > 1.2 and found[-1]["main_loss"] < 0.15
    assert scores["miou"] > 95 and scores["pixel_accuracy"] > 97, scores


def test_it_learns_the_drawn_faces_by_heart(shared):
    """19 parts of two faces at 128 pixels; what is left are edges finer than an eighth of them."""
    images = load_dense(DataConfig(source=f"celebamask-hq:{shared}/data/fixtures/celebamask_hq"), "train", "segment")
    student = StudentConfig(name="resnet10t", options={"stem_width": 16, "channels": [16, 32, 64, 128]})
    views = SegmentViews(base=(128, 128), crop=128, **STILL)
    found, scores = by_heart({"student": student}, images, views, 140)
    assert found[0]["main_loss"] > 2 and found[-1]["main_loss"] < 0.12
    assert scores["pixel_accuracy"] > 96 and scores["miou"] > 40
    assert scores["classes"]["skin"] > 85 and scores["classes"]["hair"] > 80


@pytest.mark.slow
def test_it_learns_three_scenes_by_heart(shared):
    """A tiny ViT from scratch; the predictions slide over pictures of their own shape."""
    data = DataConfig(source=f"ade20k:{shared}/data/fixtures/ade20k", only_part="test")
    views = SegmentViews(base=(256, 64), crop=64, test="slide", window=64, stride=32, **STILL)
    options = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4}
    student = StudentConfig(name="vit_base_patch16_224", options=options)
    settings = UPERNET | {"student": student, "width": 64, "side_width": 16}
    found, scores = by_heart(settings, load_dense(data, "train", "segment"), views, 240)
    assert found[0]["main_loss"] > 4 and found[-1]["main_loss"] < 0.15
    assert scores["pixel_accuracy"] > 90
