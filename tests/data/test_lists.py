"""Lists of images and the set that DM-KD released: pytest tests/data/test_lists.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffrep.data.datasets import DataConfig, load_data
from diffrep.data.lists import labelled_lines
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
