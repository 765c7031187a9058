"""Random resized crops that can be counted: pytest tests/data/test_crops.py"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chi2_contingency

from diffrep import _torchvision_compat
from diffrep.data.crops import ResizedCrops, resized, resized_cubic
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


def official_crop(image, place, size):
    """What the official loaders do with a box: torchvision's crop and bicubic resize of a Pillow image."""
    _torchvision_compat.install()
    from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

    opened = Image.fromarray(image.permute(1, 2, 0).numpy())
    shown = resized_crop(opened, *place, size=size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(24, 31), (64, 64), (3, 5), (1, 1)])
def test_bicubic_crops_are_those_of_the_official_loaders_to_a_level(height, width):
    images, (index, view) = some_images(100, height, width), keys(4, 100)
    crops = ResizedCrops(1000, 0.2, is_bicubic=True)
    boxes = crops.boxes(index, view, height, width)
    expected = images.clone()
    for row in range(100):
        place = [int(side[row]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        crop = official_crop(images[row], place, [height, width])
        expected[row] = crop.flip(-1) if boxes.is_flipped[row] else crop
    error = (crops.show(images, view, index).int() - expected.int()).abs()
    assert error.max() <= 1 and error.float().mean() < 0.005


def test_bicubic_crops_of_floats_are_torchvisions():
    _torchvision_compat.install()
    from torchvision.transforms.v2.functional import InterpolationMode, resized_crop

    images, (index, view) = some_images(40, 24, 31, torch.float32), keys(5, 40)
    boxes = ResizedCrops(1000).boxes(index, view, 24, 31)
    shown = resized_cubic(images, boxes)
    for row in range(40):
        place = [int(side[row]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        expected = resized_crop(
            images[row], *place, size=[24, 31], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        expected = expected.flip(-1) if boxes.is_flipped[row] else expected
        torch.testing.assert_close(shown[row], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("least_area", [0.2, 0.6])
def test_areas_and_ratios_follow_torchvisions_law(least_area):
    """Two samples in ten bins each; a wrong least area, or none, is told from the right one."""
    _torchvision_compat.install()
    from torchvision.transforms.v2 import RandomResizedCrop

    count, side = 4000, 64
    index = torch.arange(count)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop, image = RandomResizedCrop(side, scale=(least_area, 1.0)), torch.zeros(3, side, side)
        drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[box["height"], box["width"]] for box in drawn], dtype=torch.float64)

    def unlikely(least):
        boxes = ResizedCrops(5, least).boxes(index, index % 5, side, side)
        ours = torch.stack([boxes.height, boxes.width], 1)
        return min(
            chi_square(of(ours), of(theirs)) for of in (lambda b: b.prod(1), lambda b: (b[:, 1] / b[:, 0]).log())
        )

    assert unlikely(least_area) > 0.01 and unlikely(0.08) < 1e-6


def chi_square(ours, theirs):
    """The p-value that two samples are of one law."""
    edges = torch.cat([ours, theirs]).quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    counts = [np.bincount(torch.bucketize(values, edges).numpy(), minlength=10) for values in (ours, theirs)]
    return chi2_contingency(counts).pvalue


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
@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.int64]),
    st.sampled_from(["resized_crop:1000", "resized_crop:1000:0.2:bicubic"]),
)
def test_a_row_depends_on_image_index_and_view_alone(seed, dtype, text):
    augment, images = augmentation(text), some_images(6, dtype=dtype)
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
    texts = ("resized_crop:5", "resized_crop:1000000", "resized_crop:5:0.08")
    few, many, spelled = (augmentation(text).apply(images, view, index) for text in texts)
    assert torch.equal(few, many) and torch.equal(few, spelled)


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
    for shown in (resized(images, full), resized_cubic(images, full)):
        assert torch.equal(shown[::2], images[::2]) and torch.equal(shown[1::2], images[1::2].flip(-1))
