"""Every shipped *_debug recipe trains two steps, and resumed after the first it gives the same loss."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import commands
from official_files import guided_unet, saved, tiny_dit

from diffrep import api
from diffrep.errors import Interrupted
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe, recipe_hash, to_yaml
from diffrep.recipes.loading import load

DEBUG = [name for name in RECIPES if name.endswith("_debug") and isinstance(RECIPES[name](), Recipe)]
FIXTURES = Path(__file__).parents[1] / os.environ.get("DIFFREP_DATA", "../shared") / "data" / "fixtures"
NO_FIXTURES = pytest.mark.skipif(not FIXTURES.is_dir(), reason="no fixtures: set DIFFREP_DATA to the folder of data/")
CASES = [pytest.param(n, marks=NO_FIXTURES if "fixtures" in RECIPES[n]().data.source else ()) for n in DEBUG]
EXPORTED = {  # others: weights.safetensors
    "denoiser": "pipeline/unet/diffusion_pytorch_model.safetensors",
    "mixing": "mix/weights.safetensors",
}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "cpu_seconds"} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the teachers and fixtures that recipes ask for stand where they look for them."""
    folder = tmp_path_factory.mktemp("debug")
    (folder / "data").mkdir()
    (folder / "data" / "fixtures").symlink_to(FIXTURES.resolve())
    api.run("denoiser_debug", out=folder / "runs" / "denoiser_debug")
    saved(guided_unet(), folder / "runs" / "tiny_adm.pt")
    saved(tiny_dit(), folder / "runs" / "tiny_dit.pt")
    return folder


def test_there_is_one_for_every_road():
    roads = {RECIPES[name]().method.kind for name in RECIPES if isinstance(RECIPES[name](), Recipe)}
    studies = [RECIPES[name]() for name in RECIPES if name.endswith("_debug") and name not in DEBUG]
    stages = [stage for study in studies for stage in study.stages.values() if isinstance(stage, Recipe)]
    found = {task.method.kind for task in [*(RECIPES[name]() for name in DEBUG), *stages]}
    assert found == roads and studies


@pytest.mark.parametrize("name", CASES)
def test_two_steps_and_a_resume_to_the_same_loss(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    whole = api.run(name, out=tmp_path / "whole")
    assert whole["steps"] == 2
    # One step; then the whole recipe from the checkpoint it left.
    monkeypatch.setattr(api, "wish_to_stop", AfterOneStep)
    with pytest.raises(Interrupted, match="stopped at step 1 of 2"):
        api.run(name, out=tmp_path / "broken")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    again = api.run(name, out=tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert [line["step"] for line in losses(tmp_path / "whole")] == [1, 2]
    file = EXPORTED.get(RECIPES[name]().method.kind, "weights.safetensors")
    assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert again["scores"] == whole["scores"] and again["recipe_hash"] == recipe_hash(load(name))


class AfterOneStep:
    """In the place of wish_to_stop: a wish that is there from the beginning."""

    def __enter__(self):
        return lambda: True

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("name", CASES)
def test_the_run_folder_rebuilds_the_run(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    api.run(name, out=tmp_path / "run")
    recipe = load(str(tmp_path / "run" / "recipe.yaml"))
    assert to_yaml(recipe) == to_yaml(load(name))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    expected = {"parameters", "multiply_adds", "labels_seen", "licence", "images_seen", "cpu_seconds", "wall_seconds"}
    assert expected <= result.keys() and result["multiply_adds"] > 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["threads"] == 1 and environment["packages"]["torch"]


@pytest.mark.parametrize("name", CASES)
def test_as_a_command(name, folder):
    done = commands.run(folder, "run", name, "--out", f"command_{name}", "--json")
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out)["run_dir"] == f"command_{name}"


def test_another_seed_is_another_run(tmp_path):
    runs = {seed: api.run("finetune_debug", [f"seed={seed}"], out=tmp_path / str(seed)) for seed in (0, 1)}
    assert losses(tmp_path / "0") != losses(tmp_path / "1")
    assert runs[0]["recipe_hash"] == runs[1]["recipe_hash"]
