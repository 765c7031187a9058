"""Polygons and run lengths, pixel by pixel as the COCO tools read them: pytest tests/data/test_rle.py"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffrep.data import rle

tools = pytest.importorskip("pycocotools.mask", reason="the official fill needs pycocotools")


def official(polygons, height, width):
    return tools.decode(tools.merge(tools.frPyObjects(polygons, height, width))).astype(bool)


def drawn(seed, height, width, corners, whole):
    points = np.random.default_rng(seed).random((corners, 2)) * [width * 1.4, height * 1.4] - [
        width * 0.2,
        height * 0.2,
    ]
    return (np.round(points) if whole else points).ravel().tolist()


SIZES = {"height": st.integers(1, 50), "width": st.integers(1, 50), "seed": st.integers(0, 10**6)}


@given(**SIZES, corners=st.integers(3, 9), whole=st.booleans(), count=st.integers(1, 3))
def test_polygons_are_filled_as_officially(height, width, seed, corners, whole, count):
    polygons = [drawn(seed + k, height, width, corners, whole) for k in range(count)]
    packed = rle.packed(polygons, height, width)
    assert (rle.mask_of(packed, height, width) == official(polygons, height, width)).all()
    assert rle.as_json(packed) == polygons


@given(**SIZES, share=st.floats(0, 1))
def test_run_lengths_of_both_forms_are_read(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    text = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    for counts in (text, text.decode(), rle.runs_of(mask)["counts"]):
        outline = {"size": [height, width], "counts": counts}
        assert (rle.mask_of(outline, height, width) == mask).all()
        json.dumps(rle.as_json(outline))
    plain = rle.runs_of(mask)
    assert (tools.decode(tools.frPyObjects(plain, height, width)).astype(bool) == mask).all()


def test_by_hand():
    square = [[1, 1, 3, 1, 3, 3, 1, 3]]
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 1:3] = True
    assert (rle.mask_of(square, 4, 5) == mask).all()
    assert rle.runs_of(mask) == {"size": [4, 5], "counts": [5, 2, 2, 2, 9]}
    whole = np.ones((2, 2), dtype=bool)
    assert rle.runs_of(whole)["counts"] == [0, 4] and rle.runs_of(~whole)["counts"] == [4]


def test_the_outlines_of_a_photograph(shared):
    """The stored area is the polygon's; the spec has counted the pixels of the first: 2,118 of 2,120.99."""
    told = json.loads((shared / "fixtures/coco/annotations/image_39769_annotations.json").read_text())
    masks = [rle.mask_of(a["segmentation"], 480, 640) for a in told]
    assert masks[0].sum() == 2118 and round(told[0]["area"], 2) == 2120.99
    for mask, annotation in zip(masks, told, strict=True):
        assert (mask == official(annotation["segmentation"], 480, 640)).all()
        assert abs(mask.sum() - annotation["area"]) < 0.005 * annotation["area"] + 10


BAD = [
    (None, "neither polygons nor run lengths"),
    ([], "neither polygons"),
    ("square", "neither polygons"),
    ([[0, 0, 4, 4]], "three points or more"),
    ([[0, 0, 4, 4, 1]], "three points or more"),
    ([[0, 0, 4, 4, 1, float("nan")]], "three points or more"),
    ([[[0, 0], [4, 4], [1, 2]]], "three points or more"),
    ([["a", 0, 4, 4, 1, 2]], "a polygon is a list of numbers"),
    ([[0, 0, 4, 4, 1, 1e12]], "a polygon reaches 1e\\+12, and the picture is 6x8"),
    ({"size": [6, 8]}, "whole numbers, or the text"),
    ({"size": [8, 6], "counts": [48]}, r"run lengths of \[8, 6\] pixels; the picture has \[6, 8\]"),
    ({"size": [6, 8], "counts": [40]}, "add up to 40; the picture has 48"),
    ({"size": [6, 8], "counts": [50, -2]}, "add up to 48"),
    ({"size": [6, 8], "counts": [10**30]}, "whole numbers, or the text"),
    ({"size": [6, 8], "counts": "P"}, "whole numbers, or the text"),
    ({"size": [6, 8], "counts": "~~~~~~~~~~~~~~~~~~~~~~~1"}, "whole numbers, or the text"),
    ({"size": [6, 8], "counts": "ooooooooooooooooooooooo1"}, "whole numbers, or the text"),
    ({"size": [6, 8], "counts": "\u00e4"}, "whole numbers, or the text"),
    ({"size": [6, 8], "counts": ""}, "add up to 0"),
]


@pytest.mark.parametrize("outline, words", BAD, ids=str)
def test_what_is_no_outline_is_told(outline, words):
    for read in (rle.packed, rle.mask_of):
        with pytest.raises(ValueError, match=words):
            read(outline, 6, 8)


@given(st.binary(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        mask = rle.mask_of({"size": [6, 8], "counts": text}, 6, 8)
    except ValueError:
        return
    assert mask.shape == (6, 8)
