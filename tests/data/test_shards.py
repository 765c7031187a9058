"""A set on disk: the same samples give the same bytes, and every reader of WebDataset shards finds them."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep import _torchvision_compat
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.shards import (
    Sample,
    begin_set,
    bytes_per_image,
    check_shards,
    common_environment,
    content_hash,
    encoded,
    finished_shard,
    known_shards,
    label_counts,
    last_of_each,
    read_manifest,
    write_manifest,
    write_shard,
)
from diffrep.errors import UserError
from diffrep.files import ROOT_VARIABLE

SETTINGS = {"generator": "a" * 64, "seed": 3, "synthesis": {"images": 24}}
MANUAL = Path(__file__).parents[2] / "docs/synthesize.md"
CLASSES = ["cat", "dog", "eel"]


def pixels(seed, size=8):
    return np.random.default_rng(seed).integers(0, 256, (3, size, size), dtype=np.uint8)


def samples(rows, labelled=True):
    return [Sample(f"{n:08d}", pixels(n), n % 3 if labelled else -1, {"index": n // 3, "seed": n}) for n in rows]


def made(folder, count=24, per_shard=10, image_format="png", labelled=True):
    """A finished set of ``count`` images, classes in turn; returns its manifest."""
    begin_set(folder, SETTINGS)
    starts = range(0, count, per_shard)
    rows = [range(start, min(start + per_shard, count)) for start in starts]
    notes = [write_shard(folder, k, samples(r, labelled), image_format, {}) for k, r in enumerate(rows)]
    generator = {"name": "toy", "licence": "CC0", "labels_seen": {}, "sha256": "a" * 64}
    counts = label_counts(np.arange(count) % 3)
    return write_manifest(folder, SETTINGS, notes, {"generator": generator, "classes": CLASSES, "counts": counts})


# One shard


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_shard_is_webdatasets_layout_and_lossless(tmp_path, image_format):
    note = write_shard(tmp_path, 7, samples(range(3)), image_format, {"seconds": 1.5})
    assert note["name"] == "shard-000007.tar" and note["images"] == 3 and note["seconds"] == 1.5
    with tarfile.open(tmp_path / note["name"]) as tar:
        members = {m.name: m for m in tar}
        assert list(members) == [
            f"0000000{n}.{kind}" for n in range(3) for kind in sorted(("cls", "json", image_format))
        ]
        for n in range(3):
            image = Image.open(io.BytesIO(tar.extractfile(f"0000000{n}.{image_format}").read()))
            assert image.format == image_format.upper() and image.mode == "RGB"
            np.testing.assert_array_equal(np.array(image).transpose(2, 0, 1), pixels(n))
            assert tar.extractfile(f"0000000{n}.cls").read() == str(n).encode()
            assert json.loads(tar.extractfile(f"0000000{n}.json").read()) == {"index": 0, "seed": n}
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members.values()} == {(0, 0, 0, "", "")}


def test_the_same_samples_are_the_same_bytes_whatever_is_known_besides(tmp_path):
    first = write_shard(tmp_path / "a", 0, samples(range(5)), "png", {"seconds": 1})
    second = write_shard(tmp_path / "b", 0, samples(range(5)), "png", {"seconds": 2})
    assert first["sha256"] == second["sha256"]
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_what_a_shard_will_take_is_known_from_a_few_images(tmp_path):
    note = write_shard(tmp_path, 0, samples(range(40)), "png", {})
    assert bytes_per_image(np.stack([pixels(n) for n in range(5)]), "png") * 40 == pytest.approx(note["bytes"], rel=0.1)


def test_a_shard_counts_only_with_a_note_that_fits(tmp_path):
    note = write_shard(tmp_path, 0, samples(range(2)), "png", {})
    assert finished_shard(tmp_path, 0, {}) == note and finished_shard(tmp_path, 1, {}) is None
    path = tmp_path / ".shards/000000.json"
    for wrong in ("{", "[]", '{"name": "shard-000000.tar"}', json.dumps(note | {"sha256": "0" * 64})):
        path.write_text(wrong)
        assert finished_shard(tmp_path, 0, {}) is None
    path.unlink()
    assert finished_shard(tmp_path, 0, {"shard-000000.tar": note}) == note  # the manifest knows it
    os.truncate(tmp_path / "shard-000000.tar", note["bytes"] - 1)
    assert finished_shard(tmp_path, 0, {"shard-000000.tar": note}) is None


# The manifest


def test_the_content_hash_is_of_settings_and_shards(tmp_path):
    manifest = made(tmp_path / "set")
    found, shards = manifest["content_hash"], manifest["shards"]
    assert made(tmp_path / "again")["content_hash"] == found == content_hash(SETTINGS, shards)
    assert [s["images"] for s in shards] == [10, 10, 4] and manifest["images"] == 24
    other = [shards[0] | {"sha256": "0" * 64}, *shards[1:]]
    hashes = {content_hash(SETTINGS | {"seed": 4}, shards), content_hash(SETTINGS, other)}
    assert len(hashes | {content_hash(SETTINGS, shards[::-1]), content_hash(SETTINGS, shards[:2]), found}) == 5
    assert read_manifest(tmp_path / "set") == read_manifest(tmp_path / "set/manifest.json")
    assert read_manifest(tmp_path / "set")[1] == manifest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["settings"].update(seed=9), "was changed after it was written"),
        (lambda m: m["shards"][1].update(sha256="0" * 64), "was changed after it was written"),
        (lambda m: m["shards"].pop(), "was changed after it was written"),
        (lambda m: m.update(format=2), "is no manifest of a synthetic set of format 1"),
        (lambda m: m.pop("classes"), "is no manifest"),
        (lambda m: m.update(generator="toy"), "is no manifest"),
        (lambda m: m["shards"][0].update(bytes="many"), "is no manifest"),
        (lambda m: m["shards"][0].update(name="../shard-000000.tar"), "is no manifest"),
        (lambda m: m.update(shards=[]), "is no manifest"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change, told):
    manifest = made(tmp_path)
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=told):
        read_manifest(tmp_path)
    assert known_shards(tmp_path) == {}


def test_no_manifest_is_no_set(tmp_path):
    write_shard(tmp_path, 0, samples(range(2)), "png", {})
    for place in (tmp_path, tmp_path / "manifest.json", tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=r"is no finished synthetic set \(no manifest.json\): run diffrep synthesize"
        ):
            read_manifest(place)
    (tmp_path / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="is not readable JSON"):
        read_manifest(tmp_path)


def test_machines_that_differ_are_all_named(tmp_path):
    one = {"environment": {"device": "x86_64", "torch": "2.9"}}
    two = {"environment": {"device": "x86_64", "torch": "2.8"}}
    assert common_environment(tmp_path, [one, one]) == one["environment"]
    assert common_environment(tmp_path, [one, two, one]) == {"device": "x86_64", "torch": ["2.9", "2.8"]}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("seed", 4, "holds images of another seed"),
        ("generator", "b" * 64, "holds images of another generator"),
        ("synthesis", {"images": 25}, "holds images of other settings"),
    ],
)
def test_a_folder_holds_one_set(tmp_path, name, change, told):
    made(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for left in ("settings.json", "manifest.json"):
        with pytest.raises(UserError, match=f"{told}; choose another --out"):
            begin_set(tmp_path, SETTINGS | {name: change})
        assert {p: p.read_bytes() for p in before if p.exists()} == {p: v for p, v in before.items() if p.exists()}
        (tmp_path / left).unlink()  # either file alone says what the folder holds
        begin_set(tmp_path, SETTINGS)


# As a data source


def test_a_tenth_of_each_class_is_held_out_and_the_rest_is_the_training_part(tmp_path):
    made(tmp_path, count=60)
    parts = {split: load_data(DataConfig(source=f"synthetic:{tmp_path}"), split) for split in ("train", "validation")}
    assert parts["train"].classes == tuple(CLASSES)
    assert {split: len(part) for split, part in parts.items()} == {"train": 54, "validation": 6}
    for split, numbers in (("train", range(54)), ("validation", range(54, 60))):
        assert parts[split].labels.bincount().tolist() == [len(numbers) // 3] * 3
        for row, n in enumerate(numbers):  # the last drawn of each class are held out
            np.testing.assert_array_equal(parts[split].gather(torch.tensor([row]))[0], pixels(n))
            assert int(parts[split].labels[row]) == n % 3
    with pytest.raises(UserError, match="test"):
        load_data(DataConfig(source=f"synthetic:{tmp_path}"), "test")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=120))
@settings(max_examples=60, deadline=None)
def test_a_tenth_is_held_out_of_all_and_of_each_class(labels):
    labels = torch.tensor(labels)
    held = last_of_each(labels, 0.1)
    assert int(held.sum()) == round(0.1 * len(labels))
    for label in labels.unique():
        mine = held[labels == label]
        assert abs(float(mine.sum()) - 0.1 * len(mine)) < 1
        assert mine.tolist() == sorted(mine.tolist())  # the last ones


def test_a_set_below_the_data_folder_is_found(tmp_path, monkeypatch):
    made(tmp_path / "root/data/set")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/set is no finished synthetic set"):
        read_manifest("data/set")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "root"))
    assert read_manifest("data/set")[0] == tmp_path / "root/data/set"


@pytest.mark.parametrize("damage", ["half", "flipped", "gone"])
def test_a_damaged_shard_is_named_before_an_image_is_read(tmp_path, damage):
    made(tmp_path)
    path = tmp_path / "shard-000001.tar"
    found = bytearray(path.read_bytes())
    found[700] ^= 1
    path.write_bytes(found if damage == "flipped" else found[: len(found) // 2])
    if damage == "gone":
        path.unlink()
    told = "is missing" if damage == "gone" else "is not as it was written"
    with pytest.raises(UserError, match=rf"shard-000001.tar {told}.*: the command that made the set makes this shard"):
        load_data(DataConfig(source=f"synthetic:{tmp_path}"), "train")


def test_a_shard_is_read_once_for_all_splits_and_again_when_it_changed(tmp_path):
    """The hash of a file is remembered only as long as its size and time stand still."""
    manifest = made(tmp_path)
    check_shards(tmp_path, manifest)
    path = tmp_path / "shard-000000.tar"
    found = bytearray(path.read_bytes())
    found[700] ^= 1
    path.write_bytes(found)
    with pytest.raises(UserError, match="is not as it was written"):
        check_shards(tmp_path, manifest)


# Read elsewhere


@pytest.fixture(params=["png", "webp"])
def kept(request, tmp_path):
    """A set in either format, and the name of its image field."""
    made(tmp_path / "set", image_format=request.param)
    return tmp_path / "set", request.param


def assert_all(pairs):
    """(image, label) of every image of the set, in order."""
    found = list(pairs)
    assert len(found) == 24
    for n, (image, label) in enumerate(found):
        np.testing.assert_array_equal(np.array(image).transpose(2, 0, 1), pixels(n))
        assert label == n % 3


def test_webdataset_reads_it(kept):
    wds = pytest.importorskip("webdataset", reason="needs the package webdataset")
    folder, image_format = kept
    found = wds.WebDataset(f"{folder}/shard-{{000000..000002}}.tar", shardshuffle=False).decode("pil")
    assert_all(found.to_tuple(image_format, "cls"))


def test_hugging_face_datasets_reads_it(kept, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder, image_format = kept
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"]  # the shards, and neither manifest nor notes
    assert_all((row[image_format], row["cls"]) for row in found["train"])
    assert [row["json"]["seed"] for row in found["train"]] == list(range(24))


def test_timm_reads_it(kept):
    pytest.importorskip("webdataset", reason="timm's reader needs the package webdataset")
    _torchvision_compat.install()
    from timm.data import create_dataset

    folder, _ = kept  # it finds the image field itself
    found = create_dataset(f"wds/{folder}", str(folder), split="train", batch_size=4)
    assert len(found) == 24
    assert_all(found)


def test_the_manuals_snippets_run(tmp_path, monkeypatch, capsys):
    """On a set of the layout that the page's own commands write: three shards of PNG."""
    for package in ("webdataset", "datasets"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    import datasets

    made(tmp_path / "runs/set", image_format="png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _torchvision_compat.install()
    snippets = re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, MANUAL.name, "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said == ["(8, 8) 0", "(8, 8) 0 {'index': 0, 'seed': 0}", "(8, 8) 0"]


def test_encoding_is_lossless_for_black_and_for_one_pixel():
    for image in (np.zeros((3, 1, 1), np.uint8), np.full((3, 5, 3), 255, np.uint8)):
        for image_format in ("png", "webp"):
            found = np.array(Image.open(io.BytesIO(encoded(image, image_format))).convert("RGB"))
            np.testing.assert_array_equal(found.transpose(2, 0, 1), image)
