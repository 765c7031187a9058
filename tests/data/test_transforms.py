"""Properties of the enumerable views: pytest tests/data/test_transforms.py"""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep.data.transforms import augmentation
from diffrep.errors import UserError

TEXTS = ("none", "flip", "shift:1", "shift:3", "crop_flip:1", "crop_flip:2", "alternate_flip", "alternate_flip:2")
texts = st.sampled_from(TEXTS)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.uint8, torch.float32, torch.float16, torch.int64])


def some_images(seed: int, count: int = 5, dtype: torch.dtype = torch.uint8, height: int = 6, width: int = 7):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 3, height, width), generator=rng).to(dtype)


def some_views(seed: int, num_views: int, count: int = 5):
    return torch.randint(0, num_views, (count,), generator=torch.Generator().manual_seed(seed))


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """torch.roll with what came round the edge set to zero."""
    rolled = image.roll((down, right), dims=(-2, -1))
    rows, columns = torch.arange(image.shape[-2]) - down, torch.arange(image.shape[-1]) - right
    inside = ((rows >= 0) & (rows < len(rows)))[:, None] & ((columns >= 0) & (columns < len(columns)))
    return rolled * inside


@pytest.mark.parametrize(
    ("text", "count"),
    [("none", 1), ("flip", 2), ("shift:2", 25), ("crop_flip:4", 162), ("alternate_flip", 2), ("alternate_flip:2", 50)],
)
def test_number_of_views(text, count):
    assert augmentation(text).num_views == count and augmentation(text).text == text


@settings(deadline=None, max_examples=30)
@given(texts, seeds, dtypes)
def test_view_0_is_the_untouched_image(text, seed, dtype):
    images = some_images(seed, dtype=dtype)
    shown = augmentation(text).apply(images, torch.zeros(5, dtype=torch.int64))
    assert shown.dtype == dtype and torch.equal(shown, images)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_flip_twice_is_the_identity(seed):
    images, flip, mirrored = some_images(seed), augmentation("flip"), torch.ones(5, dtype=torch.int64)
    once = flip.apply(images, mirrored)
    assert torch.equal(once, images.flip(-1)) and torch.equal(flip.apply(once, mirrored), images)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 4))
def test_shift_is_roll_with_zero_fill(seed, reach):
    image, shift = some_images(seed, 1)[0], augmentation(f"shift:{reach}")
    shown = shift.apply(image.expand(shift.num_views, -1, -1, -1), torch.arange(shift.num_views))
    offsets = [0, *(sign * k for k in range(1, reach + 1) for sign in (1, -1))]
    expected = torch.stack([shifted(image, down, right) for down in offsets for right in offsets])
    assert torch.equal(shown, expected)


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_crop_flip_is_the_mirrored_shift(seed):
    images, both, shift = some_images(seed), augmentation("crop_flip:2"), augmentation("shift:2")
    view = some_views(seed, shift.num_views)
    assert torch.equal(both.apply(images, view), shift.apply(images, view))
    assert torch.equal(both.apply(images, view + 25), shift.apply(images, view).flip(-1))


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 5))
def test_an_alternating_flips_shift_is_a_crop_of_reflect_padding(seed, reach):
    image, augment = some_images(seed, 1), augmentation(f"alternate_flip:{reach}")
    padded = numpy.pad(image[0].numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    offsets = [0, *(sign * k for k in range(1, reach + 1) for sign in (1, -1))]
    corners = [(reach - down, reach - right) for down in offsets for right in offsets]
    expected = numpy.stack([padded[:, top : top + 6, left : left + 7] for top, left in corners])
    half = augment.num_views // 2
    shown = augment.apply(image.expand(augment.num_views, -1, -1, -1), torch.arange(augment.num_views))
    assert numpy.array_equal(shown[:half], expected) and numpy.array_equal(shown[half:], expected[..., ::-1])


@settings(deadline=None, max_examples=30)
@given(texts, seeds)
def test_a_row_does_not_depend_on_the_batch(text, seed):
    images, augment = some_images(seed), augmentation(text)
    view = some_views(seed, augment.num_views)
    together = augment.apply(images, view)
    for row in range(5):
        assert torch.equal(augment.apply(images[row : row + 1], view[row : row + 1])[0], together[row])


@pytest.mark.parametrize("text", TEXTS)
def test_all_views_of_a_generic_image_differ(text):
    augment = augmentation(text)
    images = some_images(0, 1).expand(augment.num_views, -1, -1, -1)
    shown = augment.apply(images, torch.arange(augment.num_views)).flatten(1)
    assert len({tuple(row) for row in shown.tolist()}) == augment.num_views


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("resized_crop:20", 20), ("resized_crop:20:0.2", 20), ("resized_crop:20:bicubic", 20), ("mixup:5", 5),
        ("resized_crop:20:0.05:bicubic+mixup:5", 100), ("cutmix:1", 1), ("crop_flip:4+cutmix:10", 1620),
        ("resized_crop:20+mixup:5", 100), ("flip+mixup:1000000", 2_000_000),
        ("crop_flip:99999+cutmix:1000000", 2 * 199_999**2 * 1_000_000),
    ],
)  # fmt: skip
def test_number_of_views_of_what_is_joined(text, count):
    assert augmentation(text).num_views == count < 2**63 and augmentation(text).text == text


@pytest.mark.parametrize(
    "text",
    [
        "", "flop", "shift", "shift:0", "shift:-1", "shift:1.5", "crop_flip:x", "Flip", "flip:1", "resized_crop",
        "resized_crop:0", "resized_crop:1000001", "resized_crop:2:0", "resized_crop:2:0.00", "resized_crop:2:1",
        "resized_crop:2:1.5", "resized_crop:2:-0.2", "resized_crop:2:.2", "resized_crop:2:0.2:cubic",
        "resized_crop:2:bicubic:0.2", "resized_crop:2:0.2:", "resized_crop:bicubic", "resized_crop:2:nan",
        "resized_crop:2:0.00:bicubic", "mixup:1000001", "mixup:1e3", "cutmix", "cutmix:01", "shift:100000",
        "flip+", "+mixup:2", "flip+flip", "mixup:2+cutmix:2", "cutmix:2+flip", "none+mixup:2", "mixup:2+mixup:2",
        "alternate_flip:0", "alternate_flip:", "flip+shift:1", "flip+mixup:2+cutmix:2", "flip + mixup:2", "flip+none",
    ],
)  # fmt: skip
def test_unknown_text_is_refused_with_what_is_valid(text):
    with pytest.raises(UserError, match="crop_flip:R") as caught:
        augmentation(text)
    assert "\n" not in str(caught.value)


def test_a_shift_as_wide_as_the_image_is_refused():
    with pytest.raises(UserError, match="6x7; R must be below 6"):
        augmentation("shift:6").apply(some_images(0), torch.zeros(5, dtype=torch.int64))
