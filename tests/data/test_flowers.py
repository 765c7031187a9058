"""Oxford Flowers-102 in its official layout: pytest tests/data/test_flowers.py"""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.sources import read_source
from diffrep.errors import UserError


def write_small(root, labels=(3, 1, 2, 3, 1, 2), trnid=(6, 1), valid=(2, 3), tstid=(4, 5)):
    """Six grey photographs whose value is their number."""
    (root / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(
            root / f"jpg/image_{number:05d}.jpg", quality=100, subsampling=0
        )
    savemat(root / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(root / "setid.mat", {"trnid": np.array([trnid]), "valid": np.array([valid]), "tstid": np.array([tstid])})
    return root


def refused(source):
    with pytest.raises(UserError) as caught:
        read_source(f"flowers102:{source}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["", "flowers-102"])
def test_splits_and_labels_are_those_of_the_tables(tmp_path, folder):
    write_small(tmp_path / folder)
    sets = {s: load_data(DataConfig(source=f"flowers102:{tmp_path}"), s) for s in ("train", "validation", "test")}
    assert {s: images.labels.tolist() for s, images in sets.items()} == {
        "train": [1, 2], "validation": [0, 1], "test": [2, 0],
    }  # fmt: skip
    values = [images.gather(torch.arange(2))[:, 0, 0, 0].tolist() for images in sets.values()]
    assert values == [[6, 1], [2, 3], [4, 5]] and sets["test"].classes == ("0", "1", "2")


def test_the_official_tables(shared, tmp_path):
    fixture = shared / "fixtures/flowers-102"
    for table in ("imagelabels.mat", "setid.mat"):
        shutil.copy(fixture / table, tmp_path)
    (tmp_path / "jpg").mkdir()
    (tmp_path / "jpg/image_00001.jpg").write_bytes(b"stand-in")
    for number in range(2, 8190):
        os.link(tmp_path / "jpg/image_00001.jpg", tmp_path / f"jpg/image_{number:05d}.jpg")
    source = read_source(f"flowers102:{tmp_path}")
    assert {name: len(part) for name, part in source.parts.items()} == {"train": 1020, "validation": 1020, "test": 6149}
    assert all(source.parts[p].labels.bincount().tolist() == [10] * 102 for p in ("train", "validation"))
    labels, numbers = loadmat(fixture / "imagelabels.mat")["labels"][0], loadmat(fixture / "setid.mat")["tstid"][0]
    assert source.parts["test"].labels.tolist() == (labels[numbers - 1].astype(int) - 1).tolist()
    assert source.parts["test"].names[0] == f"jpg/image_{numbers[0]:05d}.jpg" and len(source.classes) == 102
    for number in (5, 7):
        (tmp_path / f"jpg/image_{number:05d}.jpg").unlink()
    assert "2 of 8189 images are missing, first jpg/image_00005.jpg" in refused(tmp_path)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"labels": (0, 1, 2, 3, 1, 2)}, "'labels' is no row of whole numbers from 1"),
        ({"labels": (1.5, 1, 2, 3, 1, 2)}, "'labels' is no row of whole numbers from 1"),
        ({"trnid": (6, 7)}, "numbers repeat or go beyond the 6 images"),
        ({"trnid": (6, 2)}, "numbers repeat or go beyond the 6 images"),
        ({"tstid": ()}, "'tstid' is no row of whole numbers from 1"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, tables, words):
    assert words in refused(write_small(tmp_path / "x", **tables))


def test_files_that_are_not_there_or_damaged_are_named(tmp_path):
    root = write_small(tmp_path / "x")
    savemat(root / "setid.mat", {"trnid": np.array([[1]])})
    assert "setid.mat: 'valid' cannot be read (KeyError" in refused(root)
    (root / "setid.mat").write_bytes(b"MATLAB 5.0" + b"\1" * 300)
    assert "setid.mat: 'trnid' cannot be read" in refused(root)
    (root / "imagelabels.mat").unlink()
    assert "imagelabels.mat is missing; the folder holds jpg/" in refused(root)
