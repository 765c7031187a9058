"""The first road shows its effect, on a small budget and with margin (thresholds: eleven earlier seeds, see docs)."""

from __future__ import annotations

import json

import pytest

from diffrep.recipes.base import Study
from diffrep.recipes.quickstart import BEST, LABELS, WORST, quickstart
from diffrep.studies import run_study

ARMS = ("conv_untrained", "conv_worst", "conv_policy", "conv_best")
BUDGET = {"teacher": 400, "conv_untrained": 0, "conv_worst": 400, "conv_policy": 400, "conv_best": 400}


def small_study() -> Study:
    """The quickstart's own stages with fewer steps and without shifts."""
    values = quickstart().model_dump(mode="json")
    stages = {name: values["stages"][name] for name in ("teacher", "hints", *ARMS)}
    for name, stage in stages.items():
        stage["data"]["augment"] = "none"
        if name in BUDGET:
            stage["train"]["steps"] = BUDGET[name]
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
    assert BEST <= 300 < WORST and mass > 0.9


def test_only_the_few_labels_are_read(finished):
    out, _ = finished
    seen = {
        arm: json.loads((out / f"{arm}-s0" / "result.json").read_text())["labels_seen"] for arm in (*ARMS, "teacher")
    }
    assert set(seen.pop("conv_policy").values()) == {LABELS}
    assert all(labels == {} for labels in seen.values())
