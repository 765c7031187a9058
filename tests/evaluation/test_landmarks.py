"""Errors of points against mmpose and by hand: pytest tests/evaluation/test_landmarks.py"""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_faces import EYES, face, face_set

from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.landmark_views import LandmarkViews, crop, exchanged, transformed
from diffrep.errors import UserError
from diffrep.evaluation.landmarks import (
    auc,
    failure_rate,
    landmark_scores,
    located,
    nme,
    normalisers,
    per_face,
    point_errors,
)
from diffrep.models.heatmaps import targets

METRICS = pytest.mark.golden(of=lambda case: case.meta.get("kind") == "landmark metrics")
CPU = torch.device("cpu")


# Against mmpose 0.29


def errors_of(case, masked):
    found, truth, mask = (case.get(f"inputs/{name}") for name in ("pred", "gt", "mask"))
    unit = case.get("outputs/normalize_factor")[:, 0]
    return point_errors(found, truth, unit, mask if masked else None)


@METRICS
def test_errors_are_the_official_ones(golden_case):
    errors, get = errors_of(golden_case, True), golden_case.get
    assert float(nme(errors)) == pytest.approx(float(get("outputs/nme")), abs=1e-6)
    pixels = point_errors(get("inputs/pred"), get("inputs/gt"), torch.ones(len(errors)), get("inputs/mask"))
    assert float(nme(pixels)) == pytest.approx(float(get("outputs/epe")), abs=1e-5)
    right = ((errors < 0.05) & ~errors.isnan()).double().sum(0) / (~errors.isnan()).double().sum(0)
    known = ~right.isnan()
    expected = get("outputs/pck_per_joint_at_0_05")
    torch.testing.assert_close(right[known], expected[known], atol=1e-6, rtol=0)


@METRICS
def test_failures_and_areas_are_the_official_ones(golden_case):
    faces, get = per_face(errors_of(golden_case, False)), golden_case.get
    torch.testing.assert_close(faces, get("outputs/per_face_nme"), atol=1e-9, rtol=0)
    for name, value in (
        ("failure_rate_10", failure_rate(faces)),
        ("auc_10_exact", auc(faces)),
        ("auc_10_grid_1e4", auc(faces, step=1e-4)),
    ):
        assert float(value) == pytest.approx(float(get(f"outputs/{name}")), abs=1e-9), name


@METRICS
def test_the_unit_is_the_distance_of_the_outer_eye_corners(golden_case):
    truth = golden_case.get("inputs/gt")
    faces = [SimpleNamespace(points=points) for points in truth]
    expected = golden_case.get("outputs/normalize_factor")[:, 0]
    torch.testing.assert_close(normalisers(faces, (60, 72)), expected, atol=1e-9, rtol=0)


# By hand and by property


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_perfect_points():
    truth = drawn(7, 98, 2)
    errors = point_errors(truth, truth, torch.ones(7))
    assert (
        float(nme(errors)) == 0
        and float(failure_rate(per_face(errors))) == 0
        and float(auc(per_face(errors))) == pytest.approx(1)
    )


def test_shifted_points():
    """By 3 pixels to the right and 4 down, of a unit of 100: 5 %."""
    truth = drawn(3, 5, 2) * 80
    errors = point_errors(truth + torch.tensor([3.0, 4.0]), truth, torch.full((3,), 100.0))
    assert float(nme(errors)) == pytest.approx(0.05) and float(auc(per_face(errors))) == pytest.approx(0.5)
    assert float(failure_rate(per_face(errors))) == 0 and float(failure_rate(per_face(errors), 0.049)) == 1


def test_the_unit_of_measure_does_not_matter_nor_the_order_of_faces():
    found, truth, unit = drawn(6, 5, 2), drawn(6, 5, 2, seed=1), 5 + drawn(6, seed=2)
    errors = point_errors(found, truth, unit)
    scaled = point_errors(found * 7, truth * 7, unit * 7)
    torch.testing.assert_close(scaled, errors)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    swapped = point_errors(found[order], truth[order], unit[order])
    for score in (nme, lambda e: auc(per_face(e)), lambda e: failure_rate(per_face(e))):
        assert float(score(swapped)) == pytest.approx(float(score(errors)))


def test_points_and_faces_that_do_not_count():
    found, truth = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    errors = point_errors(found, truth, torch.tensor([2.0, 0.0]), torch.tensor([[1, 0, 1], [1, 1, 1]]))
    assert errors.isnan().tolist() == [[False, True, False], [True, True, True]]
    assert float(nme(errors)) == pytest.approx(2**0.5 / 2) and bool(per_face(errors)[1].isnan())


@pytest.mark.parametrize("limit", [0.1, 0.07])
def test_the_area_is_that_of_the_curve(limit):
    """The cumulative distribution is a staircase: its steps summed one by one."""
    faces = drawn(40) * 0.2
    edges = sorted([*faces.tolist(), limit, 0.0])
    area = sum(
        (min(right, limit) - left) * sum(f <= left for f in faces.tolist()) / 40
        for left, right in pairwise(edges)
        if left < limit
    )
    assert float(auc(faces, limit)) == pytest.approx(area / limit)
    assert abs(float(auc(faces, limit, limit / 1000)) - float(auc(faces, limit))) < 1e-3


def test_a_box_is_the_unit_where_there_are_no_eyes():
    assert normalisers([face(half=20.0), face(half=7.0)], None).tolist() == pytest.approx([40, 14])
    assert normalisers([face(half=20.0)], EYES).tolist() == pytest.approx([40])


# Scores of a network


class Oracle(nn.Module):
    """Draws the heatmaps of what it knows, in the order in which it is asked; mirror images mirrored."""

    def __init__(self, points, views, pairs, side=16):
        super().__init__()
        self.points, self.views, self.side, self.order = points, views, side, exchanged(len(points[0]), pairs)
        self.asked = 0

    def forward(self, crops):
        mirrored = getattr(self, "flips", False) and self.asked % 2 == 1
        start, self.asked = (self.asked // (2 if getattr(self, "flips", False) else 1)) * 32, self.asked + 1
        points = torch.stack(self.points[start : start + len(crops)])
        if mirrored:
            points = points[:, self.order] * torch.tensor([-1.0, 1.0]) + torch.tensor([self.views.size - 1.0, 0])
        size = (self.views.size, self.views.size)
        seen = torch.ones(points.shape[:2])
        return targets(points, seen, size, (self.side, self.side), self.views.target, self.views.sigma)[0]


def knowing(images, shift=(0.0, 0.0), order=None, target="unbiased", flip_test=False, size=128, side=64):
    """A method that knows where every point of every face is, or means to."""
    views = LandmarkViews(size=size, target=target)
    points = []
    for k in range(len(images)):
        image, there = images[k]
        known = there.points + torch.tensor(shift, dtype=torch.float64)
        points.append(transformed(known if order is None else known[order], crop(views, image, there)[1]))
    network = Oracle(points, views, images.mirrored, side)
    network.flips = flip_test
    decoding = {"msra": "default"}.get(target, target)
    return SimpleNamespace(network=network, config=SimpleNamespace(views=views, decoding=decoding, flip_test=flip_test))


@pytest.fixture
def wflw(shared):
    config = DataConfig(source=f"wflw:{shared / 'data/fixtures/wflw'}", only_part="test")
    return load_dense(config, "test", "landmark")


@pytest.mark.parametrize("target", ["unbiased", "udp"])
def test_real_faces_found_again(wflw, target):
    """Through crop, heatmap, decoding and back, to 0.2 % of the distance of the eye corners."""
    found = landmark_scores(knowing(wflw, target=target, size=256, side=64), wflw, CPU)
    assert found["nme"] < 0.2 and found["fr10"] == 0 and found["auc10"] > 98


def test_msra_costs_what_its_rounding_costs(wflw):
    """About a pixel of a 256 crop, in x and in y; see the round trip in tests/models/test_heatmaps.py."""
    found = landmark_scores(knowing(wflw, target="msra", size=256, side=64), wflw, CPU)
    assert 0.5 < found["nme"] < 4 and found["fr10"] == 0


@pytest.mark.parametrize("target", ["unbiased", "udp"])
def test_a_mirror_image_adds_no_error(wflw, target):
    """UDP meets it exactly; else the mean of two maps half a cell apart stays close."""
    found = landmark_scores(knowing(wflw, target=target, size=256, side=64, flip_test=True), wflw, CPU)
    assert found["nme"] < (0.2 if target == "udp" else 1.5) and found["fr10"] == 0


def test_faces_found_beside_the_truth_get_what_they_deserve(wflw):
    """Shifted by 6 pixels: 6 over each face's unit; the mean of those in percent."""
    faces = [wflw.truth(k) for k in range(4)]
    expected = 100 * float((6 / normalisers(faces, (60, 72))).mean())
    found = landmark_scores(knowing(wflw, shift=(6.0, 0.0), size=256, side=64), wflw, CPU)
    assert found["nme"] == pytest.approx(expected, rel=0.03)


def test_left_and_right_exchanged_is_a_failure(wflw):
    found = landmark_scores(knowing(wflw, order=exchanged(98, wflw.mirrored), size=256, side=64), wflw, CPU)
    assert found["fr10"] == 100 and found["auc10"] == 0 and found["nme"] > 30


def toy(count=3, **options):
    return face_set([face(x=50.0 + k, y=45.0 + 2 * k, half=18.0 + k) for k in range(count)], **options)


def test_a_network_that_says_nothing():
    images = toy()
    method = knowing(images)
    method.network = lambda crops: torch.zeros(len(crops), 5, 16, 16)
    found = landmark_scores(method, images, CPU)
    assert found["fr10"] == 100 and found["auc10"] == 0 and math.isfinite(found["nme"])


def test_more_faces_than_are_looked_at_once():
    images = toy(70)
    found = torch.cat(list(located(knowing(images), images, CPU)))
    truth = torch.stack([images.truth(k).points for k in range(70)])
    assert found.shape == (70, 5, 2) and float((found - truth).abs().max()) < 0.5


def test_subsets_are_scored_apart():
    subsets = {"largepose": torch.tensor([True, False, True]), "blur": torch.zeros(3, dtype=torch.bool)}
    images = toy(subsets=subsets)
    method = knowing(images)
    method.network.points[0] = method.network.points[0] + 12.0  # only the first is wrong
    found = landmark_scores(method, images, CPU)
    assert set(found) == {f"{m}{s}" for m in ("nme", "fr10", "auc10") for s in ("", "_largepose")}  # none is blurred
    assert found["fr10"] == pytest.approx(100 / 3, abs=1e-3) and found["fr10_largepose"] == 50
    assert found["nme_largepose"] == pytest.approx(1.5 * found["nme"], rel=0.05)
    assert all(round(value, 3) == value for value in found.values())


def test_points_nobody_sees_are_not_judged():
    there = [face(half=18.0, visible=[1, 1, 0, 1, 1]), face(half=18.0)]
    images = face_set(there)
    method = knowing(images)
    method.network.points[0][2] += 30
    assert landmark_scores(method, images, CPU)["nme"] < 1
    method.network.asked, method.network.points[1][2] = 0, method.network.points[1][2] + 20
    assert landmark_scores(method, images, CPU)["nme"] > 3


def test_faces_without_a_unit_are_left_out_and_a_set_of_them_is_refused():
    broken = face()
    broken.points[1] = broken.points[0]
    images = face_set([face(), broken])
    assert landmark_scores(knowing(images), images, CPU)["nme"] < 1
    images = face_set([broken])
    with pytest.raises(UserError, match="no face can be scored"):
        landmark_scores(knowing(images), images, CPU)
    images = face_set([broken], normaliser=None)  # by its box
    assert landmark_scores(knowing(images), images, CPU)["nme"] < 1


def test_the_worst_faces_are_drawn_first(tmp_path):
    images = toy(4)
    method = knowing(images)
    for k, shift in ((2, 9.0), (0, 4.0)):
        method.network.points[k] = method.network.points[k] + shift
    landmark_scores(method, images, CPU, tmp_path / "samples", 3)
    rows = json.loads((tmp_path / "samples/predictions.json").read_text())
    assert [row["name"] for row in rows][:2] == ["face 2", "face 0"] and len(rows) == 3
    assert rows[0]["score"] > rows[1]["score"] > rows[2]["score"] and rows[0]["metric"] == "NME %"
    assert all((tmp_path / "samples" / row["file"]).stat().st_size > 1000 for row in rows)


def test_scoring_changes_nothing_and_needs_no_gradient():
    images = toy()
    network = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = SimpleNamespace(views=LandmarkViews(size=32), decoding="default", flip_test=True)
    first = landmark_scores(SimpleNamespace(network=network, config=config), images, CPU)
    assert first == landmark_scores(SimpleNamespace(network=network, config=config), images, CPU)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
