"""Large-scale jitter and the test's frame: pytest tests/data/test_detect_views.py"""

import pytest
import torch
from toy_objects import object_set, shapes

from diffrep import _torchvision_compat
from diffrep.data import coco
from diffrep.data.coco import Objects, tight_boxes
from diffrep.data.detect_views import DetectTraining, DetectViews, fitted, resized, test_view
from diffrep.errors import UserError
from diffrep.randomness import stream

test_view.__test__ = False  # a function of that name, no test
PICTURES = [shapes(96, 128, 4, seed=1), shapes(90, 60, 3, seed=2), shapes(40, 130, 2, seed=3)]
IMAGES = object_set(PICTURES)


def seen(k, step=0, **settings):
    views = DetectTraining(DetectViews(**{"size": 64} | settings), IMAGES)
    return views(*IMAGES[k], stream(0, "test", step))


def still(**settings):
    return {"scale": (1.0, 1.0), "flip": 0.0} | settings


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("step", range(6))
def test_boxes_are_those_of_the_masks_and_objects_stay_on_their_pixels(k, step):
    image, target = seen(k, step)
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert target["masks"].shape == (len(target["boxes"]), 64, 64) and target["masks"].dtype == torch.bool
    assert (
        torch.equal(target["boxes"].double(), tight_boxes(target["masks"])) and target["boxes"].dtype == torch.float32
    )
    assert len(target["labels"]) == len(target["boxes"]) and target["labels"].dtype == torch.int64
    assert (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all()
    for mask, label in zip(target["masks"], target["labels"], strict=True):
        if mask.sum() > 30:  # red discs, blue boxes, whatever was done
            red, _, blue = image[:, mask].float().mean(1)
            assert (red > blue) == bool(label)


def test_the_frame_holds_the_picture_top_left_and_grey_beside_it():
    image, target = seen(0, **still())  # 96 x 128 -> 48 x 64
    assert (image[:, 48:] == 128).all() and not (image[:, :48] == 128).all()
    assert not target["masks"][:, 48:].any() and len(target["boxes"]) == 4
    image, _ = seen(1, **still())  # 90 x 60 -> 64 x 43
    assert (image[:, :, 43:] == 128).all() and not (image[:, :, 42] == 128).all()
    assert (seen(1, **still(pad=7))[0][:, :, 43:] == 7).all()


def test_pictures_and_masks_are_what_transforms_v2_makes_of_them():
    _torchvision_compat.install()
    from torchvision.transforms.v2 import InterpolationMode, functional
    from torchvision.tv_tensors import Mask

    for k, step in ((0, 0), (1, 1), (2, 2)):
        for flip in (0.0, 1.0):
            image, target = seen(k, step, scale=(1.7, 1.7), flip=flip)
            picture, truth = IMAGES[k]
            masks = Mask(truth.masks().to(torch.uint8))
            if flip:
                picture, masks = functional.horizontal_flip(picture), functional.horizontal_flip(masks)
            size = list(fitted(*truth.size, 64 * 1.7))
            picture = functional.resize(picture, size, antialias=True)
            masks = functional.resize(masks, size, interpolation=InterpolationMode.NEAREST_EXACT)
            rng = stream(0, "test", step)
            draws = [float(torch.rand((), generator=rng)) for _ in range(3)]
            top, left = (round(max(0, side - 64) * draws[2]) for side in size)
            picture, masks = picture[:, top : top + 64, left : left + 64], masks[:, top : top + 64, left : left + 64]
            assert torch.equal(image[:, : picture.shape[1], : picture.shape[2]], picture)
            masks = masks.bool()[masks.flatten(1).bool().any(1)]
            assert torch.equal(target["masks"][:, : masks.shape[1], : masks.shape[2]], masks)


def test_mirrored_twice_is_as_before():
    image, target = seen(0, **still())
    picture, truth = IMAGES[0]
    turned = Objects.from_masks(truth.masks().flip(2), truth.labels)
    views = DetectTraining(DetectViews(size=64, **still(flip=1.0)), IMAGES)
    again = views(picture.flip(2), turned, stream(0, "test", 0))
    assert torch.equal(again[0], image)
    assert all(torch.equal(again[1][key], target[key]) for key in target)
    mirrored = seen(0, **still(flip=1.0))[1]["boxes"]  # halved, so that every pixel has two that are nearest
    assert (mirrored[:, [2, 0]] - (64 - target["boxes"][:, [0, 2]])).abs().max() <= 1
    assert torch.equal(mirrored[:, [1, 3]], target["boxes"][:, [1, 3]])


def test_the_size_is_drawn_evenly_and_crops_go_everywhere():
    picture, truth = IMAGES[0]
    views = DetectTraining(DetectViews(size=32, scale=(0.5, 1.5), flip=0.5), IMAGES)
    widths, mirrored = [], []
    for step in range(400):
        rng = stream(1, "test", step)
        mirrored.append(float(torch.rand((), generator=rng)) < 0.5)
        widths.append(0.5 + float(torch.rand((), generator=rng)))
        image, _ = views(picture, truth, stream(1, "test", step))
        shown = int((image != 128).any(0).any(0).sum())
        assert shown == min(32, fitted(96, 128, 32 * widths[-1])[1])
    assert 0.4 < sum(mirrored) / 400 < 0.6 and min(widths) < 0.52 and max(widths) > 1.48


def test_crowds_and_boxes_without_an_inside_are_no_targets():
    truth = PICTURES[0][1]
    crowd, boxes = torch.tensor([True, False, False, False]), truth.boxes.clone()
    boxes[1, 2] = boxes[1, 0]
    odd = Objects(boxes, truth.labels, crowd, truth.area, truth.outlines, truth.size)
    views = DetectTraining(DetectViews(size=64, **still()), IMAGES)
    _, target = views(IMAGES[0][0], odd, stream(0, "test"))
    assert torch.equal(target["labels"], truth.labels[2:])


def test_a_picture_without_objects_has_an_empty_target():
    image, truth = shapes(40, 60, 0)
    views = DetectTraining(DetectViews(size=32), IMAGES)
    _, target = views(torch.from_numpy(image).permute(2, 0, 1), truth, stream(0, "test"))
    assert {key: tuple(value.shape) for key, value in target.items()} == {
        "boxes": (0, 4), "labels": (0,), "masks": (0, 32, 32),
    }  # fmt: skip


def test_the_same_draws_give_the_same_bytes():
    (image, target), (other, again) = seen(0, 3), seen(0, 3)
    assert torch.equal(image, other) and all(torch.equal(target[key], again[key]) for key in target)
    assert not torch.equal(seen(0, 4)[0], image)


def test_the_test_view():
    padding = torch.tensor([0.1, 0.2, 0.3])
    image = IMAGES[1][0]
    framed, size = test_view(image, 48, padding)
    assert size == (48, 32) and framed.shape == (3, 48, 48)
    assert torch.equal(framed[:, :, :32], resized(image, size).float() / 255)
    assert torch.equal(framed[:, :, 32:], padding.view(3, 1, 1).expand(3, 48, 16))


def test_the_long_side_becomes_the_frames():
    assert (
        fitted(480, 640, 1024) == (768, 1024)
        and fitted(640, 427, 1024) == (1024, 683)
        and fitted(1, 900, 64) == (1, 64)
    )


def test_another_size_than_the_annotations_say_is_refused():
    views = DetectTraining(DetectViews(size=32), IMAGES)
    with pytest.raises(UserError, match="picture 101 is 96x100, its annotations say 96x128"):
        views(IMAGES[0][0][:, :, :100], IMAGES[0][1], stream(0, "test"))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (2.0, 1.0), (-1, 1)])
def test_wrong_scales_are_refused(scale):
    with pytest.raises(ValueError, match="the smaller one first"):
        DetectViews(scale=scale)


def test_without_a_package_that_scores_no_training_begins(monkeypatch):
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'diffrep\[detect\]'"):
        DetectTraining(DetectViews(), IMAGES)
