"""AP against the official numbers, and what hand-made predictions deserve: pytest tests/evaluation/test_detection.py"""

import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from toy_objects import CATEGORY_IDS, CLASSES, object_set, shapes

from diffrep.data import coco
from diffrep.data.coco import Objects
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.detect_views import DetectViews, fitted
from diffrep.errors import UserError
from diffrep.evaluation import detection
from diffrep.evaluation.detection import (
    Detections,
    average_precision,
    coco_results,
    coco_truth,
    detection_scores,
    f1,
    in_picture,
    pasted,
    summary,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def library(request, monkeypatch):
    """Each of the two packages."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    for module in (coco, detection):
        monkeypatch.setattr(module, "scoring_library", lambda: request.param)
    return request.param


# The official numbers


@pytest.mark.golden(of=lambda case: case.meta.get("kind") == "COCO AP")
def test_golden_average_precision(golden_case, library):
    with safe_open(golden_case.file, "pt") as file:
        told = json.loads(file.metadata()[f"coco/{golden_case.name}"])
    truth, found = told["ground_truth"], told["detections"]
    before = json.dumps(told)
    for kind in ("bbox", "segm"):
        precision = average_precision(truth, found, kind)
        wanted = golden_case.get(f"outputs/stats_{kind}").numpy()
        np.testing.assert_allclose(precision.stats, wanted, rtol=0, atol=1e-9)
        by_category = golden_case.get(f"outputs/per_category_ap_{kind}").numpy()
        np.testing.assert_allclose(precision.by_category, by_category, rtol=0, atol=1e-9)
    assert json.dumps(told) == before  # what is given stays as it is


@pytest.mark.golden(of=lambda case: case.meta.get("kind") == "COCO AP")
def test_golden_average_precision_of_our_own_objects(golden_case, library):
    """The same numbers when the truth went through boxes, labels and masks of ours, and back."""
    with safe_open(golden_case.file, "pt") as file:
        told = json.loads(file.metadata()[f"coco/{golden_case.name}"])
    ids = sorted(c["id"] for c in told["ground_truth"]["categories"])
    truths = [objects(image, told["ground_truth"]["annotations"], ids) for image in told["ground_truth"]["images"]]
    pictures = [truth.picture for truth in truths]
    truth = coco_truth(truths, pictures, ids, [str(number) for number in ids])
    for kind in ("bbox", "segm"):
        found = average_precision(truth, told["detections"], kind)
        wanted = golden_case.get(f"outputs/stats_{kind}").numpy()
        np.testing.assert_allclose(found.stats, wanted, rtol=0, atol=1e-9)


def objects(image, annotations, ids):
    own = [a for a in annotations if a["image_id"] == image["id"]]
    boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float64).view(-1, 4)
    return Objects(
        torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        torch.tensor([ids.index(a["category_id"]) for a in own], dtype=torch.int64),
        torch.tensor([bool(a["iscrowd"]) for a in own]),
        torch.tensor([a["area"] for a in own], dtype=torch.float64),
        tuple(a["segmentation"] for a in own),
        (image["height"], image["width"]),
        image["id"],
    )


# What predictions deserve

PICTURES = [shapes(60, 80, 3, seed=1), shapes(50, 40, 2, seed=2), shapes(30, 70, 0, seed=3), shapes(64, 64, 4, seed=4)]
IMAGES = object_set(PICTURES, "test")
TRUTHS = [truth for _, truth in PICTURES]


class Knows:
    """A detector that is told what to find: (truth, detections in the picture's pixels) -> detections."""

    def __init__(self, change=lambda found: found, size=64):
        self.change, self.asked = change, 0
        self.config = SimpleNamespace(
            views=DetectViews(size=size), student=SimpleNamespace(mean=(0.5, 0.5, 0.5))
        )  # fmt: skip

    def found(self, images, sizes):
        assert images.shape[1:] == (3, 64, 64) and images.dtype == torch.float32
        answers = []
        for image, size in zip(images, sizes, strict=True):
            truth = next(t for (picture, t) in PICTURES if self.shows(picture, image, size))
            factors = torch.tensor([size[1] / truth.size[1], size[0] / truth.size[0]] * 2)
            boxes = truth.boxes.float()
            masks = (
                torch.stack([cut(mask, box) for mask, box in zip(truth.masks(), boxes, strict=True)])
                if len(truth)
                else torch.zeros(0, 28, 28)
            )
            found = {"boxes": boxes * factors, "labels": truth.labels, "scores": torch.ones(len(truth)), "masks": masks}
            answers.append(self.change(found))
        return answers

    def shows(self, picture, image, size):
        from diffrep.data.detect_views import resized

        if fitted(*picture.shape[:2], 64) != size:
            return False
        small = resized(torch.from_numpy(picture).permute(2, 0, 1), size).float() / 255
        return torch.equal(image[:, : size[0], : size[1]], small)


def cut(mask, box):
    """A mask inside its box, 28 x 28, as a perfect mask head says it."""
    left, top, right, bottom = box.int().tolist()
    inside = mask[top:bottom, left:right].float()[None, None]
    return torch.nn.functional.interpolate(inside, (28, 28), mode="bilinear", align_corners=False)[0, 0]


def scored(change=lambda found: found, **options):
    return detection_scores(Knows(change), IMAGES, CPU, **options)


def test_perfect_predictions_have_ap_1(library):
    scores = scored()
    assert scores["box_ap"] == scores["box_ap50"] == scores["box_ap75"] == scores["box_ar_100"] == 100
    assert scores["mask_ap50"] == 100 and scores["mask_ap"] > 90  # a disc of 28 x 28 cells is not quite the disc
    assert scores["classes"] == {
        name: {"box_ap": 100, "mask_ap": scores["classes"][name]["mask_ap"]} for name in CLASSES
    }
    assert scores["box_ap_large"] is None  # no object is as large
    json.dumps(scores, allow_nan=False)


def test_empty_predictions_have_ap_0(library):
    scores = scored(lambda found: {key: value[:0] for key, value in found.items()})
    numbers = [value for key, value in scores.items() if key != "classes"]
    assert set(numbers) == {0.0, None} and scores["box_ap"] == scores["mask_ap"] == 0
    assert scores["classes"] == {name: {"box_ap": 0.0, "mask_ap": 0.0} for name in CLASSES}


def test_shifted_predictions_lose_the_strict_overlaps():
    """Boxes moved by a fifth of their width have IoU .8 / 1.2 = .667: right at .5 to .65, four of ten thresholds."""

    def shifted(found):
        width = found["boxes"][:, 2] - found["boxes"][:, 0]
        moved = found["boxes"] + (width / 5)[:, None] * torch.tensor([1.0, 0, 1, 0])
        return found | {"boxes": moved}

    scores = scored(shifted)
    assert scores["box_ap50"] == 100 and scores["box_ap75"] == 0 and scores["box_ap"] == 40


def test_wrong_classes_and_twice_found_objects():
    wrong = scored(lambda found: found | {"labels": 1 - found["labels"]})
    assert wrong["box_ap"] < 20
    # Each object twice, the second time with less score: every second detection is wrong, behind all right ones
    twice = scored(lambda found: {k: torch.cat([v, v * 0.5 if k == "scores" else v]) for k, v in found.items()})
    assert twice["box_ap"] == 100
    surer = scored(lambda found: {k: torch.cat([v * 0.5 if k == "scores" else v, v]) for k, v in found.items()})
    assert surer["box_ap"] == 100  # the surest of them counts
    half = scored(lambda found: {k: v[:1] for k, v in found.items()})
    assert 0 < half["box_ap"] < 60 and half["box_ar_100"] < 60


def test_detections_in_an_empty_picture_cost():
    def inventive(found):
        if len(found["boxes"]):
            return found
        return {
            "boxes": torch.tensor([[1.0, 1, 20, 20]]), "labels": torch.tensor([0]), "scores": torch.tensor([2.0]),
            "masks": torch.ones(1, 28, 28),
        }  # fmt: skip

    assert scored(inventive)["box_ap"] < 100


def test_crowds_are_neither_found_nor_missed():
    """A crowd in the truth, found or not: AP stays 1."""
    truth = TRUTHS[0]
    crowd = torch.tensor([True, False, False])
    crowded = Objects(truth.boxes, truth.labels, crowd, truth.area, truth.outlines, truth.size, 7)
    found = Detections(truth.boxes.float(), truth.labels, torch.ones(3), truth.masks())
    for kept in (slice(None), slice(1, None)):
        part = Detections(found.boxes[kept], found.labels[kept], found.scores[kept], found.masks[kept])
        results = coco_results(part, 7, CATEGORY_IDS)
        told = coco_truth([crowded], [7], CATEGORY_IDS, CLASSES)
        for kind in ("bbox", "segm"):
            assert average_precision(told, results, kind).stats[0] == 1


def test_the_truth_of_photographs_as_detections_has_ap_1(shared, library):
    """Filled polygons against the polygons themselves, which the library fills."""
    images = load_dense(DataConfig(source=f"coco:{shared}/data/fixtures/coco"), "test", "detect")
    truths = [images.truth(k) for k in range(len(images))]
    pictures = [truth.picture for truth in truths]
    told = coco_truth(truths, pictures, images.facts["category_ids"], images.classes)
    found = [Detections(t.boxes, t.labels, torch.ones(len(t)), t.masks()) for t in truths]
    results = [row for f, p in zip(found, pictures, strict=True) for row in coco_results(f, p, [1])]
    assert sorted(p for p in pictures) == [785, 40083, 196141, 197388] and len(results) == 14
    for kind in ("bbox", "segm"):
        precision = average_precision(told, results, kind)
        assert precision.stats[0] == pytest.approx(1, abs=1e-12) and precision.by_category == pytest.approx([1])


def test_truth_and_results_have_the_official_ids():
    truth = coco_truth(TRUTHS[:1], [101], CATEGORY_IDS, CLASSES)
    assert {c["id"]: c["name"] for c in truth["categories"]} == dict(zip(CATEGORY_IDS, CLASSES, strict=True))
    assert [a["category_id"] for a in truth["annotations"]] == [CATEGORY_IDS[k] for k in TRUTHS[0].labels]
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3] and truth["images"][0]["id"] == 101
    found = Detections(TRUTHS[0].boxes.float(), TRUTHS[0].labels, torch.ones(3), TRUTHS[0].masks())
    results = coco_results(found, 101, CATEGORY_IDS)
    assert [r["category_id"] for r in results] == [a["category_id"] for a in truth["annotations"]]
    assert [r["bbox"] for r in results] == [a["bbox"] for a in truth["annotations"]]


def test_a_split_without_objects_has_no_score():
    empty = object_set([shapes(30, 40, 0)], "test")
    with pytest.raises(UserError, match="toy: the test split has no object, so AP has no meaning"):
        detection_scores(Knows(), empty, CPU)


def test_where_no_package_scores(monkeypatch):
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'diffrep\[detect\]'"):
        average_precision({"images": [], "annotations": [], "categories": []}, [], "bbox")


def test_where_nothing_is_to_be_found(library):
    truth = {"images": [{"id": 1, "height": 9, "width": 9}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    precision = average_precision(truth, [], "bbox")
    assert (precision.stats == -1).all() and (precision.by_category == -1).all()
    scores = summary({"box": precision}, ["a"])
    assert scores.pop("classes") == {"a": {"box_ap": None}} and set(scores.values()) == {None}


# Pictures


def test_the_worst_pictures_come_first(tmp_path):
    def last_only(found):
        return found if len(found["boxes"]) != 3 else {k: v[:1] for k, v in found.items()}

    scores = scored(last_only, samples=tmp_path / "samples", count=2)
    rows = json.loads((tmp_path / "samples/predictions.json").read_text())
    assert rows[0]["name"] == "0.png" and rows[0]["score"] == 50 and rows[0]["metric"] == "F1 %"
    assert len(rows) == 2 and rows[1]["score"] == 100 and scores["box_ap"] < 100
    assert (tmp_path / "samples" / rows[0]["file"]).stat().st_size > 1000


def test_f1_by_hand():
    truth = TRUTHS[0]
    perfect = Detections(truth.boxes.float(), truth.labels, torch.ones(3), truth.masks())
    assert f1(perfect, truth) == 100

    def some(rows, scores):
        rows = torch.tensor(rows, dtype=torch.int64)
        return Detections(perfect.boxes[rows], perfect.labels[rows], torch.tensor(scores), perfect.masks[rows])

    assert f1(some([0], [0.9]), truth) == pytest.approx(100 * 2 * 1 / (1 + 3))
    assert f1(some([0, 0, 1], [0.9, 0.8, 0.7]), truth) == pytest.approx(100 * 2 * 2 / (3 + 3))
    assert f1(some([0, 1, 2], [0.9, 0.8, 0.2]), truth) == pytest.approx(100 * 2 * 2 / (2 + 3))  # 0.2 is not shown
    assert f1(some([], []), truth) == 0 and f1(some([], []), TRUTHS[2]) == 100


# Into the picture


def test_boxes_go_back_to_the_pictures_own_pixels():
    found = {
        "boxes": torch.tensor([[8.0, 4, 16, 20]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5]),
        "masks": torch.ones(1, 28, 28),
    }  # fmt: skip
    told = in_picture(found, (32, 64), (100, 400))
    assert told.boxes.tolist() == [[50, 12.5, 100, 62.5]] and told.masks.shape == (1, 100, 400)
    rows, columns = told.masks[0].nonzero().T
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (50, 99, 12, 62)


def test_masks_are_stretched_to_their_boxes():
    halves = torch.zeros(1, 28, 28)
    halves[0, :, 14:] = 1
    mask = pasted(halves, torch.tensor([[10.0, 2, 38, 30]]), 40, 50)[0]
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[2:30, 24:38] = True
    assert torch.equal(mask, expected)
    assert pasted(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 6).shape == (0, 5, 6)
    beyond = pasted(torch.ones(1, 28, 28), torch.tensor([[-20.0, -20, 100, 100]]), 8, 9)
    assert beyond.all()
    assert not pasted(torch.full((1, 28, 28), 0.49), torch.tensor([[0.0, 0, 9, 8]]), 8, 9).any()


def test_numbers_are_percent_to_three_digits():
    told = detection.Precision(np.array([1 / 3, *[-1] * 10, 0.5]), np.array([2 / 3]))
    scores = summary({"box": told}, ["cat"])
    assert scores["box_ap"] == 33.333 and scores["box_ap50"] is None and scores["box_ar_large"] == 50
    assert scores["classes"] == {"cat": {"box_ap": 66.667}} and not math.isnan(scores["box_ap"])
