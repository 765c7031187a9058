"""What a drawn set looks like on a page: pytest tests/report/test_sets.py"""

import base64
import io
import shutil

import pytest
from folders import page, rows, words, write_folder
from PIL import Image
from second_road import CLASSES, colour, drawn, write_second_road, write_set

from diffrep.report.sets import COLUMNS, ROWS, first_images


def sheet_of(reader) -> Image.Image:
    sources = [a["src"] for tag, a in reader.tags if tag == "img"]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))


def lone_set(folder, **settings):
    write_folder(folder, drawn() | {"seed": 0}, {"name": "drawn", "kind": "synthesis", "seed": 0, "licence": "x"})
    return write_set(folder, **settings)


def test_a_column_of_images_for_each_class(tmp_path):
    folder = write_second_road(tmp_path / "study", [0])
    _, reader = page([folder], tmp_path)
    sheet, text = sheet_of(reader), words(reader)
    assert sheet.size == (len(CLASSES) * 9 - 1, ROWS * 9 - 1)  # squares of 8 pixels, one between them
    for label in range(len(CLASSES)):
        for number in range(ROWS):
            assert sheet.getpixel((9 * label + 4, 9 * number + 4)) == colour(label, number)
    assert sheet.getpixel((8, 4)) == (255, 255, 255)
    assert "the first images of each class, a column for each: zero, one and two" in text
    facts = ["images: 60", "sampler: ddim", "sampling steps: 20", "guidance: 1.5", "network calls per image: 40"]
    facts += ["CPU seconds: 12.3", "content hash: 0123456789ab", "licence: OpenRAIL-M"]
    assert "".join(facts) in text


@pytest.mark.parametrize(("size", "shown"), [(8, 8), (200, 56)])
def test_large_images_are_shrunk(size, shown, tmp_path):
    folder = lone_set(tmp_path / "set", per_class=4, size=size, suffix="webp")
    sheet = sheet_of(page([folder], tmp_path)[1])
    gap = 1 if shown < 24 else 2
    assert sheet.width == len(CLASSES) * (shown + gap) - gap
    assert sheet.getpixel((shown // 2, shown // 2)) == colour(0, 0)


def test_a_set_without_classes_fills_rows(tmp_path):
    folder = lone_set(tmp_path / "set", has_labels=False)
    _, reader = page([folder], tmp_path)
    sheet = sheet_of(reader)
    assert sheet.size == (COLUMNS * 9 - 1, ROWS * 9 - 1) and f"the first images, {COLUMNS * ROWS} in all" in words(
        reader
    )
    assert sheet.getpixel((4, 4)) == colour(0, 0) and sheet.getpixel((13, 4)) == colour(1, 0)


def test_images_are_read_until_every_class_has_enough(tmp_path):
    folder = write_set(tmp_path / "set", per_class=4)
    assert {k: len(v) for k, v in first_images(folder, [0, 2], 3).items()} == {0: 3, 2: 3}
    assert {k: len(v) for k, v in first_images(folder, [1, 7], 9).items()} == {1: 4, 7: 0}


def damaged(folder):
    (folder / "shard-000000.tar").write_bytes(b"no tar")


def gone(folder):
    for shard in folder.glob("*.tar"):
        shard.unlink()


def no_images(folder):
    file = folder / "shard-000000.tar"
    file.write_bytes(file.read_bytes().replace(b"\x89PNG", b"PNG\x89"))


@pytest.mark.parametrize("harm", [damaged, gone, no_images])
def test_without_its_shards_a_set_has_facts_and_no_picture(harm, tmp_path):
    folder = lone_set(tmp_path / "set")
    harm(folder)
    _, reader = page([folder], tmp_path)
    assert not [tag for tag, _ in reader.tags if tag == "img"] and "content hash: 0123456789ab" in words(reader)


def test_a_set_that_is_not_drawn_yet_is_not_shown(tmp_path):
    folder = write_second_road(tmp_path / "study", [0])
    shutil.rmtree(folder / "set-s0")
    assert "What the set looks like" not in words(page([folder], tmp_path)[1])


def test_several_sets_share_a_table(tmp_path):
    folders = []
    for number, guidance in enumerate((1, 2, 3.5, 4)):
        folders.append(
            write_folder(tmp_path / f"set{number}", drawn(guidance_scale=guidance) | {"seed": 0}, {"seed": 0})
        )
        write_set(folders[-1], per_class=2)
    _, reader = page(folders, tmp_path)
    assert ["6", "ddim", "20", "3.5"] in [cells[1:5] for cells in rows(reader, "drawn (set2)")]
    assert ["6", "ddim", "20", "1 (off)"] in [cells[1:5] for cells in rows(reader, "drawn (set0)")]
    assert "What each of the 4 sets looks like" in words(reader)
