"""Mask R-CNN's losses, regions and answers, by hand: pytest tests/models/test_mask_rcnn.py"""

import math

import pytest
import torch
from torch import nn

from diffrep.counting import multiply_adds
from diffrep.models.mask_rcnn import HeadConfig, MaskRCNN, RegionPool, mask_targets
from diffrep.models.vitdet import SimplePyramid
from diffrep.randomness import seeded

SMALL = HeadConfig(
    channels=8, box_width=16, num_convs=1, anchors=(8, 16, 32, 64, 128), candidates=(100, 50), proposals=30, regions=32,
    score=0.0, detections=6,
)  # fmt: skip


def detector(num_classes=3, config=SMALL):
    """On a backbone of one convolution: images (B, 3, S, S) -> a map at 1/16."""
    with seeded(0, "test"):
        net = nn.Conv2d(3, 8, 16, 16)
        return MaskRCNN(SimplePyramid(net, 8, 16, config.channels), num_classes, config)


def square(left, top, right, bottom, side=64):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def target(*boxes, labels=None, side=64):
    masks = [square(*box, side) for box in boxes]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
        "masks": torch.stack(masks) if masks else torch.zeros(0, side, side, dtype=torch.bool),
    }


class Says(nn.Module):
    """The same, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


def numbers(losses):
    return {name: float(loss.detach()) for name, loss in losses.items()}


# Losses


def test_fresh_losses_are_those_of_no_opinion():
    """Last layers are small: objectness one half, classes even, masks one half, boxes hardly moved."""
    network, images = detector(), torch.rand(2, 3, 64, 64)
    losses = network(images, [target((4, 4, 30, 34), labels=[2]), target((10, 20, 50, 60), (2, 2, 14, 14))])
    assert list(losses) == ["objectness_loss", "proposal_loss", "class_loss", "box_loss", "mask_loss"]
    assert numbers(losses)["class_loss"] == pytest.approx(math.log(4), rel=0.02)
    assert numbers(losses)["mask_loss"] == pytest.approx(math.log(2), rel=0.02)
    assert numbers(losses)["objectness_loss"] == pytest.approx(math.log(2), rel=0.02)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_proposal_losses_by_hand():
    """Cross-entropy and L1 sums over 256 anchors per image, however many were drawn; those in between do not count."""
    network = detector()
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 40, 40], [0, 0, 10, 5.0]])
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    logits, deltas = torch.tensor([0.5, -1.0, 2.0, 9.0]), torch.zeros(4, 4)
    deltas[1, 0], deltas[2] = 0.25, 100
    losses = network._proposal_losses(logits, deltas, [anchors], [truth])
    # IoU 1 and 0.8 are objects, 0 is none, 0.5 lies in between
    told = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1)), math.log(1 + math.exp(2))]
    assert numbers(losses)["objectness_loss"] == pytest.approx(sum(told) / 256, rel=1e-5)
    shift, growth = 1 / 8, math.log(10 / 8)  # of the second anchor: its centre lies 1 higher, it is 8 high
    assert numbers(losses)["proposal_loss"] == pytest.approx((0.25 + shift + growth) / 256, rel=1e-5)


def test_the_region_losses_by_hand(monkeypatch):
    network = detector(num_classes=2)
    heads, regions = network.regions, torch.tensor([[0.0, 0, 16, 16], [40, 40, 60, 60], [8, 8, 24, 24]])
    labels, wanted = torch.tensor([2, 0, 1]), torch.tensor([[0.1, 0, 0, 0], [9, 9, 9, 9], [0, -0.3, 0, 0.2]])
    matched = torch.tensor([1, 0, 0])
    monkeypatch.setattr(heads, "select_training_samples", lambda *a: ([regions], [matched], [labels], [wanted]))
    logits, deltas = torch.tensor([[1.0, 0, 2], [3, 0, 0], [0, 0, 0]]), torch.zeros(3, 3, 4)
    deltas[0, 2, 0], deltas[0, 1] = 0.6, 7.0  # its own class is 0.5 off; another class does not matter
    heads.box_predictor = Says((logits, deltas.flatten(1)))
    mask_logits = torch.zeros(2, 3, 28, 28)
    mask_logits[0, 2], mask_logits[1, 1, :, 14:] = 4.0, -3.0
    heads.mask_predictor = Says(mask_logits)
    levels = [torch.zeros(1, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    truth = target((8, 8, 16, 24), (0, 0, 16, 16))
    losses = network._region_losses(levels, [regions], [truth])
    ce = sum(
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits.tolist(), labels, strict=True)
    )
    assert numbers(losses)["class_loss"] == pytest.approx(ce / 3, rel=1e-5)
    assert numbers(losses)["box_loss"] == pytest.approx((0.5 + 0.3 + 0.2) / 3, rel=1e-5)  # L1, over all regions
    # First: all mask, logit 4. Second: the left half is mask (logit 0), the right is not (logit -3).
    own = math.log(1 + math.exp(-4)) + (math.log(2) + math.log(1 + math.exp(-3))) / 2
    assert numbers(losses)["mask_loss"] == pytest.approx(own / 2, rel=1e-5)


def test_pictures_without_objects_teach_what_is_background():
    network = detector()
    losses = network(torch.rand(2, 3, 64, 64), [target(), target()])
    assert losses["proposal_loss"] == losses["box_loss"] == losses["mask_loss"] == 0
    assert losses["objectness_loss"] > 0 and losses["class_loss"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_one_picture_of_a_batch_may_be_empty():
    losses = detector()(torch.rand(2, 3, 64, 64), [target(), target((3, 3, 40, 50))])
    assert all(loss.isfinite() for loss in losses.values()) and losses["mask_loss"] > 0


def test_under_autocast_losses_are_exact_numbers():
    network, images, truths = detector(), torch.rand(1, 3, 64, 64), [target((4, 4, 30, 34))]
    with seeded(0, "draws"):
        exact = network(images, truths)
    with torch.autocast("cpu", torch.bfloat16), seeded(0, "draws"):
        rounded = network(images, truths)
    assert all(loss.dtype == torch.float32 for loss in rounded.values())
    assert numbers(rounded) == pytest.approx(numbers(exact), rel=0.1, abs=0.02)


# Regions


def test_levels_are_those_of_the_pyramid_paper():
    """At 224 pixels stride 16, one finer for each halving; the first and last take what is beyond."""
    pool = RegionPool(7, [4, 8, 16, 32])
    sides = [0.5, 10, 55.9, 56.1, 111, 113, 223, 225, 447, 449, 2000]
    boxes = torch.tensor([[5.0, 5, 5 + side, 5 + side] for side in sides])
    assert pool.level(boxes).tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    from torchvision.ops.poolers import LevelMapper

    assert pool.level(boxes).tolist() == LevelMapper(2, 5)([boxes]).tolist()
    assert RegionPool(7, [8, 16, 32, 64]).level(boxes[-3:]).tolist() == [1, 2, 3]


def test_each_region_is_read_at_its_level_and_stays_in_its_place():
    pool, levels = (
        RegionPool(2, [4, 8, 16, 32]),
        [torch.full((2, 1, 512 // s, 512 // s), float(s)) for s in (4, 8, 16, 32)],
    )
    levels = [level + torch.arange(2.0).view(2, 1, 1, 1) / 2 for level in levels]
    boxes = [torch.tensor([[0.0, 0, 300, 300], [8, 8, 20, 20]]), torch.tensor([[0.0, 0, 500, 500], [4, 4, 130, 140]])]
    found = pool(levels, boxes)
    assert found.shape == (4, 1, 2, 2) and torch.equal(found.amax((1, 2, 3)), found.amin((1, 2, 3)))
    assert found[:, 0, 0, 0].tolist() == [16.0, 4.0, 32.5, 8.5]
    assert pool(levels, [torch.zeros(0, 4)] * 2).shape == (0, 1, 2, 2)


def test_anchors_stand_at_the_corners_of_cells():
    anchors = detector().anchors([torch.Size((2, 3))] + [torch.Size((1, 1))] * 4, torch.device("cpu"))
    assert anchors.shape == (3 * (6 + 4), 4)
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert middle[1::3][:6].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]  # p2: every 4 pixels
    sizes = anchors[:, 2:] - anchors[:, :2]
    assert sizes[1::3].tolist() == [[8, 8]] * 6 + [[16, 16], [32, 32], [64, 64], [128, 128]]
    assert sizes[0].tolist() == [12, 6] and sizes[2].tolist() == [6, 12]  # height over width one half and two, rounded


def test_mask_targets():
    masks = torch.stack([square(8, 8, 24, 40), square(0, 0, 64, 64)])
    boxes = torch.tensor([[8.0, 8, 24, 40], [0, 8, 32, 40], [5, 5, 9, 9]])
    found = mask_targets(masks, boxes, torch.tensor([0, 0, 1]), 4)
    assert found[0].all() and found[2].all() and found.dtype == torch.float32
    assert found[1].tolist() == [[0, 1, 1, 0]] * 4
    assert mask_targets(masks[:0], boxes[:0], torch.zeros(0).long(), 4).shape == (0, 4, 4)


# Answers


def test_answers_lie_in_the_picture_best_first():
    network = detector().eval()
    nn.init.normal_(network.regions.box_predictor.bbox_pred.weight, std=0.5)
    nn.init.normal_(network.regions.box_predictor.cls_score.weight, std=0.5)
    found = network.found(torch.rand(2, 3, 64, 64), [(64, 64), (30, 50)])
    for answer, (height, width) in zip(found, [(64, 64), (30, 50)], strict=True):
        count = len(answer["boxes"])
        assert 0 < count <= 6 and answer["masks"].shape == (count, 28, 28)
        assert answer["boxes"].min() >= 0 and (answer["boxes"].amax(0) <= torch.tensor([width, height] * 2)).all()
        assert torch.equal(answer["scores"], answer["scores"].sort(descending=True).values)
        assert answer["labels"].min() >= 0 and answer["labels"].max() <= 2
        assert ((answer["masks"] >= 0) & (answer["masks"] <= 1)).all()


def test_no_answer_is_an_answer():
    network = detector(config=SMALL.model_copy(update={"score": 0.99})).eval()
    for answer in network.found(torch.rand(2, 3, 64, 64), [(64, 64)] * 2):
        assert answer["boxes"].shape == (0, 4) and answer["masks"].shape == (0, 28, 28)
        assert len(answer["labels"]) == len(answer["scores"]) == 0


def test_an_answer_does_not_depend_on_its_neighbours():
    network, images = detector().eval(), torch.rand(3, 3, 64, 64)
    together = network.found(images, [(64, 64), (40, 64), (64, 20)])
    alone = network.found(images[1:2], [(40, 64)])[0]
    for key, value in alone.items():
        torch.testing.assert_close(together[1][key], value, atol=1e-5, rtol=1e-4)


# Cost


def test_a_step_is_counted_on_shapes_alone():
    """Heads: the regions' convolutions and layers by hand, forward and twice as much backward."""
    with torch.device("meta"):
        network = detector()
    images = torch.zeros(2, 3, 64, 64, device="meta")
    whole = multiply_adds(lambda: network.dry_step(images))
    box = 32 * (8 * 8 * 9 * 49 + 8 * 49 * 16 + 16 * 4 * 5)
    mask = 8 * (8 * 8 * 9 * 196 + 8 * 8 * 784 + 8 * 4 * 784)
    rpn = sum(side**2 * (2 * 8 * 8 * 9 + 8 * 3 * 5) for side in (16, 8, 4, 2, 1))
    pyramid = multiply_adds(lambda: network.backbone(images)) // 2
    forward = 2 * (box + mask + rpn + pyramid)
    assert 2.8 * forward < whole <= 3 * forward


def test_the_published_heads():
    config = HeadConfig()
    assert config.anchors == (32, 64, 128, 256, 512) and config.candidates == (2000, 1000) and config.proposals == 1000
    with torch.device("meta"):
        network = detector(80, config)
    box_head = network.regions.box_head
    assert [m.out_features for m in box_head if isinstance(m, nn.Linear)] == [1024]
    # 4 convolutions 256 with norms, fc 1024; detectron2's FastRCNNConvFCHead
    assert sum(p.numel() for p in box_head.parameters()) == 4 * (256 * 256 * 9 + 512) + (256 * 49 + 1) * 1024
    assert network.regions.fg_bg_sampler.batch_size_per_image == 512 and network.regions.score_thresh == 0.05
    assert network.rpn.fg_bg_sampler.batch_size_per_image == 256 and network.rpn.nms_thresh == 0.7
