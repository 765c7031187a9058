"""The generate scripts of the official repository as recipes: pytest tests/recipes/test_addp_recipes.py

Numbers and settings are typed from scripts and README, not taken from the recipes.
"""

import json
import re

import pytest
from torch import arange

from diffrep import words
from diffrep.api import recipes
from diffrep.diffusion.masking import masked_after
from diffrep.launch.reproduce import NAMES, SCHEDULES, planned
from diffrep.methods.token_predictor import mage_counts
from diffrep.recipes import RECIPES
from diffrep.recipes.base import GenerationTask

# scripts/{base,large}/generate_*.sh: weights, --num_iteration, --mask_ratio_sample_strategy
SCRIPTS = {
    "addp_generate_base_steps20": ("addp-vit-base-16", 20, "cosine"),
    "addp_generate_large_steps20": ("addp-vit-large-16", 20, "cosine"),
    "addp_generate_large_steps256_linear": ("addp-vit-large-16", 256, "linear"),
}
MAGE = {"addp_mage_base_steps20": "addp-vit-base-16", "addp_mage_large_steps20": "addp-vit-large-16"}
SCORES = {  # FID, IS
    "addp-vit-base-16": ((8.9, 95.3), (11.1, 81.2)),
    "addp-vit-large-16": ((7.6, 105.1), (9.1, 105.1)),
}
COSINE20 = [256, 253, 249, 244, 237, 229, 219, 208, 195, 182, 167, 151, 134, 117, 98, 80, 60, 41, 21, 1]


def stage(name) -> GenerationTask:
    (found,) = RECIPES[name]().stages.values()
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_generate_script_has_its_recipe(name):
    weights, steps, schedule = SCRIPTS[name]
    task = stage(name)
    walk = task.alternation
    assert (task.model, walk.steps, walk.schedule) == (f"weights/{weights}", steps, schedule)
    # What no script sets: the parser's defaults.
    assert (walk.choice_temperature, walk.temperature_strategy, walk.top_p, walk.finish) == (6.0, "dynamic", 1, False)
    assert (task.by, task.images, task.rounding, task.score.protocol) == ("addp", 50_000, "truncate", "inception-val")
    counts = COSINE20 if steps == 20 else [*arange(255, 0, -1).tolist(), 1]
    assert masked_after(walk, 256) == counts


@pytest.mark.parametrize("name", MAGE)
def test_mage_alone_is_the_rival(name):
    """Li et al.: 20 steps, temperature 6."""
    task = stage(name)
    assert (task.by, task.model, task.images) == ("predictor", f"weights/{MAGE[name]}", 50_000)
    assert (task.alternation.steps, task.alternation.choice_temperature) == (20, 6.0)
    counts = mage_counts(task.alternation, 256)
    assert len(counts) == 20 and counts[0] == 255 and counts[-1] == 0  # one at least is revealed in each step


@pytest.mark.parametrize("name", [*SCRIPTS, *MAGE])
def test_published_numbers(name):
    ours, mage = SCORES[stage(name).model.removeprefix("weights/")]
    value, inception_score = mage if name in MAGE else ours
    published = RECIPES[name]().published
    assert (
        published.value == value and f"IS {inception_score}" in published.metric and "inception-val" in published.metric
    )
    rivals = [(r.value, str(mage[1]) in r.method) for r in published.rivals]
    assert rivals == ([] if name in MAGE else [(mage[0], True)])


@pytest.mark.parametrize("name", [*SCRIPTS, *MAGE])
def test_what_is_needed_and_what_is_not_stated_is_said(name):
    study = RECIPES[name]()
    told = " ".join(study.needs)
    assert "Apache-2.0" in told and "CC BY-NC 4.0" in told and "weights-inception" in told
    for place in re.findall(r'"(?:folder:)?((?:weights|data)/[^"]+)"', json.dumps(stage(name).model_dump(mode="json"))):
        assert place in told
    assert any("which schedule" in line for line in study.assumed) == (name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_reproduce_looks_for_the_same_and_does_the_same(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, steps, _ = SCRIPTS[name]
    who = next(n for n, key in NAMES.items() if key == weights)
    (tmp_path / "other").mkdir()
    plan = planned(who, steps=steps, model="other", reference="digits")
    walk = stage(name).alternation
    assert plan.settings["alternation"] == {"schedule": walk.schedule} and SCHEDULES[walk.steps] == walk.schedule
    assert len(plan.seeds) == stage(name).images
    with pytest.raises(ValueError, match=re.escape(stage(name).reference.removeprefix("folder:"))) as refused:
        planned(who, steps=steps)
    assert stage(name).model in str(refused.value)


def test_the_ledger_lists_them(tmp_path):
    rows = {row["name"]: row for row in recipes()}
    assert rows["addp_generate_base_steps20"]["published"] == "8.9"
    assert rows["addp_generate_large_steps256_linear"]["status"] == "needs data, weights"
    table, _, notes = words.ledger(list(rows.values())).partition("\n\n")
    assert max(map(len, table.splitlines())) <= 116
    assert "others: MAGE ViT-L (IS 105.1) 9.1; MAGE README" in notes
