"""ADE20K of the scene parsing benchmark: pytest tests/data/test_ade20k.py"""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_masks import refusal

from diffrep.data.ade20k import annotation, faults, read_ade20k
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.errors import UserError


def write_pair(root, stem="ADE_train_00000001", part="training", values=None, picture=None):
    """A picture and its annotation of 6x4 pixels with the classes 0, 1, 150."""
    values = np.array([[0, 1, 150, 2, 3, 4]] * 4, np.uint8) if values is None else values
    for kind in ("images", "annotations"):
        (root / kind / part).mkdir(parents=True, exist_ok=True)
    height, width = values.shape[:2]
    (picture or Image.new("RGB", (width, height))).save(root / "images" / part / f"{stem}.jpg")
    Image.fromarray(values).save(root / "annotations" / part / f"{stem}.png")
    return root


@pytest.fixture
def small(tmp_path):
    """Two training pairs and one for validation."""
    root = tmp_path / "ADEChallengeData2016"
    write_pair(root)
    write_pair(root, "ADE_train_00000002")
    return write_pair(root, "ADE_val_00000001", "validation")


def read(place):
    return read_ade20k(str(place), "segment")


def refused(place, part=None):
    return refusal(read, place, part)


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_the_sample(shared, inner):
    root = shared / "fixtures/ade20k" / inner
    found = read(root)
    assert list(found.parts) == ["test"] and len(found.parts["test"]) == 3
    assert len(found.classes) == 150
    assert [found.classes[k] for k in (0, 1, 2, 149)] == ["wall", "building", "sky", "flag"]  # objectInfo150.txt
    values = set()
    for row, name in enumerate(found.parts["test"].names):
        mask = found.parts["test"].truth(row)
        stored = shared / "fixtures/ade20k/ADEChallengeData2016" / name.replace("images", "annotations")
        raw = torch.from_numpy(np.array(Image.open(stored.with_suffix(".png"))).astype(int))
        assert torch.equal(mask.long(), torch.where(raw == 0, 255, raw - 1))
        values |= set(mask.unique().tolist())
    assert 255 in values and values <= {*range(150), 255}  # dense.md section 7


def test_the_sample_as_a_data_set(shared):
    images = load_dense(DataConfig(source=f"ade20k:{shared}/fixtures/ade20k"), "test", "segment")
    image, mask = images[0]
    assert image.shape == (3, 512, 683) and mask.shape == (512, 683) and mask.dtype == torch.uint8
    assert images.mirrored == () and "non-commercial" in images.licence


def test_official_validation_pictures_are_the_test(small):
    found = read(small.parent)
    assert {part: list(of.names) for part, of in found.parts.items()} == {
        "train": ["images/training/ADE_train_00000001.jpg", "images/training/ADE_train_00000002.jpg"],
        "test": ["images/validation/ADE_val_00000001.jpg"],
    }
    assert found.classes[0] == "1" and found.classes[149] == "150"  # no table of names
    assert found.parts["train"].truth(0)[0].tolist() == [255, 0, 149, 1, 2, 3]
    config = DataConfig(source=f"ade20k:{small}")
    assert len(load_dense(config, "train", "segment", holds_out=False)) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 6), 151, np.uint8), "has the label 151; valid: 0 to 150"),
        (np.full((4, 6), 255, np.uint8), "has the label 255; valid: 0 to 150"),
        (np.zeros((4, 6, 3), np.uint8), "has the mode RGB; labels have one channel"),
        (np.zeros((4, 6), np.uint16), "has the mode I;16"),
    ],
)
def test_annotations_with_labels_that_are_none(tmp_path, values, words):
    told = refused(write_pair(tmp_path, values=values), "train")
    assert "annotations/training/ADE_train_00000001.png" in told and words in told


@pytest.mark.parametrize("size", [(4, 6), (3, 2), (12, 8)])
def test_an_annotation_of_another_size_than_its_picture(tmp_path, size):
    """Also where it is a scaled copy: no official one is."""
    root = write_pair(tmp_path, picture=Image.new("RGB", size))
    told = refused(root, "train")
    assert f"ADE_train_00000001.png has 6x4 pixels, its picture {size[0]}x{size[1]}" in told


def test_files_without_a_counterpart_are_counted(small):
    shutil.copy(small / "images/training/ADE_train_00000001.jpg", small / "images/training/ADE_train_00000009.jpg")
    (small / "images/training/ADE_train_00000002.jpg").unlink()
    assert "2 files have no counterpart, first images/training/ADE_train_00000009.jpg has no annotation" in refused(
        small
    )
    shutil.rmtree(small / "annotations/training")
    assert "2 files have no counterpart" in refused(small)
    assert list(faults(str(small))) == [
        "images/training/ADE_train_00000001.jpg has no annotation",
        "images/training/ADE_train_00000009.jpg has no annotation",
    ]


@pytest.mark.parametrize("name", ["ADE20K_2016_07_26", "ADE20K_2021_17_01"])
def test_the_full_ade20k_is_refused_with_what_to_take(tmp_path, name):
    (tmp_path / name / "images/ADE/training").mkdir(parents=True)
    for place in (tmp_path, tmp_path / name):
        assert f"this is the full ADE20K ({name})" in refused(place)
        assert "take ADEChallengeData2016.zip of the scene parsing benchmark" in refused(place)


def test_another_folder_is_refused_with_the_layout(tmp_path):
    assert "images/{training,validation} and annotations/ are not in" in refused(tmp_path)
    (tmp_path / "images/training").mkdir(parents=True)
    assert "images/training holds no pictures" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_a_damaged_table_of_names(small):
    table = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{k}\t0.1\t1\t1\tthing {k}, other\n" for k in range(1, 151))
    (small / "objectInfo150.txt").write_text(table)
    assert read(small).classes[7] == "thing 8"
    (small / "objectInfo150.txt").write_text(table.replace("\n9\t", "\n10\t"))
    assert "objectInfo150.txt: is no table of the classes 1 to 150" in refused(small)
    (small / "objectInfo150.txt").write_bytes(b"\xff\xfe\x00")
    assert "objectInfo150.txt is not a readable list" in refused(small)


def test_grey_pictures_get_three_channels(tmp_path):
    root = write_pair(tmp_path, picture=Image.new("L", (6, 4), 200))
    config = DataConfig(source=f"ade20k:{root}", only_part="train")
    image, _ = load_dense(config, "train", "segment")[0]
    assert image.shape == (3, 4, 6) and image.unique().tolist() == [200]


def test_an_annotation_without_any_class_is_all_ignored_and_noted(tmp_path):
    root = write_pair(tmp_path, values=np.zeros((4, 6), np.uint8))
    assert read(root).parts["train"].truth(0).unique().tolist() == [255]
    assert [told.partition(" has ")[2] for told in faults(str(root))] == ["none of the 150 classes"]


def test_every_fault_is_named(small):
    (small / "annotations/training/ADE_train_00000001.png").write_bytes(b"no picture")
    Image.new("L", (6, 4), 200).save(small / "annotations/validation/ADE_val_00000001.png")
    found = list(faults(str(small)))
    assert len(found) == 2
    assert found[0].endswith("ADE_train_00000001.png is unreadable (UnidentifiedImageError)")
    assert found[1].endswith("ADE_val_00000001.png has the label 200; valid: 0 to 150")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_annotation_is_read_or_named(tmp_path, data):
    root = write_pair(tmp_path)
    path, picture = (root / kind / "training/ADE_train_00000001" for kind in ("annotations", "images"))
    path, picture = path.with_suffix(".png"), picture.with_suffix(".jpg")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert annotation(path, picture).shape == (4, 6)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
