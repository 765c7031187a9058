"""The rows of the official repository as recipes: pytest tests/recipes/test_repfusion_recipes.py"""

import pytest

from diffrep.errors import UserError
from diffrep.recipes import RECIPES
from diffrep.recipes.base import recipe_hash
from diffrep.recipes.loading import load

STAGE_1 = sorted(n for n in RECIPES if n.startswith("repfusion_") and RECIPES[n]().published)
ROWS = [n for n in STAGE_1 if not n.endswith("_faithful")]


def test_every_official_config_has_its_row():
    """Spec 2.2: six configs on CIFAR-10, six on Tiny-ImageNet, one on ImageNet, three on CelebA-HQ; four baselines."""
    counts = {
        data: sum(n.split("_")[1] == data for n in ROWS) for data in ("cifar10", "tinyimagenet", "imagenet", "celebahq")
    }
    assert counts == {"cifar10": 6, "tinyimagenet": 6, "imagenet": 1, "celebahq": 3}
    assert {f"{n}_faithful" for n in ROWS} <= RECIPES.keys()
    baselines = [n for n in RECIPES if n.startswith("finetune_") and RECIPES[n]().published]
    assert len(baselines) == 8 and all(RECIPES[n]().evaluate.protocol == "classifier" for n in baselines)


@pytest.mark.parametrize("name", STAGE_1)
def test_schedules_are_the_configs(name):
    """SGD 0.1, momentum 0.9, decay 1e-4, a tenth at epochs 100 and 150 of 200."""
    recipe = RECIPES[name]()
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert optim.lr_schedule.milestones == (0.5, 0.75) and optim.lr_schedule.gamma == 0.1
    epochs = recipe.train.steps / recipe.train.checkpoint_every
    assert epochs == pytest.approx(200, rel=2e-3)
    assert recipe.published.value is None and "not found" in recipe.published.source


def test_what_is_faithful_differs_where_the_configs_are_wrong():
    for row in ("cifar10_resnet18", "cifar10_mbnv2_at", "tinyimagenet_resnet18"):
        ours, theirs = (RECIPES[f"repfusion_{row}{s}"]() for s in ("", "_faithful"))
        assert (ours.method.timestep.baseline, theirs.method.timestep.baseline) == ("running_mean", "none")
        assert ours.method.timestep.values == theirs.method.timestep.values == tuple(range(1000))
        assert recipe_hash(ours) != recipe_hash(theirs)
    ours, theirs = (RECIPES[f"repfusion_tinyimagenet_resnet18{s}"]() for s in ("", "_faithful"))
    assert (ours.method.student.name, theirs.method.student.name) == ("resnet18_cifar", "resnet18")  # D10
    assert (ours.method.timestep.entropy_weight, theirs.method.timestep.entropy_weight) == (0.1, 0.0)


@pytest.mark.parametrize("end", ["", "_faithful"])
@pytest.mark.parametrize("net", ["resnet18", "resnet50", "hrnet_w18"])
def test_faces_are_those_of_the_training_split(net, end):
    """Its validation and test faces are of their own; officially the students see them all."""
    recipe = RECIPES[f"repfusion_celebahq_{net}{end}"]()
    assert (recipe.train.steps, recipe.train.batch_size) == (round(200 * 24_183 / 64), 64)
    assert "all 30,000 photographs" in recipe.assumed[0] and not any("held out" in line for line in recipe.assumed)


def test_losses_and_timesteps_of_the_rows():
    told = {n.removeprefix("repfusion_"): RECIPES[n]().method for n in ROWS}
    at, rkd = told["cifar10_resnet18_at"], told["tinyimagenet_resnet18_rkd"]
    assert (at.loss, at.kd_weight, at.hint_grid, at.timestep.select) == ("at", 1000, None, "policy")
    assert (rkd.loss, rkd.kd_weight, rkd.timestep.choices()) == ("rkd", 1, tuple(range(50)))
    faces = told["celebahq_resnet50"]
    assert (faces.loss, faces.kd_weight, faces.hint_grid, faces.timestep.choices()) == ("l1", 10, None, (0,))
    assert told["celebahq_resnet18"].loss == "l2" and told["imagenet_resnet18"].teacher == "adm-256-uncond"
    assert {m.tap for n, m in told.items() if "imagenet" in n} == {"middle_block.2.out_layers.3"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("method.loss=rkdd", "method.loss = 'rkdd'"),
        ("method.timestep.values=[0,1000000]", "timesteps are in 0..99999"),
        ("method.hint_grid=2", "compares whole maps as they are"),
        ("method.timestep.reward=tasks", "method.timestep.reward = 'tasks'"),
        ("method.loss=rkd train.batch_size=2", "at least 3"),
    ],
)
def test_bad_settings_are_one_line(change, told):
    with pytest.raises(UserError) as refused:
        load("repfusion_cifar10_resnet18_at", change.split())
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "override", ["method.noise=forward", "method.timestep.baseline=running_mean", "optim.lr=0.2", "method.hint_grid=2"]
)
def test_a_faithful_recipe_refuses_what_it_cannot_honour(override, tmp_path):
    name = "repfusion_cifar10_resnet18_faithful"
    with pytest.raises(UserError, match="is not the official config's; change it in 'repfusion_cifar10_resnet18'"):
        load(name, [override])
    assert load(name, ["method.teacher=runs/mine", "train.steps=3"]).train.steps == 3
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {name}\n")
    assert load(str(mine), [override]).name == "mine"
