"""WebDataset shards of others, in place and larger than memory: pytest tests/data/test_tars.py"""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep.assemble import train
from diffrep.data import datasets, tars
from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.feed import Feed
from diffrep.data.sources import read_source
from diffrep.errors import Interrupted, UserError
from diffrep.recipes.addp import tokenizer_digits

CROPS = "resized_crop:1000:0.2:bicubic"


def jpeg(seed, side=12):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def img2dataset(folder, shards=3, each=8):
    """As img2dataset and timm write them: a numbered tar of numbered samples, and what is known beside each."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        members = {}
        for key in range(shard * each, shard * each + each):
            members[f"{key:06d}.jpg"] = jpeg(key)
            members[f"{key:06d}.json"] = json.dumps({"key": f"{key:06d}", "status": "success"}).encode()
            members[f"{key:06d}.cls"] = str(key % 3).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"shards:{folder}/{{00000..{shards - 1:05d}}}.tar"


def refused(source):
    with pytest.raises(UserError) as caught:
        read_source(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Larger than memory


def feed(source, seed=0):
    config = DataConfig(source=source, image_size=8, augment=CROPS)
    return Feed(load_data(config, "train"), config, 4, seed, None)


def test_batches_of_streamed_shards_are_those_of_a_resident_set_by_seed_and_step(tmp_path, monkeypatch):
    source, cpu = img2dataset(tmp_path / "set"), torch.device("cpu")
    resident = feed(source)
    monkeypatch.setattr(datasets, "RESIDENT_BYTES", 0)
    streamed, other = feed(source), feed(source, seed=1)
    assert resident.images.is_resident and not streamed.images.is_resident
    for step in (5, 0, 2):  # in any order: nothing is left behind by the step before
        wanted, found = resident.batch(step, [0, 1, 2, 3], cpu), streamed.batch(step, [0, 1, 2, 3], cpu)
        assert torch.equal(found.images, wanted.images) and torch.equal(found.labels, wanted.labels)
        assert torch.equal(streamed.batch(step, [1, 3], cpu).images, wanted.images[[1, 3]])
    epoch = len(streamed.images)
    order = torch.cat([streamed.index(step) for step in range(epoch)])
    assert torch.equal(order.view(4, epoch).sort(1).values, torch.arange(epoch).expand(4, -1))
    assert not torch.equal(order, torch.cat([other.index(step) for step in range(epoch)]))


def test_a_run_on_streamed_shards_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "RESIDENT_BYTES", 0)
    data = DataConfig(source=img2dataset(tmp_path / "set"), image_size=8, augment=CROPS)
    recipe = tokenizer_digits()
    recipe = recipe.model_copy(
        update={"data": data, "train": recipe.train.model_copy(update={"steps": 4, "batch_size": 4})}
    )
    train(recipe, tmp_path / "whole")
    asked = iter((False, True))
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        train(recipe, tmp_path / "broken", stop=lambda: next(asked))
    tars._held.clear()  # as in another process
    train(recipe, tmp_path / "broken")
    kept = [tmp_path / name / "checkpoints/step-00000004/state.safetensors" for name in ("whole", "broken")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_an_index_holds_little_and_reads_no_image(tmp_path):
    """Members of 2 GiB, which are holes in the file: whoever read them would be noticed."""
    count, size = 4, 2 * 2**30
    with open(tmp_path / "train-0.tar", "wb") as file:
        for key in range(count):
            for extension, length in (("jpg", size), ("cls", 1)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = length
                file.write(member.tobuf())
                data = file.tell()
                file.write(b"7" if extension == "cls" else b"")
                file.seek(data + -(-length // 512) * 512)
        file.truncate(file.tell() + 1024)
    tracemalloc.start()
    part = read_source(f"shards:{tmp_path}/train-0.tar").parts["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.labels.tolist() == [7] * count and part.files[0][1] > count * size
    assert peak < 2**20


def test_what_is_kept_of_a_sample_is_some_hundred_bytes(tmp_path):
    count, one = 500, jpeg(0)
    write_tar(
        tmp_path / "a.tar", {f"{k:09d}.{e}": one if e == "jpg" else b"1" for k in range(count) for e in ("jpg", "cls")}
    )
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    part = tars.shard_part([str(tmp_path / "a.tar")])
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(part) == count and kept < 300 * count


def test_a_shard_is_indexed_once_for_all_splits_and_again_when_it_changed(tmp_path, monkeypatch):
    source, opened, true = img2dataset(tmp_path / "set"), [], tars._indexed
    monkeypatch.setattr(tars, "_indexed", lambda place, file: (opened.append(place), true(place, file))[1])
    monkeypatch.setattr(datasets, "RESIDENT_BYTES", 0)
    sets = [load_data(DataConfig(source=source, image_size=8), split) for split in ("train", "validation", "test")]
    assert sum(map(len, sets)) == 24 and len(opened) == 3
    write_tar(tmp_path / "set/00001.tar", {f"{k}.jpg": jpeg(k) for k in range(3)})
    assert len(read_source(source).parts["train"]) == 19 and opened[3:] == [str(tmp_path / "set/00001.tar")]


# Layouts


def test_keys_go_to_the_first_dot_and_folders_are_part_of_them(tmp_path):
    members = {
        "a/x.1.jpg": jpeg(0),
        "a/x.jpg": jpeg(1),
        "a/x.cls": b"2",
        "b/x.JPEG": jpeg(2),
        "b/x.cls": b" 1\n",
        "c.txt": b"",
    }
    part = read_source(f"shards:{write_tar(tmp_path / 's.tar', members)}").parts["train"]
    assert part.names == ["s.tar:a/x", "s.tar:b/x"] and part.labels.tolist() == [2, 1]
    assert [part.read(row) for row in range(2)] == [jpeg(1), jpeg(2)]


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"cls": b"3"}, 3), ({"json": b'{"label": 3}'}, 3), ({"json": b'{"label": "3"}'}, 3), ({"json": b"{}"}, -1),
        ({"json": b'{"label": 1}', "cls": b"3"}, 3), ({}, -1), ({"txt": b"a fish"}, -1),
    ],
)  # fmt: skip
def test_a_label_stands_in_cls_or_else_in_json(tmp_path, fields, label):
    members = {
        "0.jpg": jpeg(0),
        "1.jpg": jpeg(1),
        "1.cls": b"9",
        **{f"0.{kind}": text for kind, text in fields.items()},
    }
    part = read_source(f"shards:{write_tar(tmp_path / 's.tar', members)}").parts["train"]
    assert part.labels.tolist() == [label, 9]


@pytest.mark.parametrize(
    "fields",
    [
        {"cls": b""}, {"cls": b"cat"}, {"cls": b"1.5"}, {"cls": b"9" * 30}, {"cls": b"\xff"}, {"json": b"{"},
        {"json": b'{"label": 1.5}'}, {"json": b'{"label": true}'}, {"json": b'{"label": null}'}, {"json": b"[1]"},
        {"json": b"[" * 100_000},
    ],
)  # fmt: skip
def test_a_label_that_is_no_whole_number_names_its_sample(tmp_path, fields):
    members = {"0.jpg": jpeg(0), **{f"0.{kind}": text for kind, text in fields.items()}}
    told = refused(f"shards:{write_tar(tmp_path / 's.tar', members)}")
    assert told == "s.tar:0: the label in .cls or .json is not a whole number"


# What cannot be used


@pytest.mark.parametrize(
    "text", ["pipe:cat x", "pipe://cat x", "PIPE://cat x", " pipe://x", "s3://a/b.tar", "p\tipe://x"]
)
def test_commands_and_unknown_schemes_are_refused(text):
    assert "runs no commands; name files or a URL of http, https, file" in refused(f"shards:{text}")


def test_urls_bring_no_more_than_a_limit_into_memory(tmp_path, monkeypatch):
    img2dataset(tmp_path / "set")
    urls = f"shards:file://{tmp_path}/set/{{00000..00002}}.tar"
    size = (tmp_path / "set/00000.tar").stat().st_size
    monkeypatch.setattr(tars, "REMOTE_BYTES", 3 * size)
    assert len(read_source(urls).parts["train"]) == 24
    monkeypatch.setattr(tars, "REMOTE_BYTES", 3 * size - 1)
    tars._held.clear()
    assert "copy the shards to a disk and name the files" in refused(urls)
    assert "is not a readable tar file" in refused(f"shards:file://{tmp_path}/nowhere.tar")


@pytest.mark.parametrize("name", ["a.tar.gz", "folder.tar", "short.tar"])
def test_what_is_no_tar_is_named(tmp_path, name):
    (tmp_path / "folder.tar").mkdir()
    img2dataset(tmp_path / "set")
    whole = (tmp_path / "set/00000.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[:700])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "set/00000.tar")
    told = refused(f"shards:{tmp_path}/{name}")
    assert f"{name} is not a readable tar file (" in told and "shards are uncompressed" in told


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=20), st.integers(0, 6000))
def test_a_damaged_shard_is_read_or_refused_in_one_line(tmp_path_factory, changes, length):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(
        write_tar(path, {"0.jpg": b"x" * 700, "0.cls": b"1", "1.png": b"y", "1.json": b"{}"}).read_bytes()
    )
    for place, value in changes:
        content[place] = value
    path.write_bytes(content[: len(content) - length])
    try:
        part = read_source(f"shards:{path}").parts["train"]
    except UserError as error:
        assert "\n" not in str(error) and "damaged.tar" in str(error)
    else:
        assert 1 <= len(part) <= 4
