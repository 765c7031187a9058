"""Checking and preparing data sets: pytest tests/data/test_prepare.py"""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from diffrep import console
from diffrep.data import prepare as prepare_module
from diffrep.data.containers import torchvision_set
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.prepare import check, prepare
from diffrep.errors import UserError

BATCHES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def official(monkeypatch):
    """A CIFAR-10 of 20 images per batch whose md5 sums count as the official ones; file name -> bytes."""
    contents = {}
    for number, name in enumerate(BATCHES):
        rng = np.random.default_rng(number)
        planes = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        contents[name] = pickle.dumps({"data": planes, "labels": [k % 10 for k in range(20)]})
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class {k}" for k in range(10)]})
    dataset = torchvision_set("CIFAR10")
    monkeypatch.setattr(dataset, "train_list", [[n, md5(contents[n])] for n in BATCHES[:5]])
    monkeypatch.setattr(dataset, "test_list", [[BATCHES[5], md5(contents[BATCHES[5]])]])
    monkeypatch.setitem(dataset.meta, "md5", md5(contents["batches.meta"]))
    monkeypatch.setitem(prepare_module._OFFICIAL_COUNTS, "cifar10", {"train": 100, "test": 20})
    return contents


def write_archive(path, members, monkeypatch=None):
    """A .tar.gz of name -> bytes; with ``monkeypatch`` its md5 counts as the official one."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    if monkeypatch:
        monkeypatch.setitem(prepare_module._OFFICIAL_ARCHIVES, "cifar10", ("", md5(path.read_bytes())))
    return path


def in_folder(contents):
    return {f"cifar-10-batches-py/{name}": content for name, content in contents.items()}


def write_folder(root, contents):
    for name, content in in_folder(contents).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_an_official_archive_is_checked_and_unpacked(tmp_path, official, monkeypatch):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", in_folder(official), monkeypatch)
    report = prepare("cifar10", archive, tmp_path / "out")
    assert report.is_complete and report.parts == {"train": 100, "test": 20}
    assert report.splits == {"train": 90, "validation": 10, "test": 20} and report.classes[3] == "class 3"
    assert report.fingerprints == check("cifar10", archive).fingerprints
    test = load_data(DataConfig(source=report.source), "test")
    planes = pickle.loads(official["test_batch"])["data"].reshape(-1, 3, 32, 32)
    assert torch.equal(test.gather(torch.arange(20)), torch.from_numpy(planes))
    assert test.fingerprint == report.fingerprints["test"]
    assert json.loads(json.dumps(report.to_json()))["parts"]["train"] == 100
    assert any("train 90, validation 10, test 20" in line for line in report.lines())


def test_the_official_binary_archive_will_do_as_well(tmp_path, official, monkeypatch):
    members = {}
    for name in BATCHES:
        batch = pickle.loads(official[name])
        records = np.concatenate([np.array(batch["labels"], np.uint8)[:, None], batch["data"]], 1)
        members[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(f"class {k}" for k in range(10)).encode()
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", members)
    monkeypatch.setitem(prepare_module._OFFICIAL_ARCHIVES, "cifar10", (md5(archive.read_bytes()), ""))
    report = prepare("cifar10", archive, tmp_path / "out")
    assert report.fingerprints == check("cifar10", write_folder(tmp_path / "python", official)).fingerprints
    assert report.is_complete and report.classes[3] == "class 3"


def test_a_foreign_archive_is_refused_before_it_is_opened(tmp_path, official):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", in_folder(official))
    for verb in (lambda: check("cifar10", archive), lambda: prepare("cifar10", archive, tmp_path / "out")):
        with pytest.raises(UserError, match=r"c58f30108f718f92721af3b95e74349a \(python\); get it anew"):
            verb()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x"])
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path, official, monkeypatch, name):
    archive = write_archive(tmp_path / "a.tar.gz", {**in_folder(official), name: b"x"}, monkeypatch)
    with pytest.raises(UserError, match="not a plain file below the folder"):
        prepare("cifar10", archive, tmp_path / "deep/out")
    assert not (tmp_path / "deep/out").exists() and not (tmp_path / "x").exists()
    assert not list((tmp_path / "deep").iterdir())


def test_a_link_in_the_archive_is_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    official = ("", md5((tmp_path / "a.tar.gz").read_bytes()))
    monkeypatch.setitem(prepare_module._OFFICIAL_ARCHIVES, "cifar10", official)
    with pytest.raises(UserError, match="test_batch' is not a plain file"):
        prepare("cifar10", tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_missing_batch_is_named(tmp_path, official):
    del official["data_batch_3"]
    folder = write_folder(tmp_path / "cifar", official)
    report = check("cifar10", folder)
    assert report.missing == ("data_batch_3 is missing",) and not report.is_complete
    assert "missing: data_batch_3 is missing" in report.lines()
    assert check("cifar10", folder / "cifar-10-batches-py").missing == report.missing
    with pytest.raises(UserError, match="data_batch_3 is missing"):
        load_data(DataConfig(source=f"cifar10:{folder}"), "train")


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_wants_to_run_code_never_does(tmp_path, official):
    official["data_batch_2"] = pickle.dumps(Hostile(tmp_path / "executed"))
    folder = write_folder(tmp_path / "cifar", official)
    report = check("cifar10", folder)
    assert "data_batch_2 has md5" in report.missing[0] and "refused, it holds io.open" in report.missing[1]
    with pytest.raises(UserError, match=r"data_batch_2: refused, it holds io.open"):
        load_data(DataConfig(source=f"cifar10:{folder}"), "train")
    assert not (tmp_path / "executed").exists()


def test_a_harmless_pickle_of_another_md5_is_read_and_reported(tmp_path, official):
    batch = pickle.loads(official["data_batch_2"])
    official["data_batch_2"] = pickle.dumps({"data": batch["data"][::-1], "labels": batch["labels"][::-1]}, protocol=2)
    folder = write_folder(tmp_path / "cifar", official)
    report = check("cifar10", folder)
    assert len(report.missing) == 1 and "data_batch_2 has md5" in report.missing[0] and not report.is_complete
    assert report.parts == {"train": 100, "test": 20}
    assert len(load_data(DataConfig(source=f"cifar10:{folder}"), "train")) == 90
    with pytest.raises(UserError, match=r"data_batch_2 has md5 .*; nothing was written"):
        prepare("cifar10", folder, tmp_path / "out")


def test_an_extracted_folder_becomes_parquet_with_the_same_pixels(tmp_path, official):
    folder = write_folder(tmp_path / "cifar", official)
    report = prepare("cifar10", folder, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    again = check("cifar10", tmp_path / "out")
    assert again.fingerprints == report.fingerprints and again.classes == report.classes
    before, after = (load_data(DataConfig(source=s), "validation") for s in (f"cifar10:{folder}", report.source))
    assert before.fingerprint == after.fingerprint


def test_a_folder_becomes_parquet_with_the_same_bytes(tmp_path, make_folder):
    root = make_folder({"train/cat": 10, "train/dog": 20, "val/dog": 3, "test": 4})
    report = prepare("folder", root, tmp_path / "out")
    assert report.parts == {"train": 30, "validation": 3, "test": 4} == report.splits
    assert report.source == f"parquet:{tmp_path / 'out'}" and report.classes == ("cat", "dog")
    for split in report.splits:
        before, after = (load_data(DataConfig(source=s), split) for s in (f"folder:{root}", report.source))
        assert before.fingerprint == after.fingerprint and before.classes == after.classes == ("cat", "dog")


def test_written_parquet_is_understood_by_hugging_face(tmp_path, make_folder):
    import datasets

    prepare("folder", make_folder({"cat": 2, "dog": 3}), tmp_path / "out")
    file = str(tmp_path / "out/train.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"), split="train")
    assert rows.features["label"].names == ["cat", "dog"] and isinstance(rows.features["image"], datasets.Image)
    assert rows["label"] == [0, 0, 1, 1, 1] and rows[0]["image"].size == (8, 8)


def test_nothing_is_written_over_or_half(tmp_path, make_folder):
    root = make_folder({"cat": 3})
    (root / "cat/broken.png").write_bytes(b"no image")
    assert check("folder", root).unreadable == ("cat/broken.png (not an image)",)
    with pytest.raises(UserError, match=r"broken.png .* nothing was written"):
        prepare("folder", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists; choose a new folder"):
        prepare("folder", root, root)


def test_a_slice_is_not_the_whole(shared):
    report = check("cifar100", shared / "fixtures/cifar100-slice")
    assert report.missing == ("train has 1000 of 50000 images", "test has 500 of 10000 images")
    assert report.parts == {"train": 1000, "test": 500} and len(report.classes) == 100


def test_what_imagenet_lacks_is_counted_and_named(shared):
    report = check("imagenet", shared / "fixtures/imagenet-sample")
    assert report.parts == {"test": 20} and len(report.classes) == 1000
    assert report.missing[:2] == ("train has 0 of 1281167 images", "test has 20 of 50000 images")
    assert report.missing[2].startswith("test has no image of 980 classes (n01443537, ")


def test_a_choice_of_imagenet_classes_has_fifty_test_images_each(shared, tmp_path):
    (tmp_path / "two.txt").write_text("n01698640\nn01440764\n")
    report = check("imagenet", f"{shared / 'fixtures/imagenet-sample'}@{tmp_path / 'two.txt'}")
    assert report.missing == ("test has 2 of 100 images",) and report.classes == ("n01440764", "n01698640")


def test_a_slice_of_tiny_imagenet_and_its_zip_file(shared, tmp_path):
    folder = shared / "fixtures/tiny-imagenet-200"
    report = check("tiny-imagenet", folder)
    assert report.parts == {"train": 50, "test": 20} and report.splits == {"train": 45, "validation": 5, "test": 20}
    assert report.missing == ("train has 50 of 100000 images", "test has 20 of 10000 images")
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, f"tiny-imagenet-200/{file.relative_to(folder).as_posix()}")
    assert check("tiny-imagenet", tmp_path / "tiny.zip").fingerprints == report.fingerprints


def test_what_tiny_imagenet_lacks_is_named(shared, tmp_path):
    root = shutil.copytree(shared / "fixtures/tiny-imagenet-200", tmp_path / "tiny", copy_function=shutil.copyfile)
    shutil.rmtree(root / "train/n02124075")
    (root / "val/images/val_1.JPEG").write_bytes(b"x")
    report = check("tiny-imagenet", root)
    assert report.missing[2] == "train has no image of 1 classes (n02124075, ...)"
    assert report.unreadable == ("val/images/val_1.JPEG (not an image)",)


def test_a_sample_of_celebahq(shared):
    report = check("celebahq", shared / "fixtures/celebamask_hq")
    assert report.parts == {"train": 2, "test": 1} and "classes: none, unlabelled" in report.lines()
    assert report.missing[:2] == ("train has 2 of 24183 images", "validation has 0 of 2993 images")


def test_flowers_without_photographs_are_no_set(shared):
    with pytest.raises(UserError, match=r"8189 of 8189 images are missing, first jpg/image_00001.jpg"):
        check("flowers102", shared / "fixtures/flowers-102")


def test_the_released_set_becomes_parquet(tmp_path, make_folder):
    root = make_folder({"": 20})
    for k in range(20):
        (root / f"{k:03d}.png").rename(root / f"class_{k % 2}_seed_0_num_{k // 2}.png")
    report = prepare("dmkd", root, tmp_path / "out")
    assert report.parts == {"train": 18, "validation": 2} and report.is_complete
    before, after = (load_data(DataConfig(source=s), "train") for s in (f"dmkd:{root}", report.source))
    assert before.fingerprint == after.fingerprint and after.classes == ("0", "1")


def test_a_long_check_says_how_far_it_is(make_folder, monkeypatch, capsys):
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    check("folder", make_folder({"train/cat": 5}))
    assert "reading train 4/5" in capsys.readouterr().err


def test_images_of_many_sizes_can_be_checked(shared):
    report = check("folder", shared / "fixtures/imagenet-sample")
    assert report.parts == {"validation": 20} and report.splits == {"train": 0, "validation": 20, "test": 0}


@pytest.mark.parametrize(
    ("name", "words"), [("cifar", "did you mean 'cifar10'"), ("digits", "valid: ade20k, celebahq")]
)
def test_unknown_names_are_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        check(name, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        check("folder", tmp_path / "nowhere")
