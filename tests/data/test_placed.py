"""Canvases: the truth that is said is the truth that was drawn, and no split shows another's images."""

import pytest
import torch

from diffrep.data import placed
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.dense import load_dense
from diffrep.data.landmark_views import LandmarkViews, crop
from diffrep.errors import UserError

DIGITS = DataConfig(source="placed:digits")


@pytest.fixture(scope="module")
def masks():
    return load_dense(DIGITS, "test", "segment")


def test_one_class_and_its_place(masks):
    labels = load_data(DataConfig(source="digits"), "test").labels
    assert len(masks) == len(labels) and masks.classes == ("background", *map(str, range(10)))
    for k in range(12):
        image, mask = masks[k]
        assert image.shape == (3, 16, 16) and mask.shape == (16, 16)
        assert mask.unique().tolist() == [0, int(labels[k]) + 1]
        assert bool((image[0][mask > 0] >= 96).all())  # ink


def test_points_boxes_and_masks_agree(masks):
    canvases = placed.read_placed("digits", "segment").parts["test"].truth.__self__
    for k in range(12):
        left, top, right, bottom = canvases.draw(k)[1].box
        ys, xs = masks[k][1].nonzero(as_tuple=True)
        assert left <= int(xs.min()) and int(xs.max()) < right and top <= int(ys.min()) and int(ys.max()) < bottom
        assert 0 <= left < right <= 16 and 0 <= top < bottom <= 16 and 8 <= right - left <= 12
        face, found = canvases.corners(k), canvases.objects(k)
        assert face.points[0].tolist() == [left, top] and face.points[2].tolist() == [right, bottom]
        assert torch.equal(face.points[4], face.points[:4].mean(0)) and bool(face.visible.all())
        assert found.boxes.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
        assert torch.equal(found.masks()[0], masks[k][1] > 0) and int(found.labels) == int(masks[k][1].max()) - 1


def test_a_face_is_cut_out_as_the_whole_canvas():
    faces = load_dense(DIGITS, "test", "landmark")
    view, matrix = crop(LandmarkViews(size=32), *faces[3])
    assert faces.facts["normaliser"] == (0, 2) and view.shape == (3, 32, 32)
    assert torch.allclose(matrix, torch.tensor([[2.0, 0, 0], [0, 2.0, 0]], dtype=torch.float64))


def test_the_same_canvas_every_time(masks):
    again = load_dense(DIGITS, "test", "segment")
    assert all(torch.equal(masks[k][0], again[k][0]) for k in range(5))
    assert masks.fingerprint == again.fingerprint != load_dense(DIGITS, "train", "segment").fingerprint


def test_sources_without_labels_or_squares_are_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has no labels"):
        placed.read_placed("noise:20x8", "segment")
    for k in range(40):
        (tmp_path / "wide" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "wide" / str(k % 2) / f"{k}.png")
    with pytest.raises(UserError, match="not square"):
        placed.read_placed(f"folder:{tmp_path / 'wide'}", "segment")
