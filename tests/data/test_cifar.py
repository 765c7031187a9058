"""CIFAR in its python and binary forms, and pickles that do nothing: pytest tests/data/test_cifar.py"""

import os
import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.pickles import read_plain
from diffrep.errors import UserError

NAMES_10, NAMES_100 = [f"class {k}" for k in range(10)], [f"fine {k}" for k in range(100)]


def planes(seed: int, count: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def load(source, split="train"):
    return load_data(DataConfig(source=source), split)


def refused(source):
    with pytest.raises(UserError) as caught:
        load(source, "test")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_pickles_100(root, protocol=4, **changes):
    """cifar-100-python with 20 images per file; ``changes`` replace fields of test."""
    root.mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        fields = {
            "data": planes(number), "fine_labels": [(7 * k) % 100 for k in range(20)],
            "coarse_labels": list(range(20)), "filenames": [f"{k}.png" for k in range(20)],
            "batch_label": part,
        }  # fmt: skip
        fields |= changes if part == "test" else {}
        (root / part).write_bytes(pickle.dumps(fields, protocol))
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES_100, "coarse_label_names": ["x"] * 20}))
    return root


def write_binary_100(root, records=None):
    root.mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        heads = np.array([[k, (7 * k) % 100] for k in range(20)], dtype=np.uint8)
        content = np.concatenate([heads, planes(number)], 1).tobytes()
        (root / f"{part}.bin").write_bytes(content if records is None or part == "train" else records(content))
    (root / "fine_label_names.txt").write_text("\n".join(NAMES_100) + "\n\n")
    return root


def test_both_forms_and_both_ways_to_name_the_folder_are_one_set(tmp_path):
    pickles = write_pickles_100(tmp_path / "p/cifar-100-python")
    binary = write_binary_100(tmp_path / "b/cifar-100-binary")
    sets = [load(f"cifar100:{p}", "test") for p in (pickles, pickles.parent, binary, binary.parent)]
    assert len({s.fingerprint for s in sets}) == 1
    assert sets[0].labels.tolist() == [(7 * k) % 100 for k in range(20)] and sets[0].classes[99] == "fine 99"
    expected = torch.from_numpy(planes(1).reshape(-1, 3, 32, 32))
    assert torch.equal(sets[2].gather(torch.arange(20)), expected)


def test_cifar10_binary_has_one_label_byte(tmp_path):
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels = np.arange(20, dtype=np.uint8)[:, None] % 10
        (root / f"{name}.bin").write_bytes(np.concatenate([labels, planes(number)], 1).tobytes())
    (root / "batches.meta.txt").write_text("\n".join(NAMES_10) + "\n")
    sets = [load(f"cifar10:{tmp_path}", split) for split in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [90, 10, 20] and sets[2].labels.tolist() == [*range(10), *range(10)]
    every = torch.cat([s.gather(torch.arange(len(s))) for s in sets]).flatten(1).tolist()
    assert sorted(every) == sorted(np.concatenate([planes(n) for n in range(6)]).tolist())


def test_the_whole_form_is_preferred(tmp_path):
    write_pickles_100(tmp_path / "cifar-100-python")
    write_binary_100(tmp_path / "cifar-100-binary")
    (tmp_path / "cifar-100-python/meta").unlink()
    assert len(load(f"cifar100:{tmp_path}", "test")) == 20  # of the binary form
    (tmp_path / "cifar-100-binary/test.bin").unlink()
    assert "meta is missing; get the official archive" in refused(f"cifar100:{tmp_path}")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (lambda c: c[:-1], "3073 bytes stand after 19 records of 3074 bytes"),
        (lambda c: c + b"x", "1 bytes stand after 20 records"),
        (lambda c: b"", "0 bytes stand after 0 records"),
        (lambda c: c[: 5 * 3074] + b"\x14" + c[5 * 3074 + 1 :], "record 5 has coarse label 20; valid: 0 to 19"),
        (lambda c: c[:1] + b"\x64" + c[2:], "'test[0]' has label 100; valid: 0 to 99"),
    ],
)
def test_damaged_binaries_are_named(tmp_path, records, words):
    assert words in refused(f"cifar100:{write_binary_100(tmp_path / 'b', records)}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": planes(1).astype(np.float64)}, "'data' is float64 (20, 3072)"),
        ({"data": planes(1)[:, :3000]}, "'data' is uint8 (20, 3000)"),
        ({"data": None}, "refused, it holds a value of type NoneType"),
        ({"data": "text"}, "'data' is <U4 ()"),
        ({"fine_labels": [0] * 19}, "'fine_labels' is not a list of 20 whole numbers"),
        ({"fine_labels": ["cat"] * 20}, "'fine_labels' is not a list of 20 whole numbers"),
        ({"fine_labels": [2**70] * 20}, "'fine_labels' is not a list of 20 whole numbers"),
        ({"fine_labels": [100] * 20}, "'test[0]' has label 100; valid: 0 to 99"),
    ],
)
def test_pickles_that_hold_something_else_are_named(tmp_path, changes, words):
    assert words in refused(f"cifar100:{write_pickles_100(tmp_path / 'p', **changes)}")


# Pickles

DATA = {
    "a": planes(3, 2), "b": np.arange(6, dtype=np.int64).reshape(2, 3).T, "c": [np.int64(3), 4], "d": b"\xff\x00",
    "e": "text", "f": {"g": [1]}, "h": 2**70, "i": np.arange(3, dtype=">i4"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol_is_read(tmp_path, protocol):
    (tmp_path / "file").write_bytes(pickle.dumps(DATA, protocol))
    found = read_plain(tmp_path / "file")
    assert found.keys() == DATA.keys()
    for key, value in DATA.items():
        np.testing.assert_array_equal(found[key], value)
        assert type(found[key]) is type(value)


def test_a_pickle_of_python_2_is_read(tmp_path):
    """The opcodes as cPickle of Python 2 wrote the official files: protocol 2, text as bytes, numpy.core."""
    raw = bytes(range(6))
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x06" + raw + b"tbU\x06labels]q\x08(K\x01K\x02eu."
    )
    (tmp_path / "file").write_bytes(content)
    found = read_plain(tmp_path / "file")
    assert found["data"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["labels"] == [1, 2]


class Calls:
    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


HOSTILE = [
    Calls(os.system, "touch executed"), Calls(eval, "1"), Calls(getattr, 1, "real"), Calls(np.load, "x"),
    Calls(np.ndarray, (1,), object, b"\x41" * 8), Calls(np.dtype, "O"), OrderedDict(a=1), random.Random(0), {1, 2}, 1.5,
    np.array([None]), np.array(["text"]), np.zeros(2, dtype=[("a", "u1")]), (1, 2), None,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_everything_else_is_refused_and_nothing_runs(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(pickle.dumps({"data": value}, protocol))
    with pytest.raises(UserError, match=r"file(: refused, it holds | is not a readable pickle)") as caught:
        read_plain(tmp_path / "file")
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch executed'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",  # STACK_GLOBAL
        b"cnumpy\ndtype\n}S'_build'\ncnumpy\nndarray\nsb0}.",  # BUILD on a name that may be called
        b"cnumpy\ndtype\nN}S'_build'\nI1\ns\x86b0}.",  # the same by way of slots
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pname\n.",  # PERSID
        b"}.rest",
        b"]I1\na.",  # no dict
        b"r\xff\xff\xff\xff.",  # a memo of four thousand million places
        b"\x80\x05\x96\x00\x00\x00\x00\x04\x00\x00\x00.",  # a bytearray of 16 GiB that is not there
        b"cos\rx\nsystem\n.",  # a name of two lines
        b"",
    ],
)
def test_handmade_pickles_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_plain(tmp_path / "file")
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()
    (tmp_path / "plain").write_bytes(pickle.dumps(DATA))
    assert read_plain(tmp_path / "plain")["e"] == "text"  # and the reader is as it was


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(0, 5))
def test_a_damaged_pickle_is_read_or_refused_in_one_line(tmp_path_factory, data, protocol):
    content = bytearray(pickle.dumps(DATA, protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        assert isinstance(read_plain(file), dict)
    except UserError as error:
        assert "\n" not in str(error)
