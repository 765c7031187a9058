"""Mixup and CutMix as functions of (index, view): pytest tests/data/test_mixing.py"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep.data.mixing import BETA, Mixing
from diffrep.data.transforms import augmentation

KINDS = ("mixup", "cutmix")
JOINED = ("mixup:7", "cutmix:7", "flip+mixup:3", "crop_flip:2+cutmix:5", "resized_crop:20+mixup:5")


def some_images(count, seed=0, height=8, width=6, dtype=torch.uint8):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng).to(dtype)


def keys(count, num_views, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 10**5, (count,), generator=rng), torch.randint(0, num_views, (count,), generator=rng)


@pytest.mark.parametrize("text", JOINED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_row_depends_on_its_own_four_inputs_alone(text, dtype):
    augment = augmentation(text)
    images, others = some_images(9, 0, dtype=dtype), some_images(9, 1, dtype=dtype)
    index, view = keys(9, augment.num_views)
    together, partners = augment.apply(images, view, index, others), augment.partners(index, view, 500)
    assert together.dtype == dtype and together.shape == images.shape
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    for rows in (order, *torch.arange(9)[:, None]):
        alone = augment.apply(images[rows], view[rows], index[rows], others[rows])
        assert torch.equal(alone, together[rows])
        assert torch.equal(augment.partners(index[rows], view[rows], 500), partners[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_images", [1, 2, 3, 1000])
def test_partners_are_other_images_evenly(kind, num_images):
    index = torch.arange(20_000) % num_images
    partners = Mixing(kind, 100).partners(index, torch.arange(20_000) // num_images, num_images)
    assert partners.dtype == torch.int64 and 0 <= int(partners.min()) <= int(partners.max()) < num_images
    if num_images > 1:
        assert not bool((partners == index).any())
        steps = ((partners - index) % num_images).bincount(minlength=num_images)[1:].double()
        expected = 20_000 / (num_images - 1)
        assert float(((steps - expected) ** 2 / expected).sum()) < num_images + 5 * math.sqrt(2 * num_images)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_is_beta_distributed(kind):
    """Mean 1/2, variance 1/(4(2a+1)), and the quartile 1/4 lies where the distribution function says."""
    from scipy.stats import beta

    a, index = BETA[kind], torch.arange(20_000)
    assert a == {"mixup": 0.4, "cutmix": 0.25}[kind]
    share = Mixing(kind, 1).share(index, torch.zeros_like(index))
    assert 0 <= float(share.min()) <= float(share.max()) <= 1
    assert float(share.mean()) == pytest.approx(0.5, abs=4 * 0.4 / math.sqrt(20_000))
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.03)
    for x in (0.01, 0.1, 0.5, 0.9):
        assert float((share < x).double().mean()) == pytest.approx(beta.cdf(x, a, a), abs=0.015)


def test_mixup_is_the_weighted_mean_rounded():
    images, others = some_images(50, 0), some_images(50, 1)
    index, view = keys(50, 10)
    share = Mixing("mixup", 10).share(index, view)[:, None, None, None]
    mixed = augmentation("mixup:10").apply(images, view, index, others)
    exact = images.double() * share + others.double() * (1 - share)
    assert float((mixed.double() - exact).abs().max()) <= 0.5 + 1e-4
    assert torch.equal(augmentation("mixup:10").apply(images, view, index, images), images)


def test_cutmix_shows_the_other_image_in_one_box_of_the_right_area():
    count, height, width = 3000, 32, 24
    index, view = torch.arange(count), torch.zeros(count).long()
    zeros, ones = torch.zeros(count, 3, height, width, dtype=torch.uint8), torch.ones(count, 3, height, width)
    mixed = augmentation("cutmix:1").apply(zeros, view, index, ones.to(torch.uint8))
    assert torch.equal(mixed[:, 0], mixed[:, 2])
    is_other = mixed[:, 0].bool()
    rows, columns = is_other.any(2), is_other.any(1)
    assert torch.equal(is_other, rows[:, :, None] & columns[:, None, :])
    side = (1 - Mixing("cutmix", 1).share(index, view)).sqrt()
    for found, whole in ((rows, height), (columns, width)):
        wanted = torch.where(columns.any(1) & rows.any(1), (side * whole).round(), 0)
        assert bool((found.sum(1) <= wanted).all())  # cut at an edge
        inside = ~found[:, 0] & ~found[:, -1] & found.any(1)
        assert int(inside.sum()) > count / 8 and torch.equal(found.sum(1)[inside].double(), wanted[inside])
        gaps = (found.int().diff(dim=1) == 1).sum(1) + found[:, 0]
        assert bool((gaps <= 1).all())  # one stretch


def test_centres_of_cutmix_are_anywhere():
    """Every side of the image is covered as often as the one opposite, and a corner less often than the middle."""
    index = torch.arange(20_000)
    box = Mixing("cutmix", 1).box(index, torch.zeros_like(index), 8, 8).double().mean(0)
    mirrored = torch.stack([box, box.flip(0), box.flip(1), box.T])
    assert float((mirrored - mirrored.mean(0)).abs().max()) < 0.012  # four standard errors
    assert 0.1 < float(box[0, 0]) < 0.2 < 0.4 < float(box[4, 4]) < 0.5


@pytest.mark.parametrize("text", ["flip+mixup:3", "crop_flip:1+cutmix:4", "shift:1+mixup:2"])
def test_views_are_all_places_times_all_mixtures(text):
    first, second = text.split("+")
    places, mixing, joined = augmentation(first), augmentation(second), augmentation(text)
    assert joined.num_views == places.num_views * mixing.num_views
    images = some_images(1).expand(joined.num_views, -1, -1, -1)
    view, index = torch.arange(joined.num_views), torch.full((joined.num_views,), 5)
    black = torch.zeros_like(images)
    shown = joined.apply(images, view, index, black)
    placed = places.apply(images, view % places.num_views)
    if "cutmix" in text:
        assert bool(((shown == placed) | (shown == 0)).all())
    else:
        share = joined.mixing.share(index, view)[:, None, None, None]
        assert float((shown.double() - placed.double() * share).abs().max()) <= 0.5 + 1e-4


def test_the_partner_is_shown_in_a_place_of_its_own():
    augment, count = augmentation("flip+cutmix:1"), 400
    image = torch.arange(8, dtype=torch.uint8).expand(count, 3, 8, 8).contiguous()
    black = torch.zeros_like(image)
    index = torch.arange(count)
    shown = augment.apply(black, torch.zeros_like(index), index, image)
    is_mirrored = ((shown == image.flip(-1)) | (shown == 0)).flatten(1).all(1)
    is_straight = ((shown == image) | (shown == 0)).flatten(1).all(1)
    assert bool((is_mirrored | is_straight).all())
    clear = is_mirrored ^ is_straight
    assert float(is_mirrored[clear].double().mean()) == pytest.approx(0.5, abs=2.5 / math.sqrt(int(clear.sum())))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(JOINED), st.integers(0, 2**40), st.integers(1, 10**7))
def test_any_index_and_any_size_of_set_will_do(text, index, num_images):
    augment = augmentation(text)
    where, view = torch.tensor([index]), torch.tensor([augment.num_views - 1])
    assert 0 <= int(augment.partners(where, view, num_images)) < num_images
    assert augment.apply(some_images(1), view, where, some_images(1, 1)).shape == (1, 3, 8, 6)


def test_what_a_mixture_needs_has_to_be_there():
    images, view = some_images(2), torch.zeros(2).long()
    for text, given_ in (
        ("resized_crop:3", {}),
        ("mixup:3", {"index": view}),
        ("cutmix:3", {"partner_images": images}),
    ):
        with pytest.raises(ValueError, match="pass both"):
            augmentation(text).apply(images, view, **given_)
    assert augmentation("crop_flip:2").partners(view, view, 5) is None
    assert not augmentation("flip").needs_index and augmentation("resized_crop:1").needs_index
