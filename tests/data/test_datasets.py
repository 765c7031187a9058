"""Splits, label subsets and readers, against published numbers: pytest tests/data/test_datasets.py"""

import io
import json
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from diffrep import _torchvision_compat
from diffrep.data import datasets as data_module
from diffrep.data.datasets import DataConfig, hide_labels, label_subset, load_data
from diffrep.errors import UserError

SPLITS = ("train", "validation", "test")


def noise(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """(H, W, 3) uint8, different for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def load(source, split="train", **settings_):
    return load_data(DataConfig(source=str(source), **settings_), split)


def all_pixels(images):
    return images.gather(torch.arange(len(images)))


def write_parquet(path, images, labels=None, names=None, column="image"):
    """A parquet file as Hugging Face writes it, independent of diffrep's own writer."""
    table = {column: [{"bytes": content, "path": f"{k}.png"} for k, content in enumerate(images)]}
    features = {column: {"_type": "Image"}}
    if labels is not None:
        table["label"] = labels
        features["label"] = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value", "dtype": "int64"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), path, row_group_size=3)


def refused(source, split="train", **settings_):
    with pytest.raises(UserError) as caught:
        load(source, split, **settings_)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The embedded set and its splits


def test_digits_are_split_60_10_30_and_stratified():
    sets = [load("digits", split) for split in SPLITS]
    assert [len(s) for s in sets] == [1078, 180, 539]
    assert sets[0].image_size == (8, 8) and sets[0].classes == tuple("0123456789")
    total = sum(s.labels.bincount() for s in sets)
    assert total.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # scikit-learn's own table
    for images, share in zip(sets, (0.6, 0.1, 0.3), strict=True):
        assert (images.labels.bincount() - share * total).abs().max() < 2


def test_digits_pixels_are_scaled_grey_in_three_channels():
    from sklearn.datasets import load_digits

    expected = sorted(np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64).tolist())
    pixels = torch.cat([all_pixels(load("digits", split)) for split in SPLITS])
    assert pixels.dtype == torch.uint8 and torch.equal(pixels[:, 0], pixels[:, 2])
    assert sorted(pixels[:, 1].reshape(1797, 64).tolist()) == expected  # every image once: the splits do not overlap


def test_a_second_load_is_the_same_set():
    assert load("digits").fingerprint == load("digits").fingerprint != load("digits", "test").fingerprint


# Label subsets

labels_of_classes = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.integers(-1, k - 1), min_size=30, max_size=120).map(lambda x: torch.tensor([*range(k), *x]))
)


@settings(deadline=None, max_examples=40)
@given(labels_of_classes, st.integers(0, 100), st.data())
def test_label_subsets_are_balanced_and_nested(labels, seed, draw):
    smallest = int(labels[labels >= 0].bincount().min())
    large = draw.draw(st.integers(1, smallest * int(labels.max() + 1)))
    small = draw.draw(st.integers(1, large))
    keep = label_subset(labels, large, seed)
    counts = labels[keep].bincount(minlength=int(labels.max()) + 1)
    assert keep.shape == (large,) and len(set(keep.tolist())) == large
    assert counts.max() - counts.min() <= 1 and bool((labels[keep] >= 0).all())
    assert torch.equal(label_subset(labels, small, seed), keep[:small])
    hidden = hide_labels(labels, keep)
    assert int((hidden >= 0).sum()) == large and torch.equal(hidden[keep], labels[keep])


def test_the_seed_picks_the_subset():
    labels = torch.arange(10).repeat(50)
    assert not torch.equal(label_subset(labels, 23, 0).sort().values, label_subset(labels, 23, 1).sort().values)


@pytest.mark.parametrize(
    ("count", "words"), [(13, "has 12 labelled"), (0, "12 labelled"), (9, "class 1 has 2 labelled images, 3 needed")]
)
def test_impossible_label_counts_are_refused_with_numbers(count, words):
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 5 + [-1] * 7)
    with pytest.raises(UserError, match=words):
        label_subset(labels, count, 0)


# CIFAR-10


@pytest.fixture(scope="module")
def cifar_test(request):
    found = {}

    def get(shared):
        if not found:
            found["set"] = load(f"cifar10:{shared / 'cifar10'}", "test")
        return found["set"]

    return get


def test_cifar10_test_split_is_the_official_one(shared, cifar_test):
    images = cifar_test(shared)
    assert images.labels[:5].tolist() == [3, 8, 8, 0, 6] and images.labels.bincount().tolist() == [1000] * 10
    assert images.gather(torch.tensor([0]))[0, :, 0, 0].tolist() == [158, 112, 49]
    assert images.classes[3] == "cat" and images.image_size == (32, 32) and images.skipped == 0
    means = all_pixels(images).double().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.49421428, 0.48513139, 0.45040909], abs=1e-7)  # data/cifar10/README.md


@pytest.mark.slow
def test_cifar10_training_part_is_held_out_by_class(shared):
    train, validation = (load(f"cifar10:{shared / 'cifar10'}", split) for split in SPLITS[:2])
    assert train.labels.bincount().tolist() == [4500] * 10 and validation.labels.bincount().tolist() == [500] * 10
    means = torch.cat([all_pixels(train), all_pixels(validation)]).double().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-7)  # published


def test_split_counts_of_cifar10_need_no_decoding(shared):
    from diffrep.data.datasets import split_positions
    from diffrep.data.sources import read_source

    source = read_source(f"cifar10:{shared / 'cifar10'}")
    positions = {split: split_positions(source, split) for split in SPLITS}
    assert [len(p) for _, p in positions.values()] == [45_000, 5_000, 10_000]
    train, validation = positions["train"][1], positions["validation"][1]
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))
    assert source.parts["train"].labels[train].bincount().tolist() == [4500] * 10
    assert source.parts["train"].labels[:5].tolist() == [6, 9, 9, 4, 1]  # data/cifar10/README.md


# Fixtures of the real layouts


def test_cifar100_slice(shared):
    sets = [load(f"parquet:{shared / 'fixtures/cifar100-slice'}", split) for split in SPLITS]
    assert [len(s) for s in sets] == [900, 100, 500]
    assert sets[1].labels.bincount().tolist() == [1] * 100 and sets[2].labels.bincount().tolist() == [5] * 100
    assert sets[0].classes[:3] == ("apple", "aquarium_fish", "baby")  # fine_label is preferred to coarse_label


def test_imagenet_folder_is_resized_like_torchvision(shared):
    _torchvision_compat.install()
    from torchvision import transforms

    folder = shared / "fixtures/imagenet-sample"
    images = load(f"folder:{folder}", "validation", image_size=64)
    assert images.labels.tolist() == list(range(20)) and images.classes[0] == "n01440764"
    resize = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.PILToTensor()])
    files = sorted((folder / "val").glob("*/*.JPEG"))
    expected = torch.stack([resize(Image.open(file).convert("RGB")) for file in files])
    assert torch.equal(all_pixels(images), expected)
    assert "no train split, only validation" in refused(f"folder:{folder}", image_size=64)


def test_tiny_imagenet_layout(shared):
    train, validation, test = (load(f"folder:{shared / 'fixtures/tiny-imagenet-200'}", split) for split in SPLITS)
    assert train.labels.bincount().tolist() == [10] * 5 and validation.labels.bincount().tolist() == [4] * 5
    assert test.labels is None and len(test) == 5 and train.image_size == (64, 64)


# Small sources made here


def test_folder_of_classes_is_split(make_folder):
    root = make_folder({"cat": 20, "dog": 40})
    sets = [load(f"folder:{root}", split) for split in SPLITS]
    assert [s.labels.bincount().tolist() for s in sets] == [[12, 24], [2, 4], [6, 12]]
    assert sets[0].classes == ("cat", "dog") and sets[0].licence == "unknown: yours"
    seen = {tuple(row) for s in sets for row in all_pixels(s).flatten(1).tolist()}
    assert len(seen) == 60


def test_official_parts_of_a_folder_stay_whole(make_folder):
    root = make_folder({"train/cat": 10, "train/dog": 10, "test/dog": 3})
    assert [len(load(f"folder:{root}", split)) for split in SPLITS] == [18, 2, 3]
    assert load(f"folder:{root}", "test").labels.tolist() == [1, 1, 1]


def test_a_class_may_be_called_train(make_folder):
    assert load(f"folder:{make_folder({'bus': 5, 'train': 5})}").classes == ("bus", "train")


def test_images_directly_in_the_folder_are_unlabelled(make_folder):
    images = load(f"folder:{make_folder({'': 10})}")
    assert images.labels is None and images.classes == () and len(images) == 6


def test_streamed_and_resident_sets_give_the_same_pixels(make_folder, monkeypatch):
    source = f"folder:{make_folder({'cat': 10, 'dog': 10})}"
    resident = load(source)
    monkeypatch.setattr(data_module, "RESIDENT_BYTES", 0)
    streamed = load(source)
    index = torch.tensor([7, 0, 7, 3])
    assert resident.is_resident and not streamed.is_resident
    assert torch.equal(streamed.gather(index), resident.gather(index))
    assert streamed.image_size == (8, 8) and len(streamed) == len(resident)
    assert streamed.fingerprint == load(source).fingerprint != resident.fingerprint


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(grey.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}")
    (tmp_path / "b.png").write_bytes(png(noise(0)))
    (tmp_path / "c.png").write_bytes(png(noise(1)))
    pixels = all_pixels(load(f"folder:{tmp_path}", image_size=8))
    assert pixels.shape == (2, 3, 8, 8)
    if mode in ("L", "RGBA", "LA", "I;16"):
        every = torch.cat([all_pixels(load(f"folder:{tmp_path}", s)) for s in ("train", "test")])
        assert any(torch.equal(p, torch.from_numpy(grey).expand(3, 8, 8)) for p in every)


def test_parquet_without_names_counts_its_classes(tmp_path):
    images = [png(noise(k)) for k in range(24)]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", images[:20], [k % 2 for k in range(20)])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[20:], [0, 1, 1, -1])
    test = load(f"parquet:{tmp_path}", "test")
    assert test.classes == ("0", "1") and test.labels.tolist() == [0, 1, 1, -1]
    assert torch.equal(all_pixels(test)[2], torch.from_numpy(noise(22)).permute(2, 0, 1))
    assert len(load(f"parquet:{tmp_path}")) == 18


def test_hub_folder_and_saved_dataset(tmp_path):
    _torchvision_compat.install()
    import datasets

    images, labels = [png(noise(k)) for k in range(20)], [k % 2 for k in range(20)]
    write_parquet(tmp_path / "hub/train.parquet", images, labels, ["cat", "dog"])
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": [{"bytes": b, "path": None} for b in images], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    by_parquet, by_hub, saved = (
        load(s) for s in (f"parquet:{tmp_path}/hub", f"hf:{tmp_path}/hub", f"hf:{tmp_path}/saved")
    )
    assert by_parquet.fingerprint == by_hub.fingerprint == saved.fingerprint
    assert by_hub.classes == ("cat", "dog")


def test_shards_written_by_webdataset(tmp_path):
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard:03d}.tar")) as tar:
            for k in range(10 * shard, 10 * shard + 10):
                label = {"cls": k % 2} if shard else {"json": {"label": k % 2, "seed": k}}
                tar.write({"__key__": f"{k:06d}", "png": png(noise(k)), **label})
    images = load(f"shards:{tmp_path}/train-{{000..001}}.tar")
    assert len(images) == 12 and images.labels.bincount().tolist() == [6, 6]
    assert images.fingerprint == load(f"shards:{tmp_path}/*.tar").fingerprint
    as_url = load(f"shards:file://{tmp_path}/train-{{000..001}}.tar")
    assert torch.equal(all_pixels(as_url), all_pixels(images))


def write_idx(path, array):
    kind = {np.dtype(np.uint8): 8}[array.dtype]
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes())


def test_mnist_files_are_read_through_torchvision(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    grey = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", grey)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 10)
    test = load(f"mnist:{tmp_path}", "test")
    assert torch.equal(all_pixels(test), torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
    assert test.labels[:11].tolist() == [*range(10), 0] and test.licence == "CC BY-SA 3.0"
    (raw / "t10k-images-idx3-ubyte").unlink()
    assert "not found" in refused(f"mnist:{tmp_path}", "test")


# What cannot be used


def damaged(make_folder, content):
    root = make_folder({"cat": 20, "dog": 20})
    for k in range(20):
        if k % 4 == 0:
            (root / "cat" / f"{k:03d}.png").write_bytes(content)
    return root


@pytest.mark.parametrize("content", [b"no image", b"", png(noise(3))[:90]], ids=["text", "empty", "truncated"])
@pytest.mark.parametrize("resident", [2**31, 0])
def test_unreadable_images_are_named_or_counted(make_folder, monkeypatch, content, resident):
    monkeypatch.setattr(data_module, "RESIDENT_BYTES", resident)
    root = damaged(make_folder, content)
    skipping = [load(f"folder:{root}", split, unreadable="skip") for split in SPLITS]
    assert sum(s.skipped for s in skipping) == 5 and sum(map(len, skipping)) == 35
    for images in skipping:
        assert len(images.labels) == len(images) == len(all_pixels(images))
        assert all(name.startswith("cat/") for name in images.skipped_names)
    with pytest.raises(UserError, match=r"image 'cat/0.*png' is unreadable \(.+\); .*data.unreadable=skip"):
        [all_pixels(load(f"folder:{root}", split)) for split in SPLITS]


def test_a_set_of_unreadable_images_is_refused(tmp_path):
    for k in range(10):
        (tmp_path / f"{k}.png").write_bytes(b"no image")
    assert "none of 6 images is readable" in refused(f"folder:{tmp_path}", unreadable="skip")


@pytest.mark.parametrize("resident", [2**31, 0])
def test_mismatched_sizes_name_the_setting(make_folder, monkeypatch, resident):
    monkeypatch.setattr(data_module, "RESIDENT_BYTES", resident)
    root = make_folder({"train/cat": 3})
    (root / "test/cat").mkdir(parents=True)
    (root / "test/cat/a.png").write_bytes(png(noise(0)))
    (root / "test/cat/b.png").write_bytes(png(noise(0, 9, 12)))
    with pytest.raises(UserError, match=r"'test/cat/b.png' is 9x12, others are 8x8; set data.image_size"):
        all_pixels(load(f"folder:{root}", "test"))
    assert load(f"folder:{root}", "test", image_size=6).image_size == (6, 6)


@pytest.mark.parametrize(("names", "label"), [(["cat", "dog"], 2), (["cat", "dog"], -2), (None, 2**40)])
def test_labels_out_of_range_are_named(tmp_path, names, label):
    write_parquet(tmp_path / "a.parquet", [png(noise(k)) for k in range(4)], [0, 1, label, 0], names)
    assert f"image '2.png' has label {label}; valid: 0 to" in refused(f"parquet:{tmp_path}")


def test_places_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes/cat").mkdir(parents=True)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 200)
    for kind in ("folder", "parquet", "cifar10", "mnist"):
        assert "does not exist" in refused(f"{kind}:{tmp_path}/nowhere")
    assert "holds no images" in refused(f"folder:{tmp_path}/empty")
    assert "class folder 'cat' holds no images" in refused(f"folder:{tmp_path}/classes")
    assert "no .parquet file" in refused(f"parquet:{tmp_path}/empty")
    assert "not a readable parquet file" in refused(f"parquet:{tmp_path}/broken.parquet")
    assert "no file matches" in refused(f"shards:{tmp_path}/*.tgz")
    assert "not a readable tar file" in refused(f"shards:{tmp_path}/broken.tar")
    assert "runs no commands" in refused("shards:pipe:cat x.tar")
    assert "cannot be loaded" in refused(f"hf:{tmp_path}/empty")


def test_parquet_columns_that_do_not_fit_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert "no column of images" in refused(f"parquet:{tmp_path}/a.parquet")
    cell = {"bytes": png(noise(0)), "path": "x"}
    pq.write_table(pa.table({"left": [cell], "right": [cell]}), tmp_path / "b.parquet")
    assert "several image columns (left, right)" in refused(f"parquet:{tmp_path}/b.parquet")


def test_other_columns_are_not_taken_for_labels(tmp_path):
    images = [{"bytes": png(noise(k)), "path": f"{k}.png"} for k in range(10)]
    pq.write_table(pa.table({"image": images, "width": [8] * 10, "id": list(range(10))}), tmp_path / "a.parquet")
    assert load(f"parquet:{tmp_path}").labels is None
    pq.write_table(pa.table({"image": images, "label": ["cat"] * 10}), tmp_path / "a.parquet")
    assert "column 'label' holds string; labels are integers" in refused(f"parquet:{tmp_path}")


def test_class_names_of_the_parts_must_agree(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(noise(0))], [0], ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", [png(noise(0))], [0], ["dog", "cat"])
    assert "the class names of" in refused(f"parquet:{tmp_path}")


def test_files_that_name_no_part_beside_others_that_do(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(noise(0))])
    write_parquet(tmp_path / "more.parquet", [png(noise(0))])
    assert "more.parquet names no part" in refused(f"parquet:{tmp_path}")


def test_too_few_images_for_a_split(make_folder):
    assert "3 images are too few to hold out a validation split" in refused(
        f"folder:{make_folder({'': 3})}", "validation"
    )


def test_tar_members_that_are_no_files_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
        for k in range(10):
            member = tarfile.TarInfo(f"{k}.png")
            member.size = len(png(noise(k)))
            tar.addfile(member, io.BytesIO(png(noise(k))))
    assert len(load(f"shards:{tmp_path}/a.tar")) == 6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": "digit"}, "did you mean 'digits'"),
        ({"source": "digits:here"}, "the form is 'digits'"),
        ({"source": "folder"}, "the form is 'folder:FOLDER'"),
        ({"source": "digits", "augment": "rotate"}, "crop_flip:R"),
        ({"source": "digits", "labels": 0}, "greater than or equal to 1"),
        ({"source": "digits", "image_size": 0}, "greater than or equal to 1"),
        ({"source": "digits", "labels": 10, "labelled_share": 0.0}, "greater than 0"),
        ({"source": "digits", "labelled_share": 0.5}, "needs labels"),
        ({"source": "digits", "unreadable": "ignore"}, "'error' or 'skip'"),
    ],
)
def test_settings_are_checked_before_any_disk_is_touched(values, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig(**values)
    assert DataConfig(source="folder:/nowhere/at/all").augment == "none"


def test_as_many_labels_as_there_are_means_all_of_them():
    labels = torch.tensor([0, 0, 0, 1, -1, 1, 2])  # no class has as many as another
    assert sorted(label_subset(labels, 6, seed=0).tolist()) == [0, 1, 2, 3, 5, 6]
    with pytest.raises(UserError):
        label_subset(labels, 5, seed=0)
