"""Crops of faces, and the points in them: pytest tests/data/test_landmark_views.py"""

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from toy_faces import PAIRS, face, face_set

from diffrep.data.dense_feed import DenseFeed
from diffrep.data.landmark_views import (
    LandmarkTraining,
    LandmarkViews,
    crop,
    crop_matrix,
    exchanged,
    mirror,
    padded_scale,
    transformed,
    warp,
)
from diffrep.data.wflw import MIRRORED, Face

STILL = {"flip": 0.0, "scale_jitter": 0.0, "rotation_share": 0.0}
GEOMETRY = pytest.mark.golden(of=lambda case: case.meta.get("kind") == "top-down crop geometry")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(height=100, width=120, seed=0):
    """Smooth, so that resampling it is nearly exact."""
    waves = torch.rand(3, 4, 2, generator=rng(seed)) * 0.15
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phases = waves[..., 0, None, None] * x + waves[..., 1, None, None] * y
    return (127 + 30 * phases.sin().sum(1)).clamp(0, 255).round().to(torch.uint8)


# Against mmpose 0.29 and OpenCV


@GEOMETRY
def test_crops_are_the_official_ones(golden_case):
    size, get = tuple(golden_case.meta["output_size"]), golden_case.get
    for k, (center, scale) in enumerate(zip(get("outputs/center"), get("outputs/scale"), strict=True)):
        matrix = crop_matrix(center, float(scale[0]), size, float(get("inputs/rotation")[k]))
        torch.testing.assert_close(matrix, get("outputs/matrix")[k], atol=1e-4, rtol=0)
        points = transformed(get("inputs/points")[k], matrix)
        torch.testing.assert_close(points, get("outputs/points")[k], atol=1e-4, rtol=0)


@GEOMETRY
def test_pixels_are_those_of_opencv(golden_case):
    image = golden_case.get("inputs/image").permute(2, 0, 1)
    for k, expected in enumerate(golden_case.get("outputs/warped")):
        center, scale = golden_case.get("outputs/center")[k], float(golden_case.get("outputs/scale")[k, 0])
        size, angle = tuple(golden_case.meta["output_size"]), float(golden_case.get("inputs/rotation")[k])
        found = warp(image, crop_matrix(center, scale, size, angle), size).permute(1, 2, 0)
        assert expected.any() and (found.int() - expected.int()).abs().max() <= 2


@GEOMETRY
def test_the_padding_of_a_square_crop(golden_case):
    """A box's longer side x padding / 200, where the crop is square."""
    width, height = golden_case.meta["output_size"]
    config = LandmarkViews(padding=golden_case.meta["padding"])
    for k, (x, y, w, h) in enumerate(golden_case.get("inputs/bbox_xywh").tolist()):
        side = max(w, h * width / height)
        center = torch.tensor([x + w / 2, y + h / 2], dtype=torch.float64)
        torch.testing.assert_close(center, golden_case.get("outputs/center")[k].double(), atol=1e-4, rtol=0)
        there = Face(torch.zeros(1, 2), torch.ones(1, dtype=torch.bool), center, side / 200)
        expected = float(golden_case.get("outputs/scale")[k, 0])
        assert padded_scale(config, there) == pytest.approx(expected, abs=1e-4)


@GEOMETRY
def test_mirrored_points_are_the_official_ones(golden_case):
    points = golden_case.get("inputs/flip_joints")
    pairs = golden_case.get("outputs/wflw_flip_pairs").tolist()
    there = Face(points, torch.ones(len(points), dtype=torch.bool), points.mean(0), 1.0)
    found = mirror(there, golden_case.meta["image_width_for_flip"], pairs)
    torch.testing.assert_close(found.points, golden_case.get("outputs/flip_joints"), atol=1e-9, rtol=0)


# Geometry


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("angle", [0.0, 33.0, -120.0])
def test_a_box_fills_the_crop(udp, angle):
    """Its centre comes to the middle; a point at half its side to the right, turned back, to the crop's edge."""
    center, scale, side = torch.tensor([37.0, 21.0], dtype=torch.float64), 0.3, 64
    matrix = crop_matrix(center, scale, (side, side), angle, udp)
    last = side - udp
    assert transformed(center, matrix).tolist() == pytest.approx([last / 2, last / 2])
    turn = math.radians(angle)
    edge = center + 30 * torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    assert transformed(edge, matrix).tolist() == pytest.approx([last, last / 2])


@pytest.mark.parametrize(("height", "width", "scale"), [(100, 120, 0.4), (33, 51, 0.1), (64, 64, 1.5)])
def test_what_is_sampled_is_the_picture(height, width, scale):
    """Every pixel of the crop by the bilinear formula in Python, black outside."""
    image, size = torch.randint(0, 256, (1, height, width), generator=rng(1), dtype=torch.uint8), (9, 7)
    matrix = crop_matrix(torch.tensor([width / 2 + 3.3, height / 2 - 2.2]), scale, size, 25.0)
    back = torch.linalg.inv(torch.cat([matrix, torch.tensor([[0, 0, 1.0]], dtype=torch.float64)]))
    found = warp(image, matrix, size)
    assert found.shape == (1, 7, 9)

    def pixel(x, y):
        return float(image[0, y, x]) if 0 <= x < width and 0 <= y < height else 0.0

    for row in range(7):
        for column in range(9):
            x, y, _ = (back @ torch.tensor([column, row, 1.0], dtype=torch.float64)).tolist()
            left, top = math.floor(x), math.floor(y)
            a, b = x - left, y - top
            upper = (1 - a) * pixel(left, top) + a * pixel(left + 1, top)
            lower = (1 - a) * pixel(left, top + 1) + a * pixel(left + 1, top + 1)
            assert float(found[0, row, column]) == pytest.approx((1 - b) * upper + b * lower, abs=0.51)


@pytest.mark.parametrize("far", [(-500.0, 20.0), (500.0, 20.0), (20.0, -500.0), (20.0, 500.0)])
def test_a_crop_beside_the_picture_is_black(far):
    matrix = crop_matrix(torch.tensor(far), 0.2, (16, 16))
    assert not warp(photograph(), matrix, (16, 16)).any()


def test_a_crop_at_the_corner_keeps_what_there_is():
    white = torch.full((3, 50, 50), 255, dtype=torch.uint8)
    found = warp(white, crop_matrix(torch.zeros(2), 0.2, (40, 40)), (40, 40))
    assert not found[:, :19].any() and not found[:, :, :19].any() and (found[:, 21:, 21:] == 255).all()


# Mirror images


def test_mirrored_twice_is_the_same():
    there = face(x=31.0, y=44.0, visible=[1, 0, 1, 1, 0])
    once, again = mirror(there, 120, PAIRS), mirror(mirror(there, 120, PAIRS), 120, PAIRS)
    assert torch.equal(again.points, there.points) and torch.equal(again.visible, there.visible)
    assert torch.equal(again.center, there.center) and again.scale == there.scale == once.scale
    assert once.visible.tolist() == [False, True, True, False, True]
    assert torch.equal(once.points[2], torch.tensor([119.0, 0.0]) + there.points[2] * torch.tensor([-1.0, 1.0]))
    assert torch.equal(once.points[:, 0] < once.center[0], there.points[:, 0] < there.center[0])  # left stays left


def test_exactly_the_pairs_are_exchanged():
    order = exchanged(98, MIRRORED)
    assert [order[order[k]] for k in range(98)] == list(range(98))
    assert sum(order[k] != k for k in range(98)) == 88
    assert exchanged(4, ()) == [0, 1, 2, 3]
    assert exchanged(3, [(0, 2), (1, 2)]) == [2, 2, 1]  # as mmpose, where pairs overlap


def test_a_mirrored_crop_is_the_crop_mirrored():
    """Measured from pixel centres; else both are half a pixel off the other way."""
    config, image, there = LandmarkViews(size=32, target="udp"), photograph(), face()
    plain, matrix = crop(config, image, there)
    flipped, other = crop(config, image.flip(-1), mirror(there, image.shape[-1], PAIRS))
    assert (flipped.flip(-1).int() - plain.int()).abs().max() <= 1
    points = transformed(mirror(there, 120, PAIRS).points, other)
    expected = mirror(Face(transformed(there.points, matrix), there.visible, there.center, 1.0), 32, PAIRS).points
    torch.testing.assert_close(points, expected)


# Training views


def views(images=None, **settings):
    config = LandmarkViews(**{"size": 48, **settings})
    return LandmarkTraining(config, face_set([face()]) if images is None else images)


def test_published_defaults():
    config = LandmarkViews()
    assert (config.size, config.padding, config.sigma, config.target) == (256, 1.25, 2, "msra")
    assert (config.flip, config.scale_jitter, config.rotation, config.rotation_share) == (0.5, 0.25, 30, 0.6)


def test_points_stay_on_what_they_mark():
    """A dot at each point of a black picture; after any view it lies where the target says."""
    for k in range(5):
        image, there = torch.zeros(3, 100, 120, dtype=torch.uint8), face(half=20.0)
        x, y = there.points[k].round().int().tolist()
        image[:, y - 2 : y + 3, x - 2 : x + 3] = 255
        for seed in range(6):
            order = exchanged(5, PAIRS)
            view, target = views(padding=2.5)(image, there, rng(seed))
            bright = view[0].double()
            ys, xs = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
            found = torch.tensor([(bright * xs).sum(), (bright * ys).sum()]) / bright.sum()
            marks = [target["points"][k].double(), target["points"][order[k]].double()]  # as it is, or mirrored
            assert min(float((found - mark).norm()) for mark in marks) < 0.75


def test_still_views_are_the_test_crop():
    image, there = photograph(), face()
    made = views(**STILL)
    view, target = made(image, there, rng())
    plain, matrix = crop(made.config, image, there)
    assert torch.equal(view, plain) and view.dtype == torch.uint8 and view.shape == (3, 48, 48)
    torch.testing.assert_close(target["points"], transformed(there.points, matrix).float())
    assert torch.equal(target["visible"], there.visible)


def sides(target):
    """Length and angle of the line between the eyes."""
    across = (target["points"][1] - target["points"][0]).double()
    return float(across.norm()), math.degrees(math.atan2(float(across[1]), float(across[0])))


def test_jitter_is_as_wide_as_it_says():
    """Deviation 0.25 cut at one; 30 degrees in 60 % of all crops, cut at two deviations."""
    still = sides(views(**STILL)(photograph(), face(), rng())[1])[0]
    made = views(flip=0.0)
    found = [sides(made(photograph(), face(), rng(seed))[1]) for seed in range(400)]
    growth = torch.tensor([still / length for length, _ in found])
    angles = torch.tensor([angle for _, angle in found])
    assert growth.min() >= 0.75 - 1e-6 and growth.max() <= 1.25 + 1e-6
    ends = float(((growth - 1).abs() > 0.2499).float().mean())
    assert ends == pytest.approx(0.317, abs=0.08)  # what a normal number has beyond one deviation
    turned = angles[angles.abs() > 1e-4]
    assert len(turned) / 400 == pytest.approx(0.6, abs=0.08) and turned.abs().max() <= 60 + 1e-4
    assert float(turned.square().mean().sqrt()) == pytest.approx(29, abs=3) and abs(float(turned.mean())) < 5


def test_half_are_mirrored():
    made = views(**STILL | {"flip": 0.5})
    nose_right = face()
    nose_right.points[2, 0] += 5
    plain = float(made(photograph(), nose_right, rng(0))[1]["points"][2, 0])
    xs = [float(made(photograph(), nose_right, rng(seed))[1]["points"][2, 0]) for seed in range(300)]
    assert len({round(x, 3) for x in xs}) == 2
    assert sum(x == plain for x in xs) / 300 == pytest.approx(0.5, abs=0.09)


def test_a_view_is_a_function_of_its_draws():
    made, image = views(), photograph()
    first, again, other = (made(image, face(), rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["points"], again[1]["points"])
    assert not torch.equal(first[1]["points"], other[1]["points"])
    assert torch.equal(image, photograph()) and torch.equal(face().points, face().points)


def test_faces_of_any_pictures_make_a_batch():
    images = [photograph(h, w).permute(1, 2, 0).numpy() for h, w in ((100, 120), (70, 90), (130, 60))]
    faces = [face(), face(40, 30, 15), face(30, 80, 25, [1, 1, 0, 1, 1])]
    made = face_set(faces, images)
    batch = DenseFeed(made, views(made), 6, 0).batch(0, [0, 1, 2, 5], torch.device("cpu"))
    assert batch.images.shape == (4, 3, 48, 48) and batch.images.min() >= 0 and batch.images.max() <= 1
    assert batch.target["points"].shape == (4, 5, 2) and batch.target["points"].dtype == torch.float32
    assert batch.target["visible"].shape == (4, 5) and batch.target["visible"].dtype == torch.bool
    part = DenseFeed(made, views(made), 6, 0).batch(0, [5], torch.device("cpu"))
    assert torch.equal(part.images[0], batch.images[3])


def test_without_pairs_a_mirror_image_keeps_its_points():
    """Of a set whose points have no left and right."""
    made = LandmarkTraining(LandmarkViews(size=48, **STILL | {"flip": 1.0}), SimpleNamespace(mirrored=()))
    plain = views(**STILL)(photograph(), face(), rng())[1]["points"]
    found = made(photograph(), face(), rng())[1]["points"]
    assert float(found[2, 1]) == float(plain[2, 1]) and float(found[0, 0]) > float(found[1, 0])


@pytest.mark.parametrize(
    "wrong", [{"size": 4}, {"flip": 1.5}, {"padding": 0}, {"sigma": 0}, {"target": "dark"}, {"scale_jitter": 1.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        LandmarkViews(**wrong)
