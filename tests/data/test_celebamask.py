"""CelebAMask-HQ, parts of faces as one mask: pytest tests/data/test_celebamask.py"""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_masks import refusal

from diffrep.data.celebahq import MAPPING, part_of, read_mapping
from diffrep.data.celebamask import (
    ORDERS,
    PART_FILES,
    faults,
    merge,
    part_files,
    part_path,
    part_pixels,
    read_celebamask,
)
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.errors import UserError

# Pixels of item 1 of the sample by label order: dense.md section 7.
PIXELS = {
    "dataset": {"eye_g": 3635, "l_eye": 707, "r_eye": 707, "nose": 1728, "neck": 4635, "neck_l": 0},
    "repfusion": {"eye_g": 5002, "l_eye": 0, "r_eye": 0, "nose": 1775, "neck": 3984, "neck_l": 651},
}
IN_BOTH = {"hat": 19383, "hair": 6406, "ear_r": 177, "skin": 39040, "background": 164818}
COUNTS = {"train": 24_183, "validation": 2_993, "test": 2_824}
SIDE = 16


def write_part(root, number, part, where=slice(0, 8), side=SIDE, mode="RGB"):
    """One white-on-black file; ``where``: the rows that are white."""
    mask = np.zeros((side, side), np.uint8)
    mask[where] = 255
    path = part_path(root / PART_FILES, number, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).convert(mode).save(path)
    return path


def write_set(root, positions=(0, 162_771, 182_638)):
    """Photographs 0, 1, ... of twice the masks' side, at these positions in CelebA; each with skin and hair."""
    (root / "CelebA-HQ-img").mkdir(parents=True)
    for number in range(len(positions)):
        Image.new("RGB", (2 * SIDE, 2 * SIDE), (number, 0, 0)).save(root / "CelebA-HQ-img" / f"{number}.jpg")
        write_part(root, number, "skin", slice(4, 12))
        write_part(root, number, "hair", slice(0, 6))
    (root / MAPPING).write_text("".join(f"{n} {p} {p + 1}.jpg\n" for n, p in enumerate(positions)))
    return root


def read(place):
    return read_celebamask(str(place), "segment")


def refused(place, part=None):
    return refusal(read, place, part)


def by_name(place, part, row):
    found = read(place)
    mask = found.parts[part].truth(row)
    return {name: int((mask == label).sum()) for label, name in enumerate(found.classes)}


# The official layout


@pytest.mark.parametrize("inner", ["", "/CelebAMask-HQ", "/CelebAMask-HQ/CelebA-HQ-img"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_decides_which_part_covers_which(shared, order, inner):
    found = by_name(f"{shared}/fixtures/celebamask_hq{inner}@{order}", "train", 1)
    wanted = PIXELS[order] | IN_BOTH
    assert {name: found[name] for name in wanted} == wanted
    assert sum(found.values()) == 512 * 512


def test_the_sample_as_a_data_set(shared):
    config = DataConfig(source=f"celebamask-hq:{shared}/fixtures/celebamask_hq")
    train, test = load_dense(config, "train", "segment", holds_out=False), load_dense(config, "test", "segment")
    assert (len(train), len(test), test.image_name(0)) == (2, 1, "2000.jpg")
    image, mask = train[0]
    assert image.shape == (3, 1024, 1024) and mask.shape == (512, 512) and mask.dtype == torch.uint8
    assert train.facts == {"label_order": "repfusion"} and len(train.classes) == 19
    assert "non-commercial" in train.licence


def test_parts_without_a_file_are_not_in_the_mask(shared):
    found = by_name(f"{shared}/fixtures/celebamask_hq", "test", 0)  # item 2000, of the second folder
    absent = {"mouth", "u_lip", "l_lip", "eye_g", "hat", "ear_r", "neck_l"}  # README of the sample
    assert {name for name, count in found.items() if not count} == absent


def test_left_and_right_by_order():
    pairs = {}
    for order, classes in ORDERS.items():
        sides = {name[2:] for name in classes if name.startswith("l_") and f"r_{name[2:]}" in classes}
        pairs[order] = {(classes.index(f"l_{side}"), classes.index(f"r_{side}")) for side in sides}
        assert len(classes) == len(set(classes)) == 19 and classes[:2] == ("background", "skin")
    assert pairs["repfusion"] == {(2, 3), (4, 5), (7, 8)}  # dense.md section 7
    assert set(ORDERS["dataset"]) == set(ORDERS["repfusion"])
    assert pairs["dataset"] == {(6, 7), (4, 5), (8, 9)}


@pytest.mark.parametrize("order", ORDERS)
def test_a_set_names_the_pairs_of_its_order(tmp_path, order):
    found = read(f"{write_set(tmp_path / 'set')}@{order}")
    named = {(found.classes[left], found.classes[right]) for left, right in found.mirrored}
    assert named == {("l_brow", "r_brow"), ("l_eye", "r_eye"), ("l_ear", "r_ear")}


def test_the_official_counts_follow_from_the_borders(tmp_path):
    """Positions as many on each side of the borders as CelebA-HQ has, in no order."""
    first = {"train": 0, "validation": 162_771, "test": 182_638}
    positions = [first[part] + k for part, count in COUNTS.items() for k in range(count)]
    np.random.default_rng(0).shuffle(positions)
    (tmp_path / MAPPING).write_text("".join(f"{n} {p} {p + 1:06d}.jpg\n" for n, p in enumerate(positions)))
    found = [part_of(position) for position in read_mapping(tmp_path / MAPPING).values()]
    assert {part: found.count(part) for part in COUNTS} == COUNTS


def test_parts_are_those_of_the_official_split(tmp_path):
    root = write_set(tmp_path / "set", [182_637, 162_770, 182_638, 162_771])
    parts = {name: list(part.names) for name, part in read(root).parts.items()}
    assert parts == {"train": ["1.jpg"], "validation": ["0.jpg", "3.jpg"], "test": ["2.jpg"]}


# Merging


@pytest.mark.parametrize("order", ORDERS)
def test_later_parts_cover_earlier_ones(order):
    everywhere = np.ones((2, 2), bool)
    for k, low in enumerate(ORDERS[order][1:], 1):
        for high in ORDERS[order][k + 1 :]:
            merged = merge({high: everywhere, low: everywhere}, order)
            assert ORDERS[order][merged[0, 0]] == high


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_files_of_every_mode_read_the_same(tmp_path, mode):
    path = write_part(tmp_path, 3, "nose", slice(5, 9), mode=mode)
    assert Image.open(path).mode == mode
    wanted = np.zeros((SIDE, SIDE), bool)
    wanted[5:9] = True
    assert np.array_equal(part_pixels(path), wanted)


@pytest.mark.parametrize(
    ("colour", "is_set"), [((127, 127, 127), False), ((128, 0, 0), True), ((0, 0, 255), True), ((64, 64, 63), False)]
)
def test_any_channel_above_127_counts(tmp_path, colour, is_set):
    Image.new("RGB", (4, 4), colour).save(tmp_path / "part.png")
    assert part_pixels(tmp_path / "part.png").all() == is_set
    assert part_pixels(tmp_path / "part.png").any() == is_set


def test_merged_masks_are_read_where_they_are(tmp_path):
    root = write_set(tmp_path / "set")
    expected = read(root).parts["train"].truth(0)
    (root / "mask-repfusion").mkdir()
    for number in range(3):
        Image.fromarray(expected.numpy()).save(root / "mask-repfusion" / f"{number}.png")
    shutil.rmtree(root / PART_FILES)
    assert torch.equal(read(root).parts["train"].truth(0), expected)
    assert "CelebAMask-HQ-mask-anno is missing; merged is FOLDER@repfusion" in refused(f"{root}@dataset")
    (root / "mask-repfusion/1.png").unlink()
    assert "mask-repfusion: 1 of 1 images are missing, first 1.png" in refused(root)


# Bad input


def test_an_unknown_order_is_refused_with_the_nearest(tmp_path):
    root = write_set(tmp_path / "set")
    assert "no label order 'repfusin'; did you mean 'repfusion'?" in refused(f"{root}@repfusin")
    inside = write_set(tmp_path / "me@home")
    assert read(inside).facts == {"label_order": "repfusion"}
    assert read(f"{inside}@dataset").facts == {"label_order": "dataset"}


def test_part_files_that_do_not_belong_are_named(tmp_path):
    root = write_set(tmp_path / "set")
    lost = write_part(root, 0, "nose")
    lost.rename(lost.with_name("00000_noose.png"))
    assert "1 part files are not as they should be" in refused(root)
    assert "0/00000_noose.png: no part 'noose'; did you mean 'nose'?" in refused(root)
    lost.with_name("00000_noose.png").rename(lost.with_name("02000_nose.png"))
    assert "0/02000_nose.png: belongs into the folder 1" in refused(root)
    lost.with_name("02000_nose.png").rename(lost.with_name("\u0660\u0660\u0660\u0660\u0661_nose.png"))
    assert "_nose.png: is not called NUMBER_PART.png, as 00012_hair.png" in refused(root)
    lost.with_name("\u0660\u0660\u0660\u0660\u0661_nose.png").rename(root / PART_FILES / "00000_nose.png")
    assert "00000_nose.png: belongs into the folder 0" in refused(root)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    root = write_set(tmp_path / "set")
    for name in (".DS_Store", "._00000_hair.png", "notes.txt"):
        (root / PART_FILES / "0" / name).write_bytes(b"x")
    assert part_files(root / PART_FILES) == ({number: ["hair", "skin"] for number in range(3)}, [])
    assert len(read(root).parts["train"]) == 1


def test_masks_of_another_size_than_their_siblings(tmp_path):
    root = write_set(tmp_path / "set")
    path = write_part(root, 0, "nose", side=8)
    assert f"{path} has 8x8 pixels, 00000_hair.png 16x16" in refused(root, "train")


def test_a_mask_of_another_shape_than_its_photograph(tmp_path):
    root = write_set(tmp_path / "set")
    Image.new("RGB", (30, 20)).save(root / "CelebA-HQ-img/0.jpg")
    images = load_dense(DataConfig(source=f"celebamask-hq:{root}"), "train", "segment", holds_out=False)
    with pytest.raises(UserError, match=r"'0.jpg': its mask is 16x16, the picture 20x30"):
        images[0]


def test_photographs_without_masks_are_counted(tmp_path):
    root = write_set(tmp_path / "set")
    for path in (root / PART_FILES / "0").glob("00001_*"):
        path.unlink()
    assert "1 of 3 photographs have no part file, first 1.jpg" in refused(root)
    shutil.rmtree(root / PART_FILES)
    assert "CelebAMask-HQ-mask-anno is missing; some programs lose it" in refused(root)
    (root / MAPPING).unlink()
    assert refused(root).endswith("take it from CelebAMask-HQ.zip")  # no hint to a form without masks


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.full((4, 4), 19, np.uint8), "has the label 19; valid: 0 to 18"),
        (np.full((4, 4), 255, np.uint8), "has the label 255; valid: 0 to 18"),
        (np.zeros((4, 4, 3), np.uint8), "has the mode RGB"),
        (np.zeros((4, 4), np.uint16), "has the mode I;16"),
    ],
)
def test_merged_masks_with_labels_that_are_none(tmp_path, mask, words):
    root = write_set(tmp_path / "set")
    (root / "mask-dataset").mkdir()
    for number in range(3):
        Image.fromarray(mask).save(root / "mask-dataset" / f"{number}.png")
    told = refused(f"{root}@dataset", "test")
    assert str(root / "mask-dataset/2.png") in told and words in told


def test_a_part_with_16_bits_is_refused(tmp_path):
    root = write_set(tmp_path / "set")
    path = part_path(root / PART_FILES, 0, "hair")
    Image.fromarray(np.full((SIDE, SIDE), 65535, np.uint16)).save(path)
    assert f"{path} has the mode I;16; readable: 1, L, P, RGB, RGBA" in refused(root, "train")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_part_is_read_or_named(tmp_path, data):
    """Cut short, or with bytes changed: never anything but a mask or one line with the file's name."""
    path = write_part(tmp_path, 0, "nose")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert part_pixels(path).dtype == bool
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


# What is wrong with a set


def test_a_perfect_set_has_no_faults(shared):
    assert list(faults(f"{shared}/fixtures/celebamask_hq")) == []


def test_every_fault_is_named(tmp_path):
    root = write_set(tmp_path / "set")
    shutil.copytree(root, tmp_path / "merged")
    write_part(root, 0, "nose", slice(0, 0), side=512)
    write_part(root, 1, "beard")
    write_part(root, 17, "skin", side=512)
    part_path(root / PART_FILES, 2, "hair").write_bytes(b"\x89PNG")
    for path in (root / PART_FILES / "0").glob("00001_[sh]*"):
        path.unlink()
    found = "\n".join(faults(str(root)))
    assert "0/00001_beard.png: no part 'beard'" in found
    assert "1.jpg has no part file" in found
    assert "part files of 17.jpg, which is not there" in found
    assert f"{part_path(root / PART_FILES, 2, 'hair')} is unreadable" in found
    assert f"{part_path(root / PART_FILES, 0, 'hair')} has 16x16 pixels, official 512x512" in found
    assert f"note: {part_path(root / PART_FILES, 0, 'nose')} is empty" in found


def test_faults_of_merged_masks(tmp_path):
    root = write_set(tmp_path / "set")
    (root / "mask-repfusion").mkdir()
    Image.new("L", (512, 512), 18).save(root / "mask-repfusion/0.png")
    Image.new("L", (256, 512), 18).save(root / "mask-repfusion/1.png")
    found = list(faults(str(root)))
    assert found[0].endswith("mask-repfusion/1.png has 256x512 pixels, official 512x512")
    assert found[1].endswith("mask-repfusion/2.png is unreadable (FileNotFoundError)") and len(found) == 2
