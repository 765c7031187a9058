"""Random resized crops that can be counted: pytest tests/data/test_crops.py"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep import _torchvision_compat
from diffrep.data.crops import ResizedCrops, resized
from diffrep.data.transforms import augmentation


def some_images(count, height=9, width=7, dtype=torch.uint8):
    rng = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng).to(dtype)


def keys(seed, count, num_views=1000):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 10**6, (count,), generator=rng), torch.randint(0, num_views, (count,), generator=rng)


def test_crops_are_what_torchvision_resizes():
    _torchvision_compat.install()
    from torchvision.transforms.v2.functional import resized_crop

    images = some_images(40, 24, 31)
    index, view = keys(0, 40)
    boxes = ResizedCrops(1000).boxes(index, view, 24, 31)
    shown = resized(images.float(), boxes)
    for row in range(40):
        place = [int(side[row]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        expected = resized_crop(images[row].float(), *place, size=[24, 31], antialias=True)
        expected = expected.flip(-1) if boxes.is_flipped[row] else expected
        torch.testing.assert_close(shown[row], expected, atol=2e-3, rtol=0)
    assert torch.equal(resized(images, boxes), shown.round().to(torch.uint8))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60), (60, 20), (1, 1), (2, 3)])
def test_boxes_lie_in_the_image(height, width):
    index, view = keys(1, 5000)
    boxes = ResizedCrops(1000).boxes(index, view, height, width)
    for start, size, whole in ((boxes.top, boxes.height, height), (boxes.left, boxes.width, width)):
        assert bool((start >= 0).all() and (size >= 1).all() and (start + size <= whole).all())
        assert torch.equal(start, start.floor()) and torch.equal(size, size.floor())


def test_sizes_and_places_are_distributed_as_torchvision_draws_them():
    _torchvision_compat.install()
    from torchvision.transforms import RandomResizedCrop

    count, side = 4000, 64
    index = torch.arange(count)
    ours = ResizedCrops(5).boxes(index, index % 5, side, side)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(3, side, side)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)])
    top, left, height, width = theirs.double().unbind(1)
    for mine, other in [
        (ours.top, top), (ours.left, left), (ours.height, height), (ours.width, width),
        (ours.height * ours.width, height * width), ((ours.width / ours.height).log(), (width / height).log()),
    ]:  # fmt: skip
        error = math.sqrt((mine.var() + other.var()) / count)
        assert abs(mine.mean() - other.mean()) < 4 * error
        assert mine.std() == pytest.approx(float(other.std()), rel=0.05)
    assert float(ours.is_flipped.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(count))
    everything = torch.stack([ours.top, ours.left, ours.height, ours.is_flipped.double()])
    assert abs(torch.corrcoef(everything)[3, :3]).max() < 4 / math.sqrt(count)


def test_an_image_too_long_for_any_box_shows_the_largest_allowed_one_in_its_middle():
    """Of 10 x 200 pixels the smallest area, 160, is 11 high at the widest ratio: no drawn box ever fits."""
    index, view = keys(2, 50)
    boxes = ResizedCrops(1000).boxes(index, view, 10, 200)
    assert boxes.height.tolist() == [10] * 50 and boxes.width.tolist() == [13] * 50
    assert boxes.top.tolist() == [0] * 50 and boxes.left.tolist() == [93] * 50


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.int64]))
def test_a_row_depends_on_image_index_and_view_alone(seed, dtype):
    augment, images = augmentation("resized_crop:1000"), some_images(6, dtype=dtype)
    index, view = keys(seed, 6)
    together = augment.apply(images, view, index)
    assert together.dtype == dtype and together.shape == images.shape
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(augment.apply(images[order], view[order], index[order]), together[order])
    for row in range(6):
        alone = augment.apply(images[row : row + 1], view[row : row + 1], index[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_the_number_of_crops_decides_nothing_about_a_crop():
    images, (index, view) = some_images(30), keys(3, 30, num_views=5)
    few, many = (augmentation(f"resized_crop:{count}").apply(images, view, index) for count in (5, 1_000_000))
    assert torch.equal(few, many)


def test_views_of_an_image_and_images_of_a_view_differ():
    image = some_images(1, 32, 32)
    views = augmentation("resized_crop:50").apply(
        image.expand(50, -1, -1, -1), torch.arange(50), torch.zeros(50).long()
    )
    images = augmentation("resized_crop:50").apply(
        image.expand(50, -1, -1, -1), torch.zeros(50).long(), torch.arange(50)
    )
    both = torch.cat([views, images[1:]]).flatten(1)
    assert len(both.unique(dim=0)) == 99
    assert torch.equal(views[0], images[0]) and views.min() >= image.min() and views.max() <= image.max()


def test_a_whole_box_is_the_image_itself():
    images, whole = some_images(4), torch.tensor([9.0, 7.0]).double()
    index = torch.arange(4)
    boxes = ResizedCrops(1).boxes(index, index, 9, 7)
    full = type(boxes)(torch.zeros(4), torch.zeros(4), whole[0].expand(4), whole[1].expand(4), index % 2 == 1)
    shown = resized(images, full)
    assert torch.equal(shown[::2], images[::2]) and torch.equal(shown[1::2], images[1::2].flip(-1))
