"""The first road shows its effect, on a small budget and with margin (thresholds: eleven earlier seeds, see docs)."""

from __future__ import annotations

import json

import pytest

from diffrep.recipes.base import Study
from diffrep.recipes.quickstart import BEST, LABELS, WORST, quickstart
from diffrep.studies import run_study

ARMS = ("conv_untrained", "conv_worst", "conv_policy", "conv_best")
TIMESTEPS = (0, 50, BEST, 300, 600, WORST)


def small_study() -> Study:
    """The quickstart's own stages with a shorter training of the teacher and six of the ten timesteps."""
    values = quickstart().model_dump(mode="json")
    stages = {name: values["stages"][name] for name in ("teacher", "hints", *ARMS)}
    stages["teacher"]["train"]["steps"] = 400
    stages["hints"]["features"]["timesteps"] = TIMESTEPS
    stages["conv_policy"]["method"]["timestep"]["values"] = TIMESTEPS
    arms = {arm: values["arms"][arm] for arm in ARMS}
    return Study.model_validate(values | {"name": "quickstart_small", "stages": stages, "arms": arms})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    result = run_study(small_study(), out, jobs=1)
    return out, {arm: by_seed["0"][f"linear_probe_{LABELS}"] for arm, by_seed in result["arms"].items()}


def test_a_well_chosen_timestep_teaches(finished):
    _, probe = finished
    assert max(probe["conv_policy"], probe["conv_best"]) >= probe["conv_untrained"] + 4
    assert max(probe["conv_policy"], probe["conv_best"]) >= probe["conv_worst"] + 2


def test_the_policy_finds_the_good_region(finished):
    out, _ = finished
    last = json.loads((out / "conv_policy-s0" / "metrics.jsonl").read_text().splitlines()[-1])
    timesteps = json.loads((out / "conv_policy-s0" / "result.json").read_text())["timesteps"]
    mass = sum(p for p, t in zip(last["policy_probs"], timesteps, strict=True) if t <= 300)
    assert mass > 0.9  # no preference would give 4 of 6


def test_only_the_few_labels_are_read(finished):
    out, _ = finished
    seen = {
        arm: json.loads((out / f"{arm}-s0" / "result.json").read_text())["labels_seen"] for arm in (*ARMS, "teacher")
    }
    assert set(seen.pop("conv_policy").values()) == {LABELS}
    assert all(labels == {} for labels in seen.values())


# The second road


def small_second_road() -> Study:
    """Generator, classifier, set and two students of the quickstart at a third of their steps."""
    values = quickstart().model_dump(mode="json")
    names = ("generator", "classifier", "set", "set_answers", "noise_answers", "set_pupil", "noise_pupil")
    stages = {name: values["stages"][name] for name in names}
    for name, steps in (("generator", 300), ("classifier", 200), ("set_pupil", 400), ("noise_pupil", 400)):
        stages[name]["train"]["steps"] = steps
    stages["set"]["synthesis"] |= {"images": 660, "sampling": {"num_sampling_steps": "10"}}
    for name in ("noise_answers", "noise_pupil"):
        stages[name]["data"]["source"] = "noise:660x8"
    arms = {arm: values["arms"][arm] for arm in ("classifier", "set_pupil", "noise_pupil")}
    changes = {"name": "second_road_small", "stages": stages, "arms": arms, "headline": "top1"}
    return Study.model_validate(values | changes)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("second_road")
    result = run_study(small_second_road(), out, jobs=1)
    return out, {arm: by_seed["0"]["top1"] for arm, by_seed in result["arms"].items()}


def test_a_student_of_drawn_digits_reads_real_ones_and_a_student_of_noise_does_not(drawn):
    """Trials at 400 steps: 96 and 18 %; the gap held in every seed."""
    _, top1 = drawn
    assert top1["set_pupil"] > 90 and top1["noise_pupil"] < 50
    assert top1["set_pupil"] > top1["classifier"] - 6


def test_the_student_saw_no_label_and_no_real_image_and_says_who_did(drawn):
    out, _ = drawn
    result = json.loads((out / "set_pupil-s0" / "result.json").read_text())
    assert result["labels_seen"] == {} and result["data"]["source"].startswith("synthetic:")
    assert set(result["labels_behind"].values()) == {1078}
    assert {who.partition(":")[0] for who in result["labels_behind"]} == {"teacher", "generator"}
