"""The table of what scores are worth in labels, on made-up folders: pytest tests/report/test_worth.py"""

import json
import math

import pytest
from folders import CHROMIUM, on_a_phone, page, row, words, write_folder

from diffrep.evaluation import label_value
from diffrep.report.build import write_report

COUNTS = (500, 1000, 2000, 4000)
ARMS = {
    **{f"scratch_{n}": f"CNN: from scratch, {n:,} labels" for n in COUNTS},
    "policy": "CNN: learned policy",
    "tuned": "CNN: policy, then fine-tuned",
    "best": "CNN: much better, then fine-tuned",
}
ROW = "CNN: policy, then fine-tuned"


def stage(name: str) -> dict:
    labels = int(name.partition("_")[2] or 500)
    method = {"kind": "finetune", "student": {"name": "conv_small"}, "init": None}
    if name in ("tuned", "best"):
        method["init"] = "stage:policy"
    if name == "policy":
        method = {"kind": "repfusion", "teacher": "random:x", "tap": "mid", "student": {"name": "conv_small"}}
    return {
        "name": f"a_{name}",
        "seed": 0,
        "kind": "recipe",
        "data": {"source": "digits", "labels": labels},
        "method": method,
        "train": {"steps": 20},
        "evaluate": {"probe_labels": [labels]},
    }


def result(name: str, seed: int) -> dict:
    goal = {"tuned": 10 * math.log(1500) - 10, "best": 90.0, "policy": 0.0}
    mean = goal[name] if name in goal else 10 * math.log(int(name.partition("_")[2])) - 10
    top1 = {} if name == "policy" else {"top1": round(mean + (-0.4, 0.1, 0.3)[seed], 3)}
    labels = {"student": stage(name)["data"]["labels"]}
    scores = {"linear_probe_500": 66.0 + seed, **top1, "test_images": 10_000}
    return {"kind": "recipe", "seed": seed, "labels_seen": labels, "scores": scores, "cpu_seconds": 1.0}


def write_study(folder, names=tuple(ARMS), seeds=(0, 1, 2)):
    """A finished study with these arms; its result says what they are worth, as studies.py does."""
    for name in names:
        for seed in seeds:
            write_folder(folder / f"{name}-s{seed}", stage(name) | {"seed": seed}, result(name, seed))
    worth = label_value.worth({n: (stage(n), {s: result(n, s) for s in seeds}) for n in names})
    recipe = {"kind": "study", "name": "worthy", "seeds": list(seeds), "stages": {n: stage(n) for n in names}}
    recipe |= {"arms": {n: ARMS[n] for n in names}, "headline": "linear_probe_500"}
    return write_folder(folder, recipe, {"arms": {}, "worth_labels": worth})


def test_a_study_with_the_scale_says_what_its_arms_are_worth(tmp_path):
    _, reader = page([write_study(tmp_path / "study")], tmp_path)
    text = words(reader)
    assert "What it is worth in labels" in text
    assert (
        "conv_small from scratch scores 52.1 % with 500, 59.1 % with 1,000, 66.0 % with 2,000 and 72.9 % with 4,000"
        in text
    )
    score, worth, interval, times = row(reader, ROW)[1:]
    assert (score, worth, times) == ("63.1", "1,500", "3 (of 500)")
    low, high = (int(end.replace(",", "")) for end in interval.split(" to "))
    assert 1000 < low < 1500 < high < 2100
    assert row(reader, "CNN: much better, then fine-tuned")[2:] == ["more than 4,000"] * 2 + ["more than 8 (of 500)"]
    assert "The interval covers the spread over seeds (3 at least" in text and "the 10,000 test images" in text
    assert len(row(reader, "learned policy")) == 3  # of the scores: a probe is not held against the scale


def test_one_seed_says_that_it_is_one(tmp_path):
    text = words(page([write_study(tmp_path / "study", seeds=(0,))], tmp_path)[1])
    assert "Where a score has one seed, the interval covers the drawing of the 10,000 test images alone" in text


@pytest.mark.parametrize("names", [("scratch_500", "policy", "tuned"), ("scratch_500", "scratch_1000", "policy")])
def test_without_a_scale_or_something_to_value_nothing_is_said(names, tmp_path):
    folder = write_study(tmp_path / "study", names)
    assert "worth in labels" not in words(page([folder], tmp_path)[1])
    result = json.loads((folder / "result.json").read_text())
    del result["worth_labels"]  # of an older study
    (folder / "result.json").write_text(json.dumps(result))
    assert "worth in labels" not in words(page([folder], tmp_path)[1])


def test_runs_side_by_side_have_the_table_where_they_are_a_scale(tmp_path):
    study = write_study(tmp_path / "study")
    runs = [study / f"{name}-s{seed}" for name in ARMS for seed in (0, 1, 2)]
    out = tmp_path / "compared.html"
    text = write_report(runs, out, label_value.worth).read_text()
    assert "What it is worth in labels" in text and "more than 4,000" in text
    theirs = row(page([study], tmp_path)[1], ROW)[1:]
    assert all(f">{cell}</td>" in text for cell in theirs)
    assert "worth in labels" not in write_report(runs[:3], out, label_value.worth).read_text()
    assert "What it is worth" in write_report([study, runs[0]], out, label_value.worth).read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_phone_shows_the_table_without_sideways_scrolling(tmp_path):
    width, console = on_a_phone(page([write_study(tmp_path / "study")], tmp_path)[0], tmp_path)
    assert width <= 390 and "CONSOLE" not in console
