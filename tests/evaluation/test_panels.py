"""Pictures of predictions: pytest tests/evaluation/test_panels.py"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.evaluation import palette, panels

GREY = torch.full((3, 40, 60), 128, dtype=torch.uint8)
CLASSES = ("sky", "tree", "car; auto", "dog")


def pixels(image):
    return np.asarray(image.convert("RGB"))


def has(image, colour):
    return bool((pixels(image) == np.uint8(colour)).all(-1).any())


def seen_by(kind, rgb):
    return palette._seen(np.asarray(rgb, dtype=float))[kind]


# Colours


def test_colours_do_not_depend_on_how_many_are_asked_for():
    assert (palette.colours(150)[:19] == palette.colours(19)).all()
    assert palette.colours(3).tolist() == [list(c) for c in palette.FIRST[:3]]
    assert len(np.unique(palette.colours(150), axis=0)) == 150


def level(linear):
    """sRGB levels of linear light, both without rounding."""
    light = np.asarray(linear, dtype=float)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("eye", "cone"), [(1, 0), (2, 1)], ids=["protanope", "deuteranope"])
def test_an_eye_that_lacks_a_kind_of_cones_misses_what_only_they_see(eye, cone):
    base = np.array([0.3, 0.3, 0.3])
    other = base + np.linalg.inv(palette.CONES)[:, cone] * (1.0 if cone == 0 else -0.5)
    assert ((other > 0) & (other < 1)).all()
    colours = level(base), level(other)
    normal, blind = (float(np.linalg.norm(np.subtract(*(seen_by(k, c) for c in colours)))) for k in (0, eye))
    assert normal > 0.02 and blind < 1e-6


def test_greys_are_the_same_to_every_eye():
    greys = [[v, v, v] for v in (0, 60, 128, 255)]
    for eye in (1, 2):
        assert seen_by(eye, greys) == pytest.approx(seen_by(0, greys), abs=2e-2)


@pytest.mark.parametrize(("count", "least"), [(19, 0.07), (150, 0.015)])
def test_colours_are_told_apart_by_every_eye(count, least):
    """By no less than Okabe and Ito's own seven where 19 are needed; 0.02 is about what an eye just sees."""
    colours = palette.colours(count).astype(float)
    ignored = np.array(palette.IGNORED, dtype=float)
    for k, colour in enumerate(colours):
        others = np.delete(colours, k, axis=0)
        assert min(palette._distance(others, colour).min(), palette._distance(ignored[None], colour)[0]) > least


# Masks


def test_masks_in_their_colours_and_the_ignored_dark():
    truth = torch.zeros(40, 60, dtype=torch.uint8)
    truth[:10], truth[20:, 30:] = 255, 2
    found = torch.full((40, 60), 3)
    panel = panels.masks(GREY, truth, found, CLASSES)
    factor = panels.LEAST // 40
    wide, head = 60 * factor, panel.height  # three pictures and two gaps
    assert panel.width == 3 * wide + 2 * panels.GAP
    first, second, third = (pixels(panel)[:, k * (wide + panels.GAP) :][:, :wide] for k in range(3))
    table = palette.colours(4)
    top = int(np.flatnonzero((second == palette.IGNORED).all(-1).all(1))[0])  # the first row below the title
    shown = second[top : top + 40 * factor]
    assert (shown[: 10 * factor] == palette.IGNORED).all()
    assert (shown[20 * factor :, 30 * factor :] == table[2]).all()
    assert (shown[20 * factor :, : 30 * factor] == table[0]).all()
    assert (third[top : top + 40 * factor] == table[3]).all()
    assert (first[top : top + 40 * factor] == 128).all() and head > top + 40 * factor


def legend(truth, found):
    table = np.zeros((256, 3), np.uint8)
    return [text for _, text in panels._legend(torch.tensor(truth), torch.tensor(found), CLASSES, table)]


def test_the_legend_names_the_classes_of_the_picture_alone():
    assert legend([[0, 0, 0, 2]], [[0, 0, 2, 2]]) == ["sky", "car"]
    assert legend([[1, 1, 1, 255]], [[0, 1, 1, 1]]) == ["tree", "sky (not there)"]
    assert legend([[0, 0, 0, 3]], [[0, 0, 0, 0]]) == ["sky", "dog (missed)"]


def test_a_mask_of_half_the_size_and_a_large_photograph():
    """CelebAMask-HQ: pictures of 1024, masks of 512."""
    photo = torch.zeros(3, 1024, 1024, dtype=torch.uint8)
    panel = panels.masks(photo, torch.zeros(512, 512, dtype=torch.uint8), torch.zeros(512, 512), CLASSES)
    assert panel.width == 3 * panels.HIGHEST + 2 * panels.GAP


def test_a_picture_of_nothing_known_has_no_truth_in_its_legend():
    truth = torch.full((8, 8), 255, dtype=torch.uint8)
    assert panels.masks(GREY[:, :8, :8], truth, torch.zeros(8, 8), CLASSES).width > 0
    assert legend([[255, 255]], [[0, 0]]) == ["sky (not there)"]


def test_many_classes_are_counted():
    names = [f"class {k}" for k in range(40)]
    every = torch.arange(40).reshape(5, 8)
    said = panels._legend(every, every, names, np.zeros((256, 3), np.uint8))
    assert len(said) == panels.MOST_NAMED + 1 and said[-1][1] == "and 16 more"


# Points


def test_points_are_drawn_where_they_are():
    truth = torch.tensor([[20.0, 10.0], [40.0, 30.0]])
    found = torch.tensor([[24.0, 10.0], [40.0, 30.0]])
    panel = panels.points(GREY, truth, found)
    assert has(panel, panels.TRUTH) and has(panel, panels.FOUND)
    left, top, right, _ = panels._around(truth.double(), GREY)
    factor = panel.width / (right - left)
    x, y = ((v + 0.5) * factor for v in (20 - left, 10 - top))
    assert tuple(pixels(panel)[round(y), round(x)]) == panels.TRUTH
    between = pixels(panel)[round(y), round(x + 2 * factor)]
    assert (between == 255).all() or (between == panels.INK).all()  # the line from disc to cross


def test_only_the_part_with_points_is_shown():
    wide = torch.zeros(3, 400, 600, dtype=torch.uint8)
    truth = torch.tensor([[300.0, 200.0], [340.0, 240.0]])
    assert panels._around(truth, wide) == (290, 190, 350, 250)
    assert panels._around(torch.tensor([[-5.0, -5.0], [900.0, 700.0]]), wide) == (0, 0, 600, 400)


def test_points_that_are_nowhere_are_left_out():
    nowhere = torch.full((2, 2), float("nan"))
    panel = panels.points(GREY, nowhere, torch.tensor([[20.0, 10.0], [float("inf"), 3.0]]))
    assert has(panel, panels.FOUND)


# Objects


def drawn(boxes, labels, masks=None, **more):
    return SimpleNamespace(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels), masks=masks, **more)


def test_boxes_masks_and_scores():
    inside = torch.zeros(1, 40, 60, dtype=torch.bool)
    inside[0, 20:30, 10:20] = True
    truth = drawn([[10.0, 20.0, 20.0, 30.0]], [1], inside)
    found = drawn([[10.0, 20.0, 20.0, 30.0], [0.0, 0.0, 5.0, 5.0]], [3, 0], None, scores=torch.tensor([0.9, 0.1]))
    panel = panels.objects(GREY, truth, found, CLASSES)
    tree, dog, sky = (tuple(int(v) for v in palette.colours(4)[k]) for k in (1, 3, 0))
    half = panel.width // 2
    left, right = panel.crop((0, 0, half, panel.height)), panel.crop((half, 0, panel.width, panel.height))
    assert has(left, tree) and not has(left, dog)
    assert has(right, dog) and not has(right, sky)  # a score of 10 % is not drawn
    mixed = np.round(128 + panels.COVER * (np.array(tree, dtype=np.float32) - 128)).astype(np.uint8)
    assert has(left, mixed) and not has(right, mixed)


def test_an_empty_picture_and_an_empty_prediction():
    nothing = drawn([], torch.zeros(0, dtype=torch.int64).tolist(), None, scores=torch.zeros(0))
    panel = panels.objects(GREY, nothing, nothing, CLASSES)
    assert has(panel, (128, 128, 128))


# The folder


def test_panels_of_the_worst_first(tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "prediction_007.jpg").write_bytes(b"of an earlier run")
    colours = {4: (255, 0, 0), 2: (0, 0, 255)}
    worst = [(12.5, 4), (float("nan"), 2)]
    panels.write_panels(samples, worst, lambda k: Image.new("RGB", (16, 16), colours[k]), "mIoU", lambda k: f"face {k}")
    assert sorted(p.name for p in samples.iterdir()) == [
        "prediction_000.jpg", "prediction_001.jpg", "predictions.json",
    ]  # fmt: skip
    rows = json.loads((samples / "predictions.json").read_text())
    assert rows[0] == {"file": "prediction_000.jpg", "name": "face 4", "score": 12.5, "metric": "mIoU"}
    assert rows[1]["score"] is None and rows[1]["name"] == "face 2"
    with Image.open(samples / "prediction_000.jpg") as image:
        assert np.abs(pixels(image)[8, 8].astype(int) - (255, 0, 0)).max() < 6


def test_an_interrupted_drawing_leaves_what_was_there(tmp_path):
    panels.write_panels(tmp_path / "samples", [(1.0, 0)], lambda k: Image.new("RGB", (4, 4)), "NME", str)

    def fails(_):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        panels.write_panels(tmp_path / "samples", [(1.0, 0)], fails, "NME", str)
    assert len(list((tmp_path / "samples").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1
