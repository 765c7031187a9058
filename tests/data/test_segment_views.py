"""What is done to pictures with masks before a network sees them: pytest tests/data/test_segment_views.py"""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from diffrep.config import validate
from diffrep.data import segment_views as views
from diffrep.data.dense import DensePart, DenseRead, DenseSet
from diffrep.data.segment_views import SegmentTraining, SegmentViews
from diffrep.errors import UserError
from diffrep.randomness import stream

MIRRORED = ((2, 3), (4, 5), (7, 8))  # of RepFusion's label order
MEAN = (0.485, 0.456, 0.406)  # of a student
SMALL = {"base": (40, 40), "crop": 24}
PLAIN = {**SMALL, "ratio_range": (1.0, 1.0), "colour": "none", "cat_max_ratio": 1.0}


def training(**settings):
    part = DensePart(["0"], lambda i: b"", lambda i: None)
    read = DenseRead(tuple("abcdefghi"), {"train": part}, MIRRORED)
    images = DenseSet("faces", "train", read, part, torch.tensor([0]), "none")
    return SegmentTraining(validate(SegmentViews, settings, "views"), images, MEAN)


def picture(seed, height=40, width=40):
    """An image, and a mask of nine classes with some ignored."""
    rng = stream(seed, "picture")
    image = torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
    mask = torch.randint(0, 10, (height, width), generator=rng, dtype=torch.uint8)
    return image, torch.where(mask == 9, 255, mask)


seeds = st.integers(0, 10_000)
sides = st.integers(1, 90)


# The view as a whole


@settings(max_examples=60, deadline=None)
@given(seeds, sides, sides, st.sampled_from(["photometric", "jitter", "none"]))
def test_a_view_has_its_size_range_and_labels(seed, height, width, colour):
    image, mask = training(**SMALL, colour=colour)(*picture(seed, height, width), stream(seed, "view"))
    assert image.shape == (3, 24, 24) and image.dtype == torch.float32
    assert mask.shape == (24, 24) and mask.dtype == torch.uint8
    assert image.min() >= 0 and image.max() <= 1
    assert set(mask.unique().tolist()) <= {*range(9), 255}


def test_equal_draws_give_equal_bytes_and_others_differ():
    view = training(**SMALL)
    one, two, other = (view(*picture(0), stream(0, "view", k)) for k in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_nothing_global_is_drawn():
    view, before = training(**SMALL), torch.get_rng_state()
    view(*picture(0), stream(0, "view"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mask_stays_on_its_picture():
    """A picture whose red tells its class: what red a pixel has in a view, and what its label is, still agree."""
    mask = torch.arange(8, dtype=torch.uint8).repeat_interleave(5).repeat_interleave(5).view(8, 5, 5)
    mask = mask.permute(1, 0, 2).reshape(5, 40).repeat_interleave(8, 0)  # eight upright stripes
    image = (mask[None] * 30).expand(3, -1, -1).contiguous()
    view = training(**{**PLAIN, "swap_mirrored": False}, flip=0.5)
    for k in range(20):
        seen, labels = view(image, mask, stream(k, "view"))
        assert torch.equal((seen[0] * 255 / 30).round().to(torch.uint8), labels)


def test_collated_targets_are_class_numbers():
    masks = [picture(seed)[1] for seed in range(3)]
    together = training().collate(masks)
    assert together.dtype == torch.int64 and torch.equal(together, torch.stack(masks).long())


# Sizes


@pytest.mark.parametrize(
    ("size", "base", "ratio", "expected"),
    [
        ((1024, 1024), (512, 512), 1.0, (512, 512)),
        ((1024, 1024), (512, 512), 0.7, (358, 358)),  # int(512 * 0.7) = 358
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((300, 400), (2048, 512), 1.0, (512, 683)),  # 400 * 512 / 300 = 682.67
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the long side decides
        ((683, 512), (2048, 512), 0.5, (342, 256)),  # 683 * 256 / 512 = 341.5
        ((1, 4000), (512, 512), 1.0, (1, 512)),
    ],
)
def test_a_picture_is_fitted_into_the_frame(size, base, ratio, expected):
    assert views.fitted(*size, base, ratio) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.1, 3))
def test_a_fitted_picture_is_inside_the_frame_and_touches_it(height, width, ratio):
    base = (2048, 512)
    h, w = views.fitted(height, width, base, ratio)
    long, short = int(2048 * ratio), int(512 * ratio)
    assert max(h, w) <= long and min(h, w) <= max(short, 1)
    assert max(h, w) == long or min(h, w) == short


def test_ratios_are_drawn_from_the_range_or_from_the_list():
    drawn = {training()._ratio(stream(k, "ratio")) for k in range(200)}
    assert 0.5 <= min(drawn) < 0.55 and 1.95 < max(drawn) <= 2
    few = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    assert {training(ratios=few)._ratio(stream(k, "ratio")) for k in range(200)} == set(few)


def test_masks_take_the_nearest_label_and_images_are_interpolated():
    mask = torch.tensor([[0, 255], [7, 3]], dtype=torch.uint8)
    assert torch.equal(views.resized_mask(mask, (4, 4)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    image = torch.tensor([[0, 255]], dtype=torch.uint8).expand(3, 1, 2)
    assert views.resized(image, (1, 4))[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1], abs=1 / 255)


def test_images_of_another_size_than_their_mask_end_in_one():
    """CelebAMask-HQ: photographs of 1024 pixels, masks of 512."""
    image, mask = training(**PLAIN)(picture(0, 80, 80)[0], picture(0, 40, 40)[1], stream(0, "view"))
    assert image.shape[1:] == mask.shape == (24, 24)


# Crops


@settings(max_examples=100, deadline=None)
@given(seeds, sides, sides, st.integers(1, 50))
def test_a_crop_is_never_beyond_the_picture(seed, height, width, side):
    rows, columns = views.chosen_crop(picture(seed, height, width)[1], side, 0.75, stream(seed, "crop"))
    assert rows.start >= 0 and rows.stop <= height and rows.stop - rows.start == min(side, height)
    assert columns.start >= 0 and columns.stop <= width and columns.stop - columns.start == min(side, width)


def test_every_place_is_reached():
    mask = picture(0, 6, 5)[1]
    starts = {
        (rows.start, columns.start)
        for rows, columns in (views.chosen_crop(mask, 4, 1, stream(k, "c")) for k in range(200))
    }
    assert starts == {(top, left) for top in range(3) for left in range(2)}


def shares(mask):
    counts = torch.bincount(mask.flatten().long(), minlength=256)[:255]
    return counts[counts > 0] / counts.sum()


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.5, 0.9))
def test_no_class_fills_too_much_of_a_crop(seed, most):
    """Half of the picture is one class: among eleven tries one straddles the border nearly always."""
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    mask[:, 16:] = torch.randint(1, 6, (40, 24), generator=stream(seed, "right"), dtype=torch.uint8)
    mask[:4] = 255
    rows, columns = views.chosen_crop(mask, 20, most, stream(seed, "crop"))
    found = shares(mask[rows, columns])
    assert len(found) > 1 and found.max() < most


def test_the_last_of_eleven_tries_is_taken_where_none_fits():
    class Counted(torch.Tensor):
        """A mask that counts how often it is looked at."""

        looks = 0

        def __getitem__(self, index):
            Counted.looks += 1
            return super().__getitem__(index).as_subclass(torch.Tensor)

    mask = torch.full((30, 30), 4, dtype=torch.uint8).as_subclass(Counted)
    rows, _ = views.chosen_crop(mask, 20, 0.75, stream(0, "crop"))
    assert Counted.looks == 11 and rows.stop - rows.start == 20


def test_ignored_pixels_do_not_count_as_a_class():
    mask = torch.full((4, 4), 255, dtype=torch.uint8)
    mask[0] = 1
    assert not views._is_varied(mask, 1.0)  # one class only
    mask[1, 0] = 2
    assert views._is_varied(mask, 0.81) and not views._is_varied(mask, 0.8)  # 4 of 5


# Mirror images


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_mirroring_twice_changes_nothing(seed):
    image, mask = picture(seed)
    table = views.exchange(MIRRORED)
    again = views.mirror(*views.mirror(image, mask, table), table)
    assert torch.equal(again[0], image) and torch.equal(again[1], mask)


def test_exactly_the_pairs_are_exchanged():
    labels = torch.arange(256, dtype=torch.uint8)
    table = views.exchange(MIRRORED)
    moved = {(k, int(table[k])) for k in range(256) if int(table[k]) != k}
    assert moved == {(2, 3), (3, 2), (4, 5), (5, 4), (7, 8), (8, 7)}  # dense.md section 7
    _, mask = views.mirror(torch.zeros(3, 1, 256), labels[None], table)
    assert torch.equal(mask[0].flip(0), table)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_mirrored_view_exchanges_labels_where_it_is_asked_to(swaps):
    image, mask = picture(0, 24, 24)
    view = training(**PLAIN | {"base": (24, 24)}, flip=1.0, swap_mirrored=swaps)
    seen, labels = view(image, mask, stream(0, "view"))
    table = views.exchange(MIRRORED if swaps else ())
    assert torch.equal(labels, table[mask.flip(1).long()])
    assert torch.equal(seen, image.flip(2).float() / 255)


def test_half_of_the_views_are_mirrored():
    image, mask = picture(0, 24, 24)
    view = training(**PLAIN | {"base": (24, 24)})
    plain = image.float() / 255
    kept = sum(torch.equal(view(image, mask, stream(k, "view"))[0], plain) for k in range(400))
    assert 160 < kept < 240  # 200 +- 4 standard deviations


# Padding


def test_padding_is_the_mean_colour_and_ignored():
    """Below and to the right; the backbone subtracts the same colour, so that it sees zeros there."""
    image, mask = picture(0, 10, 40)
    seen, labels = training(**PLAIN)(image, mask.clamp(max=8), stream(0, "view"))
    colour = torch.tensor(MEAN)
    assert (labels[10:] == 255).all() and (labels[:10] != 255).all()
    assert torch.equal(seen[:, 10:], colour[:, None, None].expand(3, 14, 24))


# Colours


def test_ignored_labels_and_colours_have_nothing_to_do_with_each_other():
    image, mask = picture(0, 24, 24)
    plain = training(**PLAIN | {"base": (24, 24)}, flip=0.0)(image, mask, stream(0, "view"))
    for colour in ("photometric", "jitter"):
        seen, labels = training(**PLAIN | {"base": (24, 24), "colour": colour}, flip=0.0)(
            image, mask, stream(0, "view")
        )
        assert torch.equal(labels, mask) and torch.equal(plain[1], mask)
        assert not torch.equal(seen, plain[0])


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(0, 1, width=32)] * 3), st.floats(0.5, 1.5))
def test_saturation_is_that_of_hsv(colour, factor):
    """Against Python's own colorsys."""
    found = views.saturated(torch.tensor(colour)[:, None, None], factor).flatten().tolist()
    h, s, v = colorsys.rgb_to_hsv(*colour)
    assert found == pytest.approx(colorsys.hsv_to_rgb(h, min(s * factor, 1), v), abs=1e-5)


def test_photometric_changes_each_in_half_of_the_images():
    """A red on which every one of the four changes shows in a number of its own."""
    image = torch.tensor([0.5, 0.3, 0.3])[:, None, None]
    hues, values, saturations = [], [], []
    for k in range(600):
        h, s, v = colorsys.rgb_to_hsv(*views.photometric(image, stream(k, "colour")).flatten().tolist())
        hues.append(((h + 0.5) % 1) - 0.5)
        values.append(v)
        saturations.append(s)
    still = sum(abs(h) < 1e-4 for h in hues)
    assert 260 < still < 360  # half, and one in 36 of the other half
    assert max(map(abs, hues)) == pytest.approx(0.1, abs=1e-4)  # 18 of 180
    unchanged = sum(abs(v - 0.5) < 1e-5 for v in values)
    assert 105 < unchanged < 195  # neither brightness nor contrast: a quarter
    assert min(values) > 0.5 * (0.5 - 32 / 255) * 0.5 and max(values) <= 1.5 * (0.5 + 32 / 255)
    assert min(saturations) < 0.25 and max(saturations) > 0.5  # 0.4 times 0.5 and 1.5, and more after brightness


def test_jitter_is_what_pillow_does():
    image = picture(3)[0]
    seen = views.jitter(image.float() / 255, stream(5, "jitter"))
    rng = stream(5, "jitter")
    expected = Image.fromarray(image.permute(1, 2, 0).numpy())
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        expected = enhance(expected).enhance(views._uniform(rng, 0.5, 1.5))
    off = np.abs((seen * 255).permute(1, 2, 0).numpy() - np.asarray(expected, dtype=float))
    assert off.max() < 5 and off.mean() < 2  # of 255: Pillow cuts to whole numbers thrice


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": (512, 2048)}, "the long side comes first"),
        ({"ratio_range": (2.0, 0.5)}, "the smaller one first"),
        ({"ratios": (0.0, 1.0)}, "above 0"),
        ({"test_ratios": ()}, "at least one"),
        ({"stride": 600}, "would leave gaps"),
        ({"crop": 0}, "crop = 0"),
        ({"colour": "grey"}, "colour = 'grey'"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(UserError) as caught:
        validate(SegmentViews, settings, "views")
    assert words in str(caught.value)


def test_the_defaults_are_those_of_repfusion():
    views = SegmentViews()
    assert (views.base, views.ratio_range, views.crop, views.cat_max_ratio, views.flip) == (
        (512, 512), (0.5, 2.0), 448, 0.75, 0.5,
    )  # fmt: skip
