"""Tiny-ImageNet, a folder and its zip file: pytest tests/data/test_tiny_imagenet.py"""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.sources import read_source
from diffrep.errors import UserError
from diffrep.wordnet import labels_among

# Published ILSVRC-2012 indices of the slice's classes: Egyptian cat, reel, rocking chair, volleyball, lemon.
IMAGENET = {"n02124075": 285, "n04067472": 758, "n04099969": 765, "n04540053": 890, "n07749582": 951}
GREY = ["n04067472_9", "n04540053_52", "n04099969_46"]  # README of the slice


@pytest.fixture
def slice_of(shared):
    return shared / "fixtures/tiny-imagenet-200"


@pytest.fixture
def copied(slice_of, tmp_path):
    """A copy of the slice in which faults can be made."""
    return shutil.copytree(slice_of, tmp_path / "tiny-imagenet-200", copy_function=shutil.copyfile)


def zipped(folder, path, root="tiny-imagenet-200/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"__MACOSX/{root}val/images/._val_1.JPEG", b"x")
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{root}{file.relative_to(folder).as_posix()}")
    return path


def load(place, split, **settings):
    return load_data(DataConfig(source=f"tiny-imagenet:{place}", **settings), split)


def refused(place):
    with pytest.raises(UserError) as caught:
        read_source(f"tiny-imagenet:{place}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_are_positions_among_the_sorted_ids(slice_of):
    source = read_source(f"tiny-imagenet:{slice_of}")
    assert source.classes == tuple(IMAGENET) and "non-commercial" in source.licence
    train, test = source.parts["train"], source.parts["test"]
    assert [source.classes[k] for k in train.labels.tolist()] == [name.split("/")[1] for name in train.names]
    rows = [line.split("\t") for line in (slice_of / "val/val_annotations.txt").read_text().splitlines()]
    expected = {f"val/images/{row[0]}": row[1] for row in rows}
    assert {name: source.classes[k] for name, k in zip(test.names, test.labels.tolist(), strict=True)} == expected


def test_the_ids_lead_to_imagenets_labels(slice_of):
    assert labels_among(read_source(f"tiny-imagenet:{slice_of}").classes, 1000) == tuple(IMAGENET.values())


def test_val_is_the_test_split_and_validation_is_held_out_of_train(slice_of):
    sets = [load(slice_of, split) for split in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [45, 5, 20] and all(s.image_size == (64, 64) for s in sets)
    assert (sets[0].labels.bincount() + sets[1].labels.bincount()).tolist() == [10] * 5
    assert sets[2].labels.bincount().tolist() == [4] * 5


def test_grey_images_get_three_channels_and_no_pixel_changes(slice_of):
    images = load(slice_of, "test")
    names = read_source(f"tiny-imagenet:{slice_of}").parts["test"].names
    expected = [np.asarray(Image.open(slice_of / name).convert("RGB")) for name in names]
    assert np.array_equal(images.gather(torch.arange(20)).permute(0, 2, 3, 1).numpy(), np.stack(expected))
    both = [load(slice_of, split) for split in ("train", "validation")]
    pixels = torch.cat([s.gather(torch.arange(len(s))) for s in both])
    is_grey = (pixels[:, 0] == pixels[:, 1]).flatten(1).all(1) & (pixels[:, 1] == pixels[:, 2]).flatten(1).all(1)
    files = [Image.open(slice_of / f"train/{name.split('_')[0]}/images/{name}.JPEG") for name in GREY]
    assert [file.mode for file in files] == ["L"] * 3 and int(is_grey.sum()) == 3


@pytest.mark.parametrize("root", ["tiny-imagenet-200/", ""])
def test_the_zip_file_is_the_same_set(slice_of, tmp_path, root):
    archive = zipped(slice_of, tmp_path / "tiny.zip", root)
    for split in ("train", "validation", "test"):
        assert load(archive, split).fingerprint == load(slice_of, split).fingerprint
    parts = [read_source(f"tiny-imagenet:{place}").parts["train"] for place in (archive, slice_of)]
    assert parts[0].names == parts[1].names and parts[0].files == parts[1].files
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.zip"]


def test_the_folder_around_and_what_a_file_manager_left(copied):
    (copied / "val/images/._val_1.JPEG").write_bytes(b"x")
    (copied / "train/.DS_Store").write_bytes(b"x")
    assert len(load(copied.parent, "test")) == 20


def test_train_alone_or_val_alone(copied):
    shutil.move(copied / "val", copied.parent / "val")
    assert list(read_source(f"tiny-imagenet:{copied}").parts) == ["train"]
    shutil.rmtree(copied / "train")
    shutil.move(copied.parent / "val", copied / "val")
    assert list(read_source(f"tiny-imagenet:{copied}").parts) == ["test"]
    shutil.rmtree(copied / "val")
    assert "holds no images" in refused(copied)


def edited(name, change):
    def fault(root):
        (root / name).write_text(change((root / name).read_text()))

    return fault


def moved(name, to):
    def fault(root):
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(root / to)

    return fault


TABLE, CAT = "val/val_annotations.txt", "train/n02124075/images/n02124075_0.JPEG"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda r: (r / "wnids.txt").unlink(), "wnids.txt is missing; have the folder as tiny-imagenet"),
        (lambda r: (r / TABLE).unlink(), "val/val_annotations.txt is missing"),
        (lambda r: (r / TABLE).write_text("\n"), "val/val_annotations.txt is empty"),
        (lambda r: (r / TABLE).write_bytes(b"\xff\xfe\x00"), "val/val_annotations.txt is not a readable table"),
        (edited("wnids.txt", lambda t: t + "cat\n"), "1 of 6 lines of wnids.txt are no ids, first 'cat'"),
        (edited("wnids.txt", lambda t: t + t[:10]), "1 of 6 lines of wnids.txt stand there more than once, first n02"),
        (edited("wnids.txt", lambda t: t[10:]), "1 of 5 classes of train are not in wnids.txt, first n02124075"),
        (
            edited(TABLE, lambda t: t.split("\n", 2)[2]),
            "2 of 20 images of val have no line in val/val_annotations.txt, first val/images/val_1.JPEG",
        ),
        (
            edited(TABLE, lambda t: t.replace("n04067472", "n00000001", 1)),
            "1 of 20 lines of val/val_annotations.txt name classes that are not in wnids.txt, first 'n00000001' of",
        ),
        (edited(TABLE, lambda t: t + "val_9.JPEG\n"), "1 of 21 lines of val/val_annotations.txt name no class, first"),
        (
            edited(TABLE, lambda t: t + t.split("\n")[0]),
            "1 of 21 lines of val/val_annotations.txt stand there more than once, first val_1.JPEG",
        ),
        (
            lambda r: (r / "val/images/val_26.JPEG").unlink(),
            "1 of 20 images are listed and missing, first val/images/val_26.JPEG",
        ),
        (lambda r: (r / CAT).unlink(), f"1 of 50 images are listed and missing, first {CAT}"),
        (
            moved("val/images/val_1.JPEG", "val/n04067472/val_1.JPEG"),
            "1 of 70 images lie in neither train/WNID/images nor val/images (folder: reads class folders), first val/",
        ),
        (moved("val/images", "val/test"), "20 of 70 images lie in neither"),
    ],
)  # fmt: skip
def test_faults_on_disk_are_counted_and_named(copied, fault, words):
    fault(copied)
    assert words in refused(copied)


def test_a_damaged_image_is_named_or_left_out(copied):
    (copied / "val/images/val_38.JPEG").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(UserError, match=r"image 'val/images/val_38.JPEG' is unreadable"):
        load(copied, "test")
    images = load(copied, "test", unreadable="skip")
    assert len(images) == 19 and images.skipped_names == ("val/images/val_38.JPEG",)


def test_a_zip_file_damaged_inside_or_none_at_all(slice_of, tmp_path):
    archive = zipped(slice_of, tmp_path / "tiny.zip")
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("tiny-imagenet-200/val/images/val_1.JPEG").header_offset
    content[start + 300 : start + 310] = bytes(10)
    archive.write_bytes(content)
    assert load(archive, "test", unreadable="skip").skipped_names == ("val/images/val_1.JPEG",)
    (tmp_path / "tiny.tar").write_bytes(b"x" * 99)
    assert "no folder and no readable zip file" in refused(tmp_path / "tiny.tar")
    assert "does not exist" in refused(tmp_path / "nowhere")
