"""RandAugment, erasing, mixup and cutmix by (seed, step, row): pytest tests/data/test_timm_views.py"""

import numpy as np
import pytest
import torch

from diffrep import _torchvision_compat
from diffrep.config import validate
from diffrep.data.batch import Mixture
from diffrep.data.datasets import DataConfig, ImageSet
from diffrep.data.feed import Feed
from diffrep.data.timm_views import TimmConfig, TimmViews, mixed
from diffrep.errors import UserError
from diffrep.randomness import seeded

_torchvision_compat.install()

CPU = torch.device("cpu")
OFFICIAL = TimmConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)


def image_set(count=12, labels=True):
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return ImageSet("tiny", "train", ("a", "b", "c"), "ours", pixels, torch.arange(count) % 3 if labels else None)


def feed(config, batch_size=6, seed=5, augment="flip"):
    return Feed(image_set(), DataConfig(source="digits", augment=augment), batch_size, seed, None, config)


def whole(made, step):
    return made.batch(step, list(range(made.batch_size)), CPU)


@pytest.mark.parametrize("config", [OFFICIAL, TimmConfig(rand_augment="rand-m9-mstd0.5-inc1"), TimmConfig(cutmix=1.0)])
def test_a_row_is_the_same_in_any_part_of_its_batch(config):
    made = feed(config)
    for step in range(4):
        together = whole(made, step)
        for rows in ([0, 1, 2], [5, 3], [4]):
            torch.randn(3), np.random.rand()  # what others draw matters nothing
            part = made.batch(step, rows, CPU)
            assert torch.equal(part.images, together.images[rows]) and torch.equal(part.labels, together.labels[rows])
            assert torch.equal(part.index, together.index[rows]) and torch.equal(part.view, together.view[rows])
            if together.target is not None:
                assert torch.equal(part.target.labels, together.target.labels[rows])
                assert part.target.share == together.target.share


def test_draws_are_of_seed_step_and_row():
    config = TimmConfig(rand_augment="rand-m9-mstd0.5-inc1")
    image = image_set().gather(torch.tensor([0]))[0] / 255
    shown = {key: TimmViews(config, 64, key[0]).changed(image, *key[1:]) for key in [(5, 0, row) for row in range(20)]}
    assert all(torch.equal(value, TimmViews(config, 8, 5).changed(image, *key[1:])) for key, value in shown.items())
    assert len({value.numpy().tobytes() for value in shown.values()}) > 10  # rows have draws of their own
    others = [TimmViews(config, 64, 6).changed(image, 0, 1), TimmViews(config, 64, 5).changed(image, 1, 1)]
    assert not any(torch.equal(shown[5, 0, 1], other) for other in others)


def test_rand_augment_is_timms():
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    image = image_set().gather(torch.tensor([3]))[0]
    settings = {"translate_const": 7, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    views = TimmViews(TimmConfig(rand_augment="rand-m9-mstd0.5-inc1"), 64, 5)
    for row in range(10):
        with seeded(5, "timm view", 2, row):
            theirs = np.array(transform(Image.fromarray(image.permute(1, 2, 0).numpy())))
        ours = views.changed(image / 255, 2, row) * 255
        assert torch.equal(ours.round().to(torch.uint8), torch.from_numpy(theirs).permute(2, 0, 1))


def test_erasing_puts_noise_over_a_box_and_leaves_the_rest_its_bits():
    views, image = TimmViews(TimmConfig(erasing=0.25), 64, 5), torch.rand(3, 16, 16)
    found = [views.changed(image, 0, row) for row in range(400)]
    erased = [new != image for new in found]
    hit = [each for each in erased if each.any()]
    assert 70 < len(hit) < 130  # a quarter of 400, with four deviations of 8.7
    for each in hit:
        rows, columns = each.any(0).any(1).nonzero()[:, 0], each.any(0).any(0).nonzero()[:, 0]
        area = int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1)
        assert each.sum() == 3 * area and 0.01 * 256 < area < 0.4 * 256
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    noise = torch.cat(
        [((new.permute(1, 2, 0) - mean) / std)[new[0] != image[0]] for new in found if (new != image).any()]
    )
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)


def mixtures(config, steps=60):
    return [TimmViews(config, 6, 5).mixture(step, 16, 16) for step in range(steps)]


@pytest.mark.parametrize(
    "alphas", [{"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "mix_prob": 0.5}]
)
def test_a_mixed_batch_is_timms(alphas):
    """Images and soft targets of timm's Mixup in mode "batch", drawing in the same state."""
    from timm.data import Mixup

    config, plain = TimmConfig(**alphas), whole(feed(None), 3)
    theirs = Mixup(
        config.mixup, config.cutmix, prob=config.mix_prob, switch_prob=config.switch_prob, label_smoothing=0.1,
        num_classes=3,
    )  # fmt: skip
    for step in range(8):
        with seeded(5, "timm mixture", step):
            images, target = theirs(plain.images.clone(), plain.labels)
        share, box = TimmViews(config, 6, 5).mixture(step, 16, 16)
        other = feed(None).batch(3, [5, 4, 3, 2, 1, 0], CPU)
        ours = mixed(plain, other, share, box)
        torch.testing.assert_close(ours.images, images)
        soft = torch.nn.functional.one_hot(torch.stack([ours.labels, ours.target.labels]), 3) * 0.9 + 0.1 / 3
        ours_target = ours.target.share * soft[0] + (1 - ours.target.share) * soft[1]
        torch.testing.assert_close(ours_target, target)
        torch.testing.assert_close(ours_target.sum(1), torch.ones(6))


def test_shares_and_boxes_belong_together():
    found = mixtures(TimmConfig(mixup=0.8, cutmix=1.0))
    boxes = [(share, box) for share, box in found if box]
    assert 15 < len(boxes) < 45  # half of 60
    for share, (top, bottom, left, right) in boxes:
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 256)
    assert all(0 <= share <= 1 for share, _ in found)
    assert not [box for _, box in mixtures(TimmConfig(mixup=0.8)) if box]
    assert {share for share, _ in mixtures(TimmConfig(mixup=0.8, mix_prob=0.0))} == {1.0}


def test_partners_come_from_the_other_end():
    made, plain = feed(TimmConfig(mixup=0.8)), whole(feed(None), 1)
    batch = whole(made, 1)
    assert isinstance(batch.target, Mixture) and torch.equal(batch.target.labels, plain.labels.flip(0))
    share = batch.target.share
    torch.testing.assert_close(batch.images, plain.images * share + plain.images.flip(0) * (1 - share))
    assert torch.equal(batch.labels, plain.labels) and torch.equal(batch.index, plain.index)


def test_without_labels_there_is_no_target():
    made = Feed(image_set(labels=False), DataConfig(source="digits"), 6, 5, None, TimmConfig(mixup=0.8))
    assert whole(made, 0).labels is None and whole(made, 0).target is None


def test_held_out_images_stay_as_they_are():
    (batch,) = feed(OFFICIAL).sweep(64, CPU)
    assert torch.equal(batch.images, image_set().gather(torch.arange(12)) / 255) and batch.target is None


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, "does nothing"),
        ({"rand_augment": "rand-x3"}, "rand_augment"),
        ({"rand_augment": "augmix-m3"}, "rand_augment"),
        ({"erasing": 1.5}, "erasing"),
        ({"mixup": -1}, "mixup"),
    ],
)
def test_what_means_nothing_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        validate(TimmConfig, values, "here")
