"""Lists of images and the set that DM-KD released: pytest tests/data/test_lists.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.lists import labelled_lines, read_indexed
from diffrep.data.sources import read_source
from diffrep.errors import UserError


def refused(source):
    with pytest.raises(UserError) as caught:
        read_source(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def released(make_folder):
    """Classes 2 and 11 with 2 seeds of 10 images, as AIGC_generate.py names them; the pixels come in no order."""
    root = make_folder({"": 40})
    names = [f"class_{c}_seed_{s}_num_{i}.png" for c in (11, 2) for s in (10, 9) for i in range(10)]
    for k, name in enumerate(names):
        (root / f"{k:03d}.png").rename(root / name)
    return root


def write_list(root, lines, name="s2_st100_40.txt"):
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


def test_the_flat_folder_is_ordered_by_number_and_a_tenth_of_each_class_is_held_out(released):
    source = read_source(f"dmkd:{released}")
    train, validation = source.parts["train"], source.parts["validation"]
    assert train.labels.tolist() == [2] * 18 + [11] * 18 and len(source.classes) == 12
    assert train.names[0] == "class_2_seed_9_num_0.png" and train.names[17] == "class_2_seed_10_num_7.png"
    assert validation.names == [f"class_{c}_seed_10_num_{i}.png" for c in (2, 11) for i in (8, 9)]
    assert load_data(DataConfig(source=f"dmkd:{released}"), "train").labels.bincount()[[2, 11]].tolist() == [18, 18]
    with pytest.raises(UserError, match="no test split"):
        load_data(DataConfig(source=f"dmkd:{released}"), "test")


def test_no_file_is_lost_where_two_have_the_same_numbers(released):
    (released / "class_2_seed_9_num_0.png").rename(released / "class_02_seed_9_num_1.png")
    assert sum(map(len, read_source(f"dmkd:{released}").parts.values())) == 40


def test_a_list_of_paths_is_the_same_set_as_its_folder(released):
    train = read_source(f"dmkd:{released}").parts
    order = [*train["train"].names[:18], *train["validation"].names[:2]]
    order += [*train["train"].names[18:], *train["validation"].names[2:]]
    by_list = f"dmkd:{write_list(released, [order[0], f'./{order[1]}', str(released / order[2]), '', *order[3:]])}"
    for split in ("train", "validation"):
        sets = [load_data(DataConfig(source=s), split) for s in (by_list, f"dmkd:{released}")]
        assert sets[0].fingerprint == sets[1].fingerprint


def test_a_list_with_labels_is_the_part_that_its_name_speaks_of(make_folder):
    root = make_folder({"some folder/n01": 2, "n02": 3})
    lines = ["some folder/n01/000.png 7", "n02/002.png 0", "some folder/n01/001.png 7"]
    images = load_data(DataConfig(source=f"dmkd:{write_list(root, lines, 'test.txt')}"), "test")
    assert images.labels.tolist() == [7, 0, 7]
    expected = np.asarray(Image.open(root / "n02/002.png")).transpose(2, 0, 1)
    assert np.array_equal(images.gather(torch.tensor([1]))[0].numpy(), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: [*n, "class_1_seed_0_num_0.png", "a/class_1_seed_0_num_1.png"],
         "2 of 42 images are missing, first class_1_seed_0_num_0.png (looked for in"),
        (lambda n: [*n, n[3]], "1 images are listed more than once, first class_11_seed_10_num_3.png"),
        (lambda n: [*n, "class_x_seed_0_num_0.png", "image.png"],
         "2 of 42 names are not class_{C}_seed_{S}_num_{I}.png, first 'class_x_seed_0_num_0.png'"),
        (lambda n: [*n, "n01440764_1.png"], "1 of 41 names are not class_{C}"),
        (lambda n: [f"{n[0]} cat"], "has label 'cat'; a line is `path label`"),
        (lambda n: [f"{n[0]} -1"], "has label '-1'"),
        (lambda n: [f"{n[0]} 99999999999999999999"], "has label '99999999999999999999'"),
        (lambda n: [f"{n[0]} 70000"], "has label 70000; valid: 0 to 65535"),
        (lambda n: ["", " "], "the list is empty"),
        (lambda n: ["class_1_seed_0_num_0.png\0"], "1 of 1 images are missing"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_named(released, change, words):
    names = [f"class_{c}_seed_{s}_num_{i}.png" for c in (11, 2) for s in (10, 9) for i in range(10)]
    assert words in refused(f"dmkd:{write_list(released, change(names))}")


def test_folders_that_do_not_fit_are_named(released, tmp_path):
    (released / "class_3_num_1.png").write_bytes(b"")
    assert "1 of 41 names are not class_{C}_seed_{S}_num_{I}.png, first 'class_3_num_1.png'" in refused(
        f"dmkd:{released}"
    )
    (tmp_path / "empty").mkdir()
    assert "holds no images; they lie directly in the folder" in refused(f"dmkd:{tmp_path / 'empty'}")
    (tmp_path / "set.tar").write_bytes(b"\xff" * 20)
    assert "is not a readable list" in refused(f"dmkd:{tmp_path / 'set.tar'}")
    assert "does not exist" in refused(f"dmkd:{tmp_path / 'nowhere'}")


words = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(words, words, st.none() | st.integers(0, 999)), min_size=1, max_size=5), st.booleans())
def test_what_is_written_is_read_back(tmp_path_factory, rows, has_returns):
    written = [(f"{folder} x/{name}.JPEG", label) for folder, name, label in rows]
    lines = [path if label is None else f"{path} {label}" for path, label in written]
    file = tmp_path_factory.getbasetemp() / "list.txt"
    file.write_bytes(("\r\n" if has_returns else "\n").join(lines).encode())
    assert labelled_lines(file) == [(path, None if label is None else str(label)) for path, label in written]


# Lists of `relative/path class_index`


def indexed(tmp_path, content):
    (tmp_path / "train.txt").write_bytes(content)
    return read_indexed(tmp_path / "train.txt", 1000)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"n01/a.JPEG 0\nn02/b.png 999", {"n01/a.JPEG": 0, "n02/b.png": 999}),
        (b"my cats/a cat 2 .JPEG 7\r\nb.jpg\t\t8\r\n\r\n", {"my cats/a cat 2 .JPEG": 7, "b.jpg": 8}),
        (b"\xef\xbb\xbf./n01//\xc3\xa4 1.JPEG 007 \n", {"n01/\u00e4 1.JPEG": 7}),
        ("n\u2028m\x0cl.webp 3".encode(), {"n\u2028m\x0cl.webp": 3}),  # one line: only \n ends one
    ],
)
def test_the_index_is_the_last_word_of_a_line(tmp_path, content, expected):
    assert indexed(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a.jpg 0\n\nb.jpg 1000\n", "train.txt, line 3: class index '1000'; valid: 0 to 999"),
        (b"a.jpg 0\nb c.jpg -1", "line 2: class index '-1'; valid: 0 to 999"),
        (b"a.jpg 1.0", "line 1: class index '1.0'"),
        ("a.jpg \u0663".encode(), "line 1: class index '\u0663'"),  # a digit, of another script
        (b"a.jpg 99999999999999999999", "line 1: class index '99999999999999999999'"),
        (b"a.jpg 0\nb c.jpg\n", "line 2: class index 'c.jpg'; valid: 0 to 999, at the end of `relative/path class_ind"),
        (b"a.jpg n01440764", "line 1: class index 'n01440764'"),
        (b"7", "line 1: '7' is no image; a line is `relative/path class_index`"),
        (b"the classes 7", "line 1: 'the classes' is no image"),
        (b"a.jpg 0\n./a.jpg 0\n", "line 2: 'a.jpg' is listed a second time"),
        (b"a.jpg 0\na.jpg 1\n", "line 2: 'a.jpg' is listed a second time"),
        (b"/etc/a.jpg 0", "line 1: '/etc/a.jpg' leaves the folder"),
        (b"n01/../../a.jpg 0", "line 1: 'n01/../../a.jpg' leaves the folder"),
        (b"", "train.txt: the list is empty"),
        (b"\r\n \t\n", "train.txt: the list is empty"),
        (b"a.jpg 0\n\xff.jpg 1", "train.txt is not a readable list ("),
        (b"\x89PNG\r\n\x1a\n", "is not a readable list"),
    ],
)
def test_a_line_that_does_not_fit_is_named_by_its_number(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        indexed(tmp_path, content)
    assert words in str(caught.value) and "\n" not in str(caught.value)


pieces = st.sampled_from([b"a.jpg", b" ", b"0", b"\n", b"\r", b"..", b"/", b"1000", b"\xff", b"\0", b"-", b".png 5\n"])


@settings(deadline=None, max_examples=200)
@given(st.lists(pieces | st.binary(max_size=4), max_size=12).map(b"".join))
def test_any_bytes_are_a_list_of_images_inside_or_one_line_of_refusal(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    file.write_bytes(content)
    try:
        found = read_indexed(file, 1000)
    except UserError as error:
        assert "fuzzed.txt" in str(error) and "\n" not in str(error)
    else:
        assert found and all(0 <= label < 1000 for label in found.values())
        assert not any(name.startswith("/") or ".." in name.split("/") for name in found)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.tuples(words, words), st.integers(0, 999), min_size=1, max_size=5), st.booleans())
def test_an_indexed_list_is_read_back(tmp_path_factory, rows, has_returns):
    written = {f"{folder} x/{name} 1.JPEG": label for (folder, name), label in rows.items()}
    file = tmp_path_factory.getbasetemp() / "indexed.txt"
    ending = "\r\n" if has_returns else "\n"
    file.write_bytes(ending.join(f"{path} {label}" for path, label in written.items()).encode())
    assert read_indexed(file, 1000) == written
