"""mIoU and its kin, against the official numbers and by hand: pytest tests/evaluation/test_segmentation.py"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_masks import CLASSES, Reader, blocks, mask_set, random_mask, shown

from diffrep.data.segment_views import SegmentViews
from diffrep.evaluation.segmentation import Areas, confusion, segmentation_scores, summary, views_of


def judged(case):
    """The case's areas; labels moved down by one where it says so."""
    label, found = case.get("inputs/label"), case.get("inputs/pred")
    if case.meta["reduce_zero_label"]:
        label = torch.where((label == 0) | (label == 255), 255, label - 1)
    label = torch.where(label == case.meta["ignore_index"], 255, label)
    return Areas.of(confusion(found, label, case.meta["num_classes"]))


@pytest.mark.golden(of=lambda case: case.meta.get("kind") == "mmseg mIoU")
def test_golden_areas_and_shares(golden_case):
    areas = judged(golden_case)
    found = {
        "area_intersect": areas.intersection, "area_pred": areas.found, "area_label": areas.truth,
        "area_union": areas.union, "IoU": areas.iou, "Acc": areas.accuracy, "Recall": areas.accuracy,
        "Precision": areas.precision, "Dice": areas.dice, "Fscore": areas.dice, "aAcc": areas.pixel_accuracy,
        "mIoU": areas.iou.nanmean(), "mAcc": areas.accuracy.nanmean(),
    }  # fmt: skip
    outputs = golden_case.under("outputs/")
    assert found.keys() >= outputs.keys()
    for name, wanted in outputs.items():
        torch.testing.assert_close(
            found[name].reshape(wanted.shape), wanted, rtol=0, atol=1e-12, equal_nan=True, check_dtype=True
        )


def test_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 255, 3]], dtype=torch.uint8)
    found = torch.tensor([[0, 1, 1], [1, 2, 0]])
    areas = Areas.of(confusion(found, truth, 4))
    assert areas.intersection.tolist() == [1, 2, 0, 0] and areas.union.tolist() == [3, 3, 0, 1]
    scores = summary(areas, CLASSES)
    assert scores["classes"] == {"background": 33.333, "left": 66.667, "right": None, "hat": 0.0}
    assert scores["miou"] == 33.333 and scores["miou_parts"] == 33.333 and scores["pixel_accuracy"] == 60.0
    assert scores["mean_accuracy"] == 50.0 and scores["challenge_score"] == 46.667
    assert scores["mean_dice"] == pytest.approx(100 * (0.5 + 0.8 + 0) / 3, abs=1e-3)
    json.dumps(scores, allow_nan=False)


def test_a_truth_that_is_no_class_still_makes_a_prediction_wrong():
    """As in the official counts, where such labels are in no histogram of labels; readers refuse them."""
    areas = Areas.of(confusion(torch.tensor([0, 0]), torch.tensor([0, 7]), 2))
    assert areas.found.tolist() == [2, 0] and areas.truth.tolist() == [1, 0] and float(areas.pixel_accuracy) == 1


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_properties(num_classes, seed):
    truth = random_mask(9, 11, num_classes, seed)
    found = random_mask(9, 11, num_classes, seed + 1, ignored=0.0)
    counts = confusion(found, truth, num_classes)
    assert counts.sum() == (truth != 255).sum()
    areas = Areas.of(counts)
    perfect = Areas.of(confusion(truth, truth, num_classes))
    assert float(perfect.iou.nanmean()) == float(perfect.pixel_accuracy) == 1
    dice = 2 * areas.iou / (1 + areas.iou)
    torch.testing.assert_close(areas.dice, dice, equal_nan=True)
    halves = confusion(found[:4], truth[:4], num_classes) + confusion(found[4:], truth[4:], num_classes)
    assert torch.equal(halves, counts)  # of a set, not the mean over pictures
    names = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    other = torch.where(truth == 255, 255, names[truth.long().clamp(max=num_classes - 1)])
    renamed = Areas.of(confusion(names[found.long()], other, num_classes))
    torch.testing.assert_close(renamed.iou[names], areas.iou, equal_nan=True)


def method(network, strides=(1, 2), **views):
    config = SimpleNamespace(views=SegmentViews(**{"base": (32, 32), "crop": 32} | views))
    return SimpleNamespace(network=network, backbone=SimpleNamespace(strides=strides), config=config)


def scored(network, images, samples=None, count=0, **views):
    return segmentation_scores(method(network, **views), images, torch.device("cpu"), samples, count)


MASKS = [blocks(seed=k) for k in range(4)]


class Shifted(Reader):
    """What is there, one field to the side."""

    def forward(self, images):
        return super().forward(images).roll(8, 3)


class Empty(nn.Module):
    def forward(self, images):
        return nn.functional.one_hot(torch.zeros(1, 4, 4, dtype=torch.int64), 4).permute(0, 3, 1, 2).float()


def test_predictions_get_what_they_deserve():
    images = mask_set(MASKS)
    truth = torch.stack(MASKS).long()
    perfect = scored(Reader(), images)
    assert perfect["miou"] == perfect["miou_parts"] == perfect["pixel_accuracy"] == perfect["mean_dice"] == 100
    shifted, right = scored(Shifted(), images), (truth == truth.roll(8, 2)).double().mean()
    assert shifted["pixel_accuracy"] == pytest.approx(100 * float(right), abs=1e-3) and shifted["miou"] < 50
    empty, share = scored(Empty(), images), (truth == 0).double().mean()
    assert empty["classes"] == {
        "background": pytest.approx(100 * float(share), abs=1e-3), "left": 0, "right": 0, "hat": 0,
    }  # fmt: skip
    assert empty["miou_parts"] == 0 and empty["mean_accuracy"] == 25


def test_ignored_pixels_count_nowhere():
    masks = [torch.where(random_mask(32, 32, ignored=0.3) == 255, 255, mask) for mask in MASKS]
    images = mask_set(masks, [shown(mask) for mask in MASKS])
    assert scored(Reader(), images)["miou"] == 100
    nothing = scored(Reader(), mask_set([torch.full((32, 32), 255, dtype=torch.uint8)]))
    assert nothing["miou"] is None and nothing["pixel_accuracy"] is None


@pytest.mark.parametrize(
    "views",
    [{}, {"test": "slide", "window": 24, "stride": 12}, {"test_ratios": (1.0, 2.0)}, {"test_flip": True}],
    ids=str,
)
def test_every_way_to_look_sees_a_perfect_network(views):
    masks = [torch.cat([mask, mask.flip(1)], 1) for mask in MASKS]
    pairs = () if views.get("test_flip") else ((1, 2),)  # its pictures of left and right do not look mirrored
    images = mask_set(masks, mirrored=pairs)
    assert scored(Reader(), images, **{"base": (64, 32)} | views)["pixel_accuracy"] > 99


def test_masks_of_half_the_size_are_judged_at_theirs():
    larger = [mask.repeat_interleave(2, 0).repeat_interleave(2, 1) for mask in MASKS]
    images, network = mask_set(MASKS, [shown(mask) for mask in larger]), Reader()
    assert images[0][0].shape == (3, 64, 64) and scored(network, images)["miou"] == 100
    assert set(network.seen) == {(32, 32)}


def test_how_a_photograph_is_shown():
    ade = {"base": (2048, 512), "test": "slide", "window": 512, "stride": 256}
    (only,) = views_of(SegmentViews(**ade), 1000, 1500)
    assert only.size == (512, 768) and only.windows == (512, 256) and not only.flip
    several = views_of(SegmentViews(**ade, test_ratios=(0.5, 1.5), test_flip=True), 1000, 1500)
    assert [(view.size, view.flip) for view in several] == [
        ((512, 768), False), ((512, 768), True), ((768, 1152), False), ((768, 1152), True),
    ]  # fmt: skip
    assert [view.size for view in views_of(SegmentViews(**ade), 200, 2000)] == [(512, 5120)]
    (face,) = views_of(SegmentViews(), 1024, 1024)
    assert face.size == (512, 512) and face.windows is None


def test_the_worst_pictures_are_drawn(tmp_path):
    wrong = [mask.clone() for mask in MASKS]
    wrong[2], wrong[1] = wrong[2].roll(8, 1), torch.where(torch.arange(32) < 4, 3, wrong[1]).to(torch.uint8)
    images = mask_set(wrong, [shown(mask) for mask in MASKS])
    scores = scored(Reader(), images, tmp_path / "samples", 2)
    rows = json.loads((tmp_path / "samples" / "predictions.json").read_text())
    assert [row["name"] for row in rows] == ["face 2", "face 1"] and rows[0]["score"] < rows[1]["score"] < 100
    assert {row["metric"] for row in rows} == {"mIoU %"} and math.isfinite(scores["miou"])
    assert all((tmp_path / "samples" / row["file"]).stat().st_size for row in rows)
