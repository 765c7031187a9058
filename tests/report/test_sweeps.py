"""Scores against a setting, read from the names of arms: pytest tests/report/test_sweeps.py"""

import pytest
from folders import page, words, write_folder
from second_road import pupil, recipe_of, result, stages

from diffrep.report.pictures import settings_chart
from diffrep.report.sweeps import settings_in


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("s = 1, T = 20", {"s": 1.0, "T": 20.0}),
        ("guidance scale=1.5", {"guidance scale": 1.5}),
        ("lr = 1e-3", {"lr": 0.001}),
        ("shift = -2", {"shift": -2.0}),
        ("best t = 100, then fine-tuned", None),
        ("drawn images + KD", None),
        ("images = 1,000", None),
        ("teacher = resnet8", None),
        ("= 3", None),
        ("", None),
    ],
)
def test_settings_are_read_from_a_name(label, expected):
    assert settings_in(label) == expected


def write_sweep(folder, labels: dict[str, tuple[float, ...]], seeds: int):
    """One drawn student per label, with its scores by seed."""
    kept = {name: stage for name, stage in stages().items() if name in ("classifier", "set", "generator", "real_pupil")}
    arms = {"real_pupil": "student: real images + KD"}
    for number, label in enumerate(labels):
        kept[f"p{number}"], arms[f"p{number}"] = pupil("synthetic:stage:set"), label
    for seed in range(seeds):
        write_folder(folder / f"real_pupil-s{seed}", kept["real_pupil"], result("real_pupil", kept["real_pupil"], 0))
        for number, values in enumerate(labels.values()):
            found = result("set_pupil", kept[f"p{number}"], 0) | {"scores": {"top1": values[seed], "test_images": 400}}
            write_folder(folder / f"p{number}-s{seed}", kept[f"p{number}"] | {"seed": seed}, found | {"seed": seed})
    return write_folder(folder, recipe_of(arms, kept, list(range(seeds))), {"arms": {}})


GRID = {
    "student: s = 1, T = 20": (97.0, 96.0),
    "student: s = 2, T = 20": (95.0, 94.0),
    "student: s = 4, T = 20": (91.0, 90.0),
    "student: s = 1, T = 5": (93.0, 93.0),
    "student: s = 2, T = 5": (92.0, 90.0),
    "student: s = 4, T = 5": (80.0, 84.0),
}


def test_two_settings_give_a_line_for_each_value_of_one(tmp_path):
    _, reader = page([write_sweep(tmp_path / "study", GRID, 2)], tmp_path)
    text, picture = words(reader), next(a for a in reader.alternatives if "against s" in a)
    assert (
        "T = 20: s = 1 96.5 ± 0.7 (2), s = 2 94.5 ± 0.7 (2), s = 4 90.5 ± 0.7 (2); T = 5: s = 1 93.0 ± 0.0 (2)"
        in picture
    )
    assert "How the score depends on s and T" in text and "Best of 6 points: s = 1, T = 20, 96.5 %." in text
    assert "Dashed: real images + KD, 97.5 %." in text and "bars one standard deviation" in text
    # The headline gives the range and singles out none.
    assert (
        "scores from 82.0 ± 2.8 % to 96.5 ± 0.7 % by top-1 (mean of 2 seeds ± standard deviation), over 6 settings"
        in text
    )
    assert "The test images tell which setting is the highest" in text
    assert "S = 1, T = 20 against" not in text and "s = 1, T = 20 / s = 2, T = 20" in text and "and 2 more" in text


def test_one_setting_gives_one_line_for_each_student(tmp_path):
    labels = {
        f"{who}: images = {n}": (v,) for who, n, v in [("A", 50, 60), ("A", 500, 80), ("B", 50, 70), ("B", 500, 90)]
    }
    _, reader = page([write_sweep(tmp_path / "study", labels, 1)], tmp_path)
    picture = next(a for a in reader.alternatives if "against images" in a)
    assert "A: images = 50 60.0, images = 500 80.0; B: images = 50 70.0, images = 500 90.0." in picture


def test_a_single_value_is_no_sweep(tmp_path):
    labels = {"A: best t = 100": (60.0,), "B: best t = 100": (70.0,), "A: worst t = 900": (50.0,)}
    assert "How the score depends" not in words(page([write_sweep(tmp_path / "study", labels, 1)], tmp_path)[1])


def test_the_chart_has_ticks_at_the_settings_and_bars_for_seeds():
    lines = {"T = 5": {4.0: [80.0, 84.0], 1.0: [93.0, 93.0]}, "T = 20": {1.0: [97.0], 1.5: [96.0]}}
    svg = str(settings_chart(lines, ("real", 98.0), ("s", "% correct, top-1"), "x"))
    for text in ("1", "1.5", "4", "T = 5", "T = 20", "real", "s (listed values, evenly spaced)", "% correct, top-1"):
        assert f">{text}</text>" in svg, text
    one = {label: {x: scores[:1] for x, scores in points.items()} for label, points in lines.items()}
    assert str(settings_chart(one, ("real", 98.0), ("s", "% correct, top-1"), "x")).count("<path") < svg.count("<path")
    assert ">T = 20</text>" not in str(settings_chart({"T = 20": lines["T = 20"]}, None, ("s", "%"), "x"))
