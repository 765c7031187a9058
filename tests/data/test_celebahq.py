"""CelebA-HQ and CelebA's official split: pytest tests/data/test_celebahq.py"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data.celebahq import MAPPING, part_of, read_mapping
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.sources import read_source
from diffrep.errors import UserError

# Positions in CelebA at both borders of the official split, and the part of each: list_eval_partition.txt.
BORDERS = {0: "train", 162_770: "train", 162_771: "validation", 182_637: "validation", 182_638: "test", 202_598: "test"}


def row(number, position, more=""):
    return f"{number:<12}{position:<12}{position + 1:06d}.jpg{more}\n"


def write_set(root, name="{}.jpg", mapping=None, positions=tuple(BORDERS), heading="idx  orig_idx  orig_file\n"):
    """Photographs 0, 1, ... of 8x8 pixels, each as bright as ten times its number, with the mapping beside them."""
    (root / "CelebA-HQ-img").mkdir(parents=True)
    for number in range(len(positions)):
        Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(root / "CelebA-HQ-img" / name.format(number))
    rows = "".join(row(number, position) for number, position in enumerate(positions))
    (root / MAPPING).write_text(heading + rows if mapping is None else mapping)
    return root


def parts(place):
    return {name: list(part.names) for name, part in read_source(f"celebahq:{place}").parts.items()}


def refused(place):
    with pytest.raises(UserError) as caught:
        read_source(f"celebahq:{place}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("inner", ["", "CelebAMask-HQ", "CelebAMask-HQ/CelebA-HQ-img"])
def test_the_official_layout(shared, inner):
    place = shared / "fixtures/celebamask_hq" / inner
    assert parts(place) == {"train": ["0.jpg", "1.jpg"], "test": ["2000.jpg"]}  # README of the sample
    source = read_source(f"celebahq:{place}")
    assert source.classes == () and all(part.labels is None for part in source.parts.values())
    assert "non-commercial" in source.licence
    images = load_data(DataConfig(source=f"celebahq:{place}", image_size=64), "train")
    assert images.gather(torch.arange(2)).shape == (2, 3, 64, 64) and images.labels is None


def test_the_borders_of_the_split(tmp_path):
    assert {position: part_of(position) for position in BORDERS} == BORDERS
    found = parts(write_set(tmp_path / "set"))
    assert found == {"train": ["0.jpg", "1.jpg"], "validation": ["2.jpg", "3.jpg"], "test": ["4.jpg", "5.jpg"]}


def test_no_image_of_another_part_is_trained_on(tmp_path):
    """Positions mixed, so that the order of the photographs says nothing about their part."""
    places = [182_638, 5, 162_771, 3, 200_000, 162_770]
    root = write_set(tmp_path / "set", "{:05d}.png", positions=places)
    seen = {split: load_data(DataConfig(source=f"celebahq:{root}"), split) for split in ("train", "validation", "test")}
    values = {split: images.gather(torch.arange(len(images)))[:, 0, 0, 0].tolist() for split, images in seen.items()}
    assert values == {"train": [10, 30, 50], "validation": [20], "test": [0, 40]}


def test_images_are_in_the_order_of_their_numbers(tmp_path):
    root = write_set(tmp_path / "set", positions=range(12))
    assert parts(root)["train"] == [f"{k}.jpg" for k in range(12)]


def test_a_plain_folder_with_the_mapping_in_it(tmp_path, monkeypatch):
    root = write_set(tmp_path / "set")
    shutil.move(root / MAPPING, root / "CelebA-HQ-img" / MAPPING)
    plain = (root / "CelebA-HQ-img").rename(tmp_path / "faces")
    assert parts(plain)["test"] == ["4.jpg", "5.jpg"]
    shutil.move(plain / MAPPING, tmp_path / MAPPING)
    monkeypatch.chdir(plain)
    assert parts(".")["test"] == ["4.jpg", "5.jpg"]


@pytest.mark.parametrize(
    "text",
    [
        row(0, 119_613) + row(1, 99_094),
        "idx orig_idx orig_file\n\n" + row(0, 119_613) + row(1, 99_094),
        "".join(row(k, p, f" {'0' * 32} {'f' * 32}") for k, p in ((0, 119_613), (1, 99_094))),
        "\ufeffidx orig_idx orig_file proc_md5 final_md5\r\n" + row(1, 99_094) + row(0, 119_613),
    ],
    ids=["no heading", "heading", "MD5 columns", "Windows"],
)
def test_every_copy_of_the_mapping_is_understood(tmp_path, text):
    (tmp_path / MAPPING).write_text(text, encoding="utf-8")
    assert read_mapping(tmp_path / MAPPING) == {0: 119_613, 1: 99_094}


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ("0 119613 119613.jpg\n", "'0 119613 119613.jpg' is not a row `number position file`"),
        ("0 119613\n", "'0 119613' is not a row"),
        ("0 -5 -4.jpg\n", "'0 -5 -4.jpg' is not a row"),
        ("zero 1 2.jpg\n", "'zero 1 2.jpg' is not a row"),
        (row(0, 1) + row(3, 2) + row(3, 5), "photograph 3 stands there 2 times"),
        ("", "the list is empty"),
    ],
)
def test_a_damaged_mapping_is_named(tmp_path, mapping, words):
    assert words in refused(write_set(tmp_path / "set", mapping=mapping))


def test_without_the_mapping_no_split_is_guessed(tmp_path):
    root = write_set(tmp_path / "set")
    (root / MAPPING).unlink()
    assert "without it no test image is known" in refused(root)
    assert f"or read folder:{root / 'CelebA-HQ-img'} in a split of ours" in refused(root)
    assert len(read_source(f"folder:{root / 'CelebA-HQ-img'}").parts["train"]) == 6


def test_images_that_do_not_fit_the_mapping_are_counted_and_named(tmp_path):
    root = write_set(tmp_path / "set")
    images = root / "CelebA-HQ-img"
    shutil.copy(images / "3.jpg", images / "00003.jpg")
    assert "1 numbers have two images, first 3" in refused(root)
    (images / "00003.jpg").rename(images / "7.jpg")
    assert f"1 of 7 images have no line in {MAPPING}, first 7.jpg" in refused(root)
    (images / "7.jpg").rename(images / "face.jpg")
    assert "1 of 7 images are not named by number, first face.jpg" in refused(root)
    (images / "face.jpg").unlink()
    for number in (1, 4):
        (images / f"{number}.jpg").unlink()
    assert "2 of 6 images are missing, first 1.jpg" in refused(root)


def test_a_damaged_image_is_named_or_left_out(tmp_path):
    root = write_set(tmp_path / "set")
    (root / "CelebA-HQ-img/1.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"image '1.jpg' is unreadable"):
        load_data(DataConfig(source=f"celebahq:{root}"), "train")
    images = load_data(DataConfig(source=f"celebahq:{root}", unreadable="skip"), "train")
    assert len(images) == 1 and images.skipped_names == ("1.jpg",)


def test_an_archive_and_a_place_that_is_not_there(tmp_path):
    (tmp_path / "CelebAMask-HQ.zip").write_bytes(b"x")
    assert "is a file; unpack CelebAMask-HQ.zip" in refused(tmp_path / "CelebAMask-HQ.zip")
    assert "does not exist" in refused(tmp_path / "nowhere")
