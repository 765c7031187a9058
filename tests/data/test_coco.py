"""COCO's layout: ids, crowds, empty pictures, and what is refused: pytest tests/data/test_coco.py"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data import coco
from diffrep.data.coco import Objects, read_coco, tight_boxes
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.rle import runs_of
from diffrep.errors import UserError

SQUARE = [[2, 2, 8, 2, 8, 6, 2, 6]]
CATEGORIES = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}]


def annotation(number, picture, category, **changes):
    return {
        "id": number, "image_id": picture, "category_id": category, "bbox": [2.0, 2.0, 6.0, 4.0], "area": 24.0,
        "iscrowd": 0, "segmentation": SQUARE, **changes,
    }  # fmt: skip


def crowd(height, width):
    mask = np.zeros((height, width), dtype=bool)
    mask[3:5, 1:9] = True
    return runs_of(mask)


def content(**changes):
    """Three pictures: two objects and a crowd; nothing; a crowd and a box without an inside."""
    images = [{"id": k, "file_name": f"{k}.png", "height": 10, "width": 12} for k in (7, 5, 9)]
    annotations = [
        annotation(1, 7, 44),
        annotation(2, 7, 1, bbox=[0.5, 1.5, 3.25, 2.125]),
        annotation(3, 7, 17, iscrowd=1, segmentation=crowd(10, 12)),
        annotation(4, 9, 17, iscrowd=1, segmentation=crowd(10, 12)),
        annotation(5, 9, 1, bbox=[3.0, 3.0, 0.0, 4.0]),
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}


def layout(root, parts):
    """{"train2017": content} in the official layout."""
    (root / "annotations").mkdir(parents=True)
    for part, told in parts.items():
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(told))
        (root / part).mkdir()
        for image in told["images"]:
            picture = np.full((image["height"], image["width"], 3), image["id"], dtype=np.uint8)
            Image.fromarray(picture).save(root / part / image["file_name"])
    return root


@pytest.fixture
def place(tmp_path):
    return layout(tmp_path / "coco", {"train2017": content(), "val2017": content()})


def split(root, name="test", **settings):
    return load_dense(DataConfig(source=f"coco:{root}", **settings), name, "detect")


# What is there


def test_sparse_ids_become_labels_by_ascending_id_and_back(place):
    images = split(place)
    assert images.classes == ("person", "cat", "bottle") and images.facts == {"category_ids": [1, 17, 44]}
    found = images[0][1]
    assert [images.facts["category_ids"][k] for k in found.labels] == [44, 1, 17]
    assert [images.classes[k] for k in found.labels] == ["bottle", "person", "cat"]


def test_empty_pictures_are_dropped_in_training_and_kept_in_the_test(place):
    assert read_coco(str(place), "detect").parts["train"].names == ["7.png"]
    test = split(place)
    assert [test.image_name(k) for k in range(len(test))] == ["7.png", "5.png", "9.png"]
    assert len(test[1][1]) == 0 and test[1][1].masks().shape == (0, 10, 12)
    assert test[1][1].boxes.shape == (0, 4) and test[1][1].learnable.shape == (0,)


def test_crowds_and_boxes_without_an_inside_are_there_but_no_target(place):
    first, _, third = (split(place)[k][1] for k in range(3))
    assert first.crowd.tolist() == [False, False, True] and first.learnable.tolist() == [True, True, False]
    assert third.learnable.tolist() == [False, False] and first.picture == 7 and first.area.tolist() == [24, 24, 24]
    assert first.boxes[1].tolist() == [0.5, 1.5, 3.75, 3.625] and first.boxes.dtype == torch.float64
    masks = first.masks()
    assert masks[0].nonzero().amin(0).tolist() == [2, 2] and masks[0].sum() == 24 and masks[2].sum() == 16
    assert torch.equal(first.masks([2, 0]), masks[[2, 0]])


def test_the_pictures_are_the_right_ones(place):
    assert [int(split(place)[k][0].unique()) for k in range(3)] == [7, 5, 9]


def test_masks_are_filled_when_asked_for(place, monkeypatch):
    calls = []
    monkeypatch.setattr(coco.rle, "mask_of", lambda *size: calls.append(size) or np.zeros((10, 12), dtype=bool))
    found = split(place)[0][1]
    assert not calls and found.masks([1]).shape == (1, 10, 12) and len(calls) == 1


def test_val2017_is_what_is_tested_and_train_gives_the_held_out_part(place, tmp_path):
    assert sorted(read_coco(str(place), "detect").parts) == ["test", "train"]
    many = content(images=[{"id": k, "file_name": f"{k}.png", "height": 10, "width": 12} for k in range(20)])
    many["annotations"] = [annotation(k, k, (1, 17, 44)[k % 3]) for k in range(20)]
    root = layout(tmp_path / "many", {"train2017": many, "val2017": content()})
    assert (len(split(root, "train")), len(split(root, "validation")), len(split(root))) == (18, 2, 3)


def test_three_parts_stay_three(tmp_path):
    root = layout(tmp_path, {"train": content(), "val": content(), "test": content()})
    assert sorted(read_coco(str(root), "detect").parts) == ["test", "train", "validation"]


def test_the_fixture(shared):
    images = split(shared / "fixtures/coco", only_part="test")
    assert images.classes == ("person",) and [len(images[k][1]) for k in range(4)] == [1, 3, 5, 5]
    for k in range(4):
        image, found = images[k]
        masks = found.masks()
        assert tuple(image.shape[1:]) == found.size and not found.crowd.any() and found.learnable.all()
        assert (tight_boxes(masks) - found.boxes).abs().max() < 1
        assert ((masks.sum((1, 2)) - found.area).abs() < 0.005 * found.area + 10).all()
    assert list(coco.faults(str(shared / "fixtures/coco"))) == ["test lists 4 of 5,000 pictures"]


def test_other_files_and_folders(tmp_path):
    """Captions beside instances, pictures below images/, keypoints where there are no instances."""
    root = layout(tmp_path, {"train2017": content()})
    (root / "annotations/captions_train2017.json").write_text("{}")
    (root / "annotations/person_keypoints_train2017.json").write_text("{}")
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images/train2017")
    assert len(read_coco(str(root), "detect").parts["train"]) == 1
    (root / "annotations/instances_train2017.json").rename(root / "annotations/boxes_train2017.json")
    (root / "annotations/person_keypoints_train2017.json").unlink()
    assert len(read_coco(str(root), "detect").parts["train"]) == 1


def test_the_fingerprint_knows_annotations_and_pictures(place):
    before = split(place).fingerprint
    file = place / "annotations/instances_val2017.json"
    told = json.loads(file.read_text())
    told["annotations"][0]["area"] = 23.5
    file.write_text(json.dumps(told))
    assert split(place).fingerprint != before and split(place)[0][1].area[0] == 23.5  # read anew


# Objects of masks


def test_objects_from_masks():
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 1:4, 2:9] = True
    masks[1, 5, 0] = True
    found = Objects.from_masks(masks, torch.tensor([3, 0]), picture=8)
    assert found.boxes.tolist() == [[2, 1, 9, 4], [0, 5, 1, 6]] and found.area.tolist() == [21, 1]
    assert torch.equal(found.masks(), masks) and found.size == (6, 9) and found.learnable.all() and found.picture == 8
    assert tight_boxes(masks[:0]).shape == (0, 4)
    assert tight_boxes(torch.zeros(1, 3, 3, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


# Refusals


def changed(**entry):
    told = content()
    told["annotations"][0] |= entry
    return told


TWINS = content()["images"] + [{"id": 7, "file_name": "7.png", "height": 10, "width": 12}]
BAD = [
    ([], "is no JSON of COCO's"),
    ({"images": []}, "is no JSON of COCO's (no 'categories')"),
    (content(images=[{"id": 7, "file_name": "7.png"}]), "is no JSON of COCO's (no 'height')"),
    (content(images=[{"id": "7", "file_name": "7.png", "height": 1, "width": 1}]), "'7' is no whole number"),
    (content(images=[{"id": 7, "file_name": "7.png", "height": 0, "width": 1}]), "picture 7 has no size"),
    (content(images=TWINS), "two entries have the picture id 7"),
    (content(categories=[*CATEGORIES, {"id": 1, "name": "again"}]), "two entries have the category id 1"),
    (changed(image_id=8), "annotation 1 is of picture 8, which 'images' does not have"),
    (changed(category_id=2), "annotation 1 is of category 2, which 'categories' does not have"),
    (changed(bbox=[1, 2, 3]), "annotation 1 of '7.png': bbox is x, y, width, height; found [1, 2, 3]"),
    (changed(bbox=[1, 2, 3, float("nan")]), "bbox is x, y, width, height"),
    (changed(segmentation=None), "annotation 1 of '7.png': segmentation: neither polygons nor run lengths"),
    (changed(segmentation=[[1, 2, 3]]), "segmentation: a polygon is three points or more"),
    (changed(segmentation={"size": [10, 12], "counts": [5]}), "run lengths add up to 5; the picture has 120"),
    (content(categories=[*CATEGORIES, {"id": 3, "name": "car"}]), "no picture shows category 'car' (id 3)"),
]


@pytest.mark.parametrize("told, words", BAD, ids=[words for _, words in BAD])
def test_what_is_not_cocos_is_one_line(tmp_path, told, words):
    root = layout(tmp_path / "coco", {"train2017": content()})
    (root / "annotations/instances_train2017.json").write_text(json.dumps(told))
    with pytest.raises(UserError) as caught:
        read_coco(str(root), "detect")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "instances_train2017.json" in str(caught.value)


def test_no_json_at_all(tmp_path):
    root = layout(tmp_path, {"train2017": content()})
    for text in ("{", "", "\x00" * 9, "[" * 100_000):
        (root / "annotations/instances_train2017.json").write_text(text)
        with pytest.raises(UserError, match=r"instances_train2017.json is no JSON \("):
            read_coco(str(root), "detect")


def test_wrong_layouts(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_coco(str(tmp_path / "nowhere"), "detect")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=r"no file annotations/\*.json that names a part; the official layout is"):
        read_coco(str(tmp_path), "detect")
    for name in ("a_val.json", "b_val.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    with pytest.raises(UserError, match=r"several annotation files of the validation part \(a_val.json, b_val.json\)"):
        read_coco(str(tmp_path), "detect")


def test_missing_pictures_and_hostile_names(place):
    (place / "train2017/7.png").unlink()
    with pytest.raises(UserError, match=r"picture '7.png' is not in .*train2017"):
        read_coco(str(place), "detect")
    for name in ("../val2017/7.png", str(place / "val2017/7.png"), "7\x00.png", "7" * 5000):
        told = content()
        told["images"][0]["file_name"] = name
        (place / "annotations/instances_train2017.json").write_text(json.dumps(told))
        with pytest.raises(UserError, match=r"is not in .*train2017"):
            read_coco(str(place), "detect")


def test_parts_with_other_categories(tmp_path):
    other = content(categories=[{"id": 44, "name": "vase"}, *CATEGORIES[1:]])
    root = layout(tmp_path, {"train2017": content(), "val2017": other})
    with pytest.raises(UserError, match=r"instances_val2017.json: its categories differ from those of .*train2017"):
        read_coco(str(root), "detect")


def test_a_category_that_only_the_test_lacks_is_no_fault(tmp_path):
    few = content(annotations=[annotation(1, 7, 44)])
    root = layout(tmp_path, {"train2017": content(), "val2017": few})
    assert len(read_coco(str(root), "detect").classes) == 3


# Checking


def test_faults_are_all_found_and_named(place):
    told = content(categories=[*CATEGORIES, {"id": 3, "name": "car"}])
    told["images"].append({"id": 11, "file_name": "gone.png", "height": 10, "width": 12})
    told["images"][1]["height"] = 9
    told["annotations"] += [
        annotation(6, 70, 1), annotation(7, 7, 2), annotation(8, 7, 1, segmentation=[[1, 2]]),
        annotation(9, 7, 1, bbox=[]), annotation(10, 7, 1, bbox=[9, 2, 8, 4]),
    ]  # fmt: skip
    (place / "annotations/instances_train2017.json").write_text(json.dumps(told))
    (place / "annotations/instances_val2017.json").unlink()
    folder = Path(place) / "train2017"
    assert list(coco.faults(str(place))) == [
        "annotation 6 is of picture 70, which 'images' does not have",
        "annotation 7 is of category 2, which 'categories' does not have",
        "annotation 8 of '7.png': segmentation: a polygon is three points or more, x0, y0, x1, y1, ...; "
        "found 2 numbers",
        "annotation 9 of '7.png': bbox is x, y, width, height; found []",
        "train lists 4 of 118,287 pictures",
        "no picture of train shows category 'car' (id 3)",
        "a box of '7.png' reaches out of the picture (9, 2, 8, 4)",
        "picture '5.png' is (12, 10), its annotations say (12, 9)",
        "note: a box of '9.png' has no inside (0 x 4), and is no target in training",
        f"picture 'gone.png' is not in {folder}",
        "note: 3 pictures of train have no object to learn from, and are left out in training",
    ]
