"""A probe's page: heat map, control, label-free score, search: pytest tests/report/test_levels.py"""

import re

import pytest
from folders import CHROMIUM, on_a_phone, page, row, words, write_folder

from diffrep.report.pictures import levels_chart

TAPS = ("mid_block", "up_blocks.<1>")
LEVELS = [(11, 0.05), (29, 0.108), (101, 0.346)]  # t, sigma


def level(timestep: int, sigma: float) -> dict:
    return {"timestep": timestep, "sigma": sigma, "snr": sigma**-2, "alpha_bar": 1 / (1 + sigma**2)}


def grid_rows(bonus: float = 0.0) -> list[dict]:
    """Highest: up_blocks.<1> at sigma 0.108."""
    nowhere = dict.fromkeys(("timestep", "sigma", "snr", "alpha_bar"))
    rows = [{"tap": "pixels", **nowhere, "mean": 34.0, "sd": 0.0, "label_free": 0.1}]
    for k, at in enumerate(LEVELS):
        for tap, height in zip(TAPS, (40.0, 50.0), strict=True):
            rows.append({"tap": tap, **level(*at), "mean": height - abs(k - 1) + bonus, "sd": 0.0, "label_free": 0.5})
    return rows


def result(bonus: float = 0.0, **more) -> dict:
    rows = grid_rows(bonus)
    rank = {"rank_correlation": -0.25, "within_tap": {TAPS[0]: 0.5, TAPS[1]: None}, "chosen": rows[1]}
    base = {"name": "probe", "kind": "probe", "seed": 0, "cpu_seconds": 2.0, "licence": "MIT", "labels_seen": {}}
    return base | {"rows": rows, "control": [rows[1] | {"mean": 30.5}], "label_free": rank, "images_seen": 9} | more


def recipe(seed: int = 0, **sweep) -> dict:
    grid = {"taps": list(TAPS), "labels": None, "draws": 5, "split": "test", **sweep}
    return {"name": "probe", "seed": seed, "kind": "probe", "teacher": "somewhere", "sweep": grid}


def test_a_grid_has_a_map_with_the_best_cell_named(tmp_path):
    text, reader = page([write_folder(tmp_path / "probe", recipe(), result())], tmp_path)
    (alt,) = (a for a in reader.alternatives if a.startswith("Heat map"))
    assert "mid_block: sigma 0.05 39.0, sigma 0.108 40.0, sigma 0.346 39.0;" in alt
    assert "Highest: up_blocks.<1> at sigma 0.108 (t = 29), 50.0 %." in alt
    said = words(reader)
    assert "framed: up_blocks.<1> at sigma 0.108 (t = 29), 50.0 %" in said and "<1>" not in text
    assert row(reader, "mid_block") == ["mid_block", "39.0", "30.5", "+8.5"]
    assert "The same network before training, at sigma 0.05 (t = 11)" in said
    assert "by -0.25 over all points" in said and "Within a tap, over the noise levels: mid_block +0.50." in said
    assert "Bands" not in said  # all labels are one draw


def test_seeds_are_averaged(tmp_path):
    folders = [write_folder(tmp_path / f"p{k}", recipe(k), result(2.0 * k, seed=k)) for k in (0, 1)]
    (alt,) = (a for a in page(folders, tmp_path)[1].alternatives if a.startswith("Heat map"))
    assert "sigma 0.108 41.0" in alt and "51.0 %." in alt


@pytest.mark.parametrize("cut", [slice(0, 3), slice(0, 6)])
def test_no_map_of_one_level_nor_with_holes(tmp_path, cut):
    found = result() | {"rows": grid_rows()[cut]}
    _, reader = page([write_folder(tmp_path / "probe", recipe(), found)], tmp_path)
    assert "Where the knowledge sits" in words(reader)
    assert not [a for a in reader.alternatives if a.startswith("Heat map")]


def test_rows_of_earlier_versions_still_have_their_page(tmp_path):
    """They know the timestep alone."""
    old = [{k: r[k] for k in ("tap", "timestep", "mean", "sd")} for r in grid_rows()]
    found = {k: v for k, v in result().items() if k not in ("control", "label_free")} | {"rows": old}
    _, reader = page([write_folder(tmp_path / "probe", recipe(labels=50), found)], tmp_path)
    assert "Best of 6 points: up_blocks.<1> at t = 29, 50.0 %." in words(reader)
    assert "Bands: one standard deviation over 5 draws of labelled images." in words(reader)


def searched() -> dict:
    rungs = [{"images": n, "rows": grid_rows()[1:][rows]} for n, rows in ((30, slice(None)), (60, slice(2, 4)))]
    rungs.append({"images": 120, "rows": []})  # no timestep was left between
    found = {"rungs": rungs, "control": [grid_rows()[1] | {"mean": 28.0}], "notes": ["the curve has no maximum inside"]}
    found |= {"passes": 210, "planned_passes": 330, "grid_passes": 3000, "share_of_grid": 0.07}
    best = grid_rows()[4] | {"images": 60}
    return {k: v for k, v in result().items() if k not in ("control", "label_free")} | {
        "rows": [],
        "search": found,
        "best": best,
    }


def test_a_search_says_what_it_tried_and_what_that_took(tmp_path):
    _, reader = page([write_folder(tmp_path / "probe", recipe(search=True), searched())], tmp_path)
    said = words(reader)
    assert "took 210 passes, 7.0 % of a grid of 20 noise levels" in said
    assert "It found up_blocks.<1> at sigma 0.108 (t = 29)" in said
    assert row(reader, "30") == ["30", "3", "2", "up_blocks.<1>", "0.108", "29", "50.0"]
    assert row(reader, "60") == ["60", "1", "2", "up_blocks.<1>", "0.108", "29", "50.0"]
    assert "Note: the curve has no maximum inside." in said and "mid_block 28.0 %" in said
    assert "Left-out accuracy on the first 30 images" in said


def test_the_chart_frames_one_cell_and_names_both_units():
    levels = [(0.05, 11), (0.108, 29), (0.346, 101)]
    svg = str(levels_chart({"a": [1.0, 2.0, 3.0], "b": [2.0, 9.0, 1.0]}, levels, "x"))
    assert svg.count("stroke: #d55e00") == 1 and re.search(r">9\.0</text>", svg)
    for text in ("0.05", "11", "0.35", "101", "noise level: sigma above, timestep t below"):
        assert f">{text}</t" in svg, text
    many = str(levels_chart({"a": [float(k) for k in range(20)]}, [(0.1 * k + 0.1, k) for k in range(20)], "x"))
    assert ">19.0</text>" not in many  # no room for numbers


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_fits_a_phone(tmp_path):
    for name, found in (("grid", result()), ("search", searched())):
        (tmp_path / name).mkdir()
        text, _ = page([write_folder(tmp_path / name / "probe", recipe(), found)], tmp_path / name)
        width, said = on_a_phone(text, tmp_path / name)
        assert width <= 390 and "CONSOLE" not in said
