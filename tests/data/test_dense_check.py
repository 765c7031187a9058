"""Checking and preparing sets of masks, points and objects: pytest tests/data/test_dense_check.py"""

import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep.data import dense_check
from diffrep.data.archives import unpack
from diffrep.data.celebahq import MAPPING
from diffrep.data.celebamask import ORDERS, PART_FILES, part_path
from diffrep.data.datasets import DataConfig
from diffrep.data.dense import load_dense
from diffrep.data.dense_check import gathered
from diffrep.data.prepare import check, prepare
from diffrep.errors import UserError

INNER = {"celebamask-hq": "celebamask_hq", "wflw": "wflw", "ade20k": "ade20k", "coco": "coco"}  # of the samples
TASK = {"celebamask-hq": "segment", "wflw": "landmark", "ade20k": "segment", "coco": "detect"}


def packed(archive, folder):
    """A zip or .tar.gz of what is in a folder."""
    kind = {".zip": "zip", ".gz": "gztar"}[archive.suffix]
    made = shutil.make_archive(str(archive).removesuffix(archive.suffix).removesuffix(".tar"), kind, folder)
    assert made == str(archive)
    return archive


def zipped(archive, members):
    """A zip of (name or ZipInfo, bytes)."""
    with zipfile.ZipFile(archive, "w") as opened:
        for name, content in members:
            opened.writestr(name, content)
    return archive


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nothing_in(folder, but=()):
    return sorted(set(os.listdir(folder)) - set(but)) == []


@pytest.fixture
def sample_counts(monkeypatch):
    """The samples' own counts are the official ones."""
    monkeypatch.setattr(dense_check, "OFFICIAL_COUNTS", {
        "ade20k": {"test": 3}, "celebamask-hq": {"train": 2, "test": 1}, "coco": {"test": 4}, "wflw": {"test": 4},
    })  # fmt: skip


# Checking


def test_the_official_counts():
    assert dense_check.OFFICIAL_COUNTS == {  # dense.md sections 1a, 2a, 3a and the paper of COCO 2017
        "celebamask-hq": {"train": 24_183, "validation": 2_993, "test": 2_824},
        "ade20k": {"train": 20_210, "test": 2_000},
        "wflw": {"train": 7_500, "test": 2_500},
        "coco": {"train": 118_287, "test": 5_000},
    }


@pytest.mark.parametrize("name", INNER)
def test_a_sample_is_readable_and_not_the_whole_set(shared, name):
    report = check(name, f"{shared}/fixtures/{INNER[name]}")
    told = [sentence for fault in report.faults for sentence in fault.first]
    assert not report.is_complete and report.parts and report.licence in "\n".join(report.lines())
    assert all(" of " in sentence and sentence.endswith(("pictures", "faces")) for sentence in told)
    assert json.loads(json.dumps(report.to_json()))["parts"] == report.parts


@pytest.mark.parametrize("name", ["ade20k", "celebamask-hq", "wflw"])
def test_with_the_official_counts_a_set_is_complete(shared, sample_counts, name):
    report = check(name, f"{shared}/fixtures/{INNER[name]}")
    assert report.is_complete and not report.faults and not any(line.startswith("fault") for line in report.lines())
    assert report.to_json()["is_complete"] is True


def test_the_report_of_a_label_order(shared):
    lines = check("celebamask-hq", f"{shared}/fixtures/celebamask_hq@dataset").lines()
    assert "label order: dataset" in lines
    assert "fault: train has 2 of 24,183 pictures" in lines
    assert lines[3].startswith("classes: 19 (background, skin, nose, eye_g, ")


def test_the_fingerprint_is_what_a_run_records(shared):
    source = f"celebamask-hq:{shared}/fixtures/celebamask_hq"
    report = check("celebamask-hq", source.partition(":")[2])
    train = load_dense(DataConfig(source=source), "train", "segment", holds_out=False)
    assert report.fingerprints["train"] == train.fingerprint
    assert f"train: 2, sha256 {train.fingerprint[:16]}" in report.lines()


def test_faults_that_are_alike_are_counted():
    sentences = [f"a/{k}.png has {k}x8 pixels, official 512x512" for k in range(7)] + ["b_c.png is unreadable ('x y')"]
    first, second = gathered(sentences)
    assert (first.count, second.count) == (7, 1)
    assert first.first == tuple(sentences[:3])
    assert first.line().endswith("a/2.png has 2x8 pixels, official 512x512; and 4 more like these")
    assert second.line() == sentences[-1]


def test_a_set_that_no_run_can_read_is_described_all_the_same(shared, tmp_path):
    root = shutil.copytree(shared / "fixtures/celebamask_hq", tmp_path / "set") / "CelebAMask-HQ"
    for part in ("nose", "skin"):
        part_path(root / PART_FILES, 0, part).rename(part_path(root / PART_FILES, 0, f"{part}s"))
    report = check("celebamask-hq", tmp_path / "set")
    assert report.parts == {} and [fault.count for fault in report.faults] == [2]
    assert "no part 'noses'; did you mean 'nose'?" in report.faults[0].first[0]
    (root / MAPPING).unlink()
    assert "without it no test image is known" in check("celebamask-hq", tmp_path / "set").faults[0].line()


def test_pictures_that_cannot_be_decoded_are_named(shared, tmp_path, sample_counts):
    root = shutil.copytree(shared / "fixtures/ade20k", tmp_path / "set") / "ADEChallengeData2016"
    picture = root / "images/validation/ADE_val_00000002.jpg"
    picture.write_bytes(picture.read_bytes()[:2000])
    report = check("ade20k", tmp_path / "set")
    assert [fault.count for fault in report.faults] == [1] and not report.is_complete
    assert "picture 'images/validation/ADE_val_00000002.jpg' is unreadable" in report.faults[0].line()


def test_notes_do_not_make_a_set_incomplete(shared, tmp_path, sample_counts):
    shutil.copytree(shared / "fixtures/ade20k", tmp_path / "set")
    path = next((tmp_path / "set").rglob("ADE_val_00000001.png"))
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    report = check("ade20k", tmp_path / "set")
    assert report.is_complete and [note.count for note in report.notes] == [1]
    assert f"note: {path} has none of the 150 classes" in report.lines()


def test_an_archive_is_not_checked_but_prepared(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"x")
    assert "is a file; `diffrep data prepare ade20k" in refused(check, "ade20k", tmp_path / "a.zip")
    assert "prepare coco THE_ARCHIVES'_FOLDER" in refused(check, "coco", tmp_path / "a.zip")  # one of three is no set
    assert "does not exist" in refused(check, "wflw", tmp_path / "nowhere")


# Preparing


@pytest.mark.parametrize("order", ["", "@dataset", "@repfusion"])
def test_celebamask_from_its_zip(shared, tmp_path, order):
    archive = packed(tmp_path / "CelebAMask-HQ.zip", shared / "fixtures/celebamask_hq")
    report = prepare("celebamask-hq", f"{archive}{order}", tmp_path / "out")
    name = order.removeprefix("@") or "repfusion"
    assert report.is_complete and report.parts == {"train": 2, "test": 1}
    assert report.facts == {"label_order": name}
    assert sorted(f.name for f in (tmp_path / "out/CelebAMask-HQ" / f"mask-{name}").iterdir()) == [
        "0.png", "1.png", "2000.png",
    ]  # fmt: skip
    assert check("celebamask-hq", report.source.partition(":")[2]).parts == report.parts


@pytest.mark.parametrize("order", ORDERS)
def test_merged_masks_are_those_of_the_part_files(shared, tmp_path, order):
    source = f"{shared}/fixtures/celebamask_hq@{order}"
    report = prepare("celebamask-hq", source, tmp_path / "out")
    assert not (tmp_path / "out" / PART_FILES).exists()
    for split in ("train", "test"):
        slow, fast = (
            load_dense(DataConfig(source=name), split, "segment", holds_out=False)
            for name in (f"celebamask-hq:{source}", report.source)
        )
        assert len(slow) == len(fast) and slow.classes == fast.classes and slow.mirrored == fast.mirrored
        for row in range(len(slow)):
            assert all(torch.equal(a, b) for a, b in zip(slow[row], fast[row], strict=True))
    stored = Image.open(tmp_path / "out" / f"mask-{order}" / "1.png")
    assert stored.mode == "L" and stored.size == (512, 512)
    assert "nothing is to be merged" in refused(prepare, "celebamask-hq", f"{tmp_path}/out@{order}", tmp_path / "two")


def test_photographs_are_linked_not_copied(shared, tmp_path):
    shutil.copytree(shared / "fixtures/celebamask_hq", tmp_path / "set")
    prepare("celebamask-hq", tmp_path / "set", tmp_path / "out")
    photograph = tmp_path / "set/CelebAMask-HQ/CelebA-HQ-img/1.jpg"
    assert os.path.samefile(photograph, tmp_path / "out/CelebA-HQ-img/1.jpg")


def test_a_fault_while_merging_leaves_nothing(shared, tmp_path):
    root = shutil.copytree(shared / "fixtures/celebamask_hq", tmp_path / "set") / "CelebAMask-HQ"
    path = part_path(root / PART_FILES, 2000, "hair")
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} is unreadable" in refused(prepare, "celebamask-hq", tmp_path / "set", tmp_path / "out")
    assert nothing_in(tmp_path, ["set"])


def test_ade20k_from_its_zip(shared, tmp_path):
    archive = packed(tmp_path / "ADEChallengeData2016.zip", shared / "fixtures/ade20k")
    report = prepare("ade20k", archive, tmp_path / "out")
    assert report.source == f"ade20k:{tmp_path / 'out'}" and report.parts == {"test": 3} and report.is_complete
    assert [note.line() for note in report.notes] == [
        "train has 0 of 20,210 pictures", "test has 3 of 2,000 pictures",
    ]  # fmt: skip
    assert check("ade20k", tmp_path / "out").classes == report.classes
    assert prepare("ade20k", tmp_path, tmp_path / "two").parts == {"test": 3}  # the folder that holds it


def test_coco_from_the_folder_of_its_archives(shared, tmp_path):
    source, archives = shared / "fixtures/coco", tmp_path / "archives"
    archives.mkdir()
    for name, inside in (("val2017.zip", "val2017"), ("annotations_trainval2017.zip", "annotations")):
        zipped(archives / name, [(f"{inside}/{f.name}", f.read_bytes()) for f in sorted((source / inside).iterdir())])
    report = prepare("coco", archives, tmp_path / "out")
    assert report.parts == {"test": 4}
    assert load_dense(DataConfig(source=report.source), "test", "detect").fingerprint  # is read from there
    assert "comes as train2017.zip and val2017.zip" in refused(
        prepare, "coco", archives / "val2017.zip", tmp_path / "b"
    )


def test_wflw_from_the_folder_of_its_archives(shared, tmp_path):
    """The sample has JSON; its folders are packed as those of the text are."""
    archives = tmp_path / "archives"
    archives.mkdir()
    whole = packed(tmp_path / "whole.tar.gz", shared / "fixtures/wflw")
    with tarfile.open(whole) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    for name, belongs in (("WFLW_images", lambda n: "images" in n), ("WFLW_annotations", lambda n: "images" not in n)):
        with tarfile.open(archives / f"{name}.tar.gz", "w:gz") as tar:
            for path, content in members:
                if belongs(path):
                    member = tarfile.TarInfo(path)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    assert prepare("wflw", archives, tmp_path / "out").parts == {"test": 4}


@pytest.mark.parametrize("name", ["ade20k", "coco", "wflw"])
def test_a_folder_without_archives_needs_no_preparing(shared, tmp_path, name):
    told = refused(prepare, name, shared / "fixtures" / INNER[name], tmp_path / "out")
    assert f"holds none of {dense_check.ARCHIVES[name][0]}" in told and f"diffrep data check {name}" in told
    assert nothing_in(tmp_path)


def test_what_is_there_is_not_written_over(shared, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists; choose a new folder" in refused(
        prepare, "celebamask-hq", shared / "fixtures/celebamask_hq", tmp_path / "out"
    )


def test_the_archive_of_another_set_is_refused_in_its_own_words(shared, tmp_path):
    archive = packed(tmp_path / "ADEChallengeData2016.zip", shared / "fixtures/coco")
    told = refused(prepare, "ade20k", archive, tmp_path / "out")
    assert f"not in {archive}" in told and ".part" not in told  # not the folder aside, which is gone
    assert nothing_in(tmp_path, [archive.name])


# Archives


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "a\\evil.txt", link("a/evil.txt"), "..", "a/.."], ids=str
)
def test_members_that_leave_the_folder_are_refused(tmp_path, name):
    if isinstance(name, str):
        member = zipfile.ZipInfo("x")
        member.filename = name
    archive = zipped(tmp_path / "a.zip", [("good.txt", b"1"), (name if not isinstance(name, str) else member, b"2")])
    told = refused(prepare, "ade20k", archive, tmp_path / "in/out")
    assert "is not a plain file below the folder; nothing was written" in told
    assert nothing_in(tmp_path, ["a.zip", "in"]) and nothing_in(tmp_path / "in")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("evil")
    member.type, member.linkname = kind, "../outside"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(member)
    (tmp_path / "to").mkdir()
    assert "member 'evil' is not a plain file" in refused(unpack, tmp_path / "a.tar.gz", tmp_path / "to")
    assert nothing_in(tmp_path / "to")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a" * 300,)])
def test_members_in_each_others_way_are_refused(tmp_path, names):
    with pytest.warns(UserWarning) if names == ("a", "a") else pytest.MonkeyPatch.context():
        archive = zipped(tmp_path / "a.zip", [(name, b"1") for name in names])
    (tmp_path / "to").mkdir()
    assert "has no place beside the others" in refused(unpack, archive, tmp_path / "to")


def test_what_a_mac_adds_is_passed_over(tmp_path):
    members = [("__MACOSX/a/._1.jpg", b"x"), ("a/._1.jpg", b"x"), ("a/.DS_Store", b"x"), ("a/1.jpg", b"y"), ("b/", b"")]
    unpack(zipped(tmp_path / "a.zip", members), tmp_path / "to")
    assert [str(f.relative_to(tmp_path / "to")) for f in (tmp_path / "to").rglob("*") if f.is_file()] == ["a/1.jpg"]


def test_a_locked_archive_is_refused(tmp_path):
    content = bytearray(zipped(tmp_path / "a.zip", [("a.txt", b"1")]).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1  # as if it had a password
    (tmp_path / "a.zip").write_bytes(content)
    assert "is no readable zip or tar file" in refused(unpack, tmp_path / "a.zip", tmp_path / "to")


def archived(kind):
    """The bytes of a small archive, the same at every run."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") if kind == "zip" else tarfile.open(fileobj=file, mode="w") as opened:
        for k in range(3):
            content = bytes(range(k, 200 + k))
            if kind == "zip":
                opened.writestr(zipfile.ZipInfo(f"{k}.txt"), content)
            else:
                member = tarfile.TarInfo(f"{k}.txt")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return file.getvalue() if kind == "zip" else gzip.compress(file.getvalue(), mtime=0)


ARCHIVED = {"a.zip": archived("zip"), "a.tar.gz": archived("tar")}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["a.zip", "a.tar.gz"]))
def test_a_damaged_archive_is_unpacked_or_named(tmp_path, data, name):
    """Cut short, or with bytes changed: nothing beyond the folder, and never anything but one line."""
    archive, content = tmp_path / name, bytearray(ARCHIVED[name])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    archive.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    shutil.rmtree(tmp_path / "to", ignore_errors=True)
    try:
        unpack(archive, tmp_path / "to")
    except UserError as error:
        assert str(archive) in str(error) and "\n" not in str(error)
    assert nothing_in(tmp_path, ["to", "a.zip", "a.tar.gz"])


@pytest.mark.parametrize("name", ARCHIVED)
def test_one_changed_byte_of_a_picture_is_seen(tmp_path, name):
    """By the checksum, although nothing has to be decompressed here."""
    content = bytearray(
        ARCHIVED[name] if name == "a.zip" else gzip.compress(gzip.decompress(ARCHIVED[name]), 0, mtime=0)
    )
    content[content.index(bytes(range(2, 100))) + 50] ^= 1
    (tmp_path / name).write_bytes(content)
    assert "is no readable zip or tar file" in refused(unpack, tmp_path / name, tmp_path / "to")


def test_a_truncated_zip_leaves_nothing(shared, tmp_path):
    archive = packed(tmp_path / "CelebAMask-HQ.zip", shared / "fixtures/celebamask_hq")
    archive.write_bytes(archive.read_bytes()[:-200])
    told = refused(prepare, "celebamask-hq", archive, tmp_path / "out")
    assert f"{archive} is no readable zip or tar file" in told
    assert nothing_in(tmp_path, [archive.name])
