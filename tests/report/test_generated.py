"""The page beside generated images: pytest tests/report/test_generated.py"""

import json
import re

import pytest
from PIL import Image

from diffrep.report.generated import write_page

FOUND = {
    "images": 2,
    "made": 2,
    "seeds": [3, 9],
    "by": "addp",
    "image_size": [8, 8],
    "tokens": 16,
    "masked": [4, 3, 2, 1],
    "first_step": 0,
    "name": "my <model>",
    "licences": {"network": "MIT", "tokenizer": "MIT"},
    "repair": None,
    "filmed": [3, 9],
    "environment": {"device": "x86_64"},
}
WALK = {"steps": 3, "schedule": "cosine", "choice_temperature": 6.0, "temperature_strategy": "dynamic", "top_p": 1.0}
SETTINGS = {
    "model": {"addp": "ab" * 32, "tokenizer": "cd" * 32},
    "alternation": {**WALK, "finish": False},
    "rounding": "truncate",
    "block_size": 1,
    "repair": None,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "images").mkdir()
    for name in ("grid.png", "film.png", "before.png", "images/seed-000003.png", "images/seed-000009.png"):
        Image.new("RGB", (16, 8), "red").save(tmp_path / name)
    for seed in (3, 9):
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "steps" / f"seed-{seed:06d}-masked.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "film.gif")
    return tmp_path


def page(folder, **changes):
    (folder / "generated.json").write_text(json.dumps(FOUND | changes))
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return write_page(folder).read_text()


def test_one_file_that_loads_nothing(folder):
    html = page(folder)
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "http" not in html.replace("http://www.w3.org", "")
    assert "my &lt;model&gt;" in html and "2 images of 8x8 pixels by ADDP, seeds 3, 9." in html
    assert "abababab" in html and "stays soft (official)" in html and "4 3 2 1" in html
    assert "image/gif;base64" in html and "image-rendering:pixelated" in html
    assert "Before and after" not in html and "Non-commercial" not in html


def test_a_repair_shows_before_and_after(folder):
    html = page(folder, repair={"image": "photo.png", "paste": False})
    assert "Before and after" in html and html.count("4 of 16 tokens anew") == 2
    assert "not its own pixels (--paste puts those back)" in html
    assert "own pixels were put back" in page(folder, repair={"image": "photo.png", "paste": True})


def test_licences_are_said(folder):
    html = page(folder, licences={"network": "CC BY-NC 4.0", "tokenizer": "MIT"})
    assert "Non-commercial use only: CC BY-NC 4.0." in html and "tokenizer: MIT" in html


def test_large_pictures_are_made_smaller_and_smooth(folder):
    Image.new("RGB", (4000, 1000), "red").save(folder / "grid.png")
    html = page(folder, image_size=[256, 256], seeds=list(range(70)), images=70)
    assert "image-rendering:auto" in html and 'pixelated"' not in html.split("<svg", 1)[1]
    assert "70 images of 256x256 pixels by ADDP, seeds 0 to 69." in html and "Seeds 0 to 63, row by row." in html
    assert Image.open(folder / "grid.png").width == 4000
