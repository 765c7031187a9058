"""The rows of RepFusion's `landmark` folder as recipes, and a run of the smallest: pytest <this file>"""

import json
from itertools import product

import pytest
import torch

from diffrep import api
from diffrep.errors import UserError
from diffrep.models.heatmaps import ConcatHead, DeconvHead
from diffrep.models.maps import MapBackbone
from diffrep.recipes import RECIPES
from diffrep.recipes.base import recipe_hash
from diffrep.recipes.landmark import RECIPES as ROWS
from diffrep.recipes.loading import load
from diffrep.training.optim import lr_factor

DEBUG = "landmark_wflw_r50_debug"
NAMES = [make.__name__ for make in ROWS if make.__name__ != DEBUG]
FACES = {"held_out": 6750, "test": 7500}
SCHEDULES = pytest.mark.golden(of=lambda case: "inputs/landmark_iters_29_per_epoch" in case.keys)


def row(name):
    return load(name)


def test_every_official_config_has_its_row():
    """Two networks, from scratch and from what stage 1 taught; and as released."""
    starts = [f"landmark_wflw_{net}{start}" for net in ("r50", "hrnet_w18") for start in ("", "_distilled")]
    assert set(NAMES) == {f"{name}{end}" for name in starts for end in ("", "_faithful")}
    assert {*NAMES, DEBUG} <= RECIPES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_configs(name):
    """Spec section 2c: Adam 2e-3 without decay, 60 epochs, a tenth at 40 and 55, 500 steps of warm-up from 0.001."""
    recipe = row(name)
    optim, schedule, views = recipe.optim, recipe.optim.lr_schedule, recipe.method.views
    assert (optim.name, optim.lr, optim.weight_decay, optim.betas) == ("adam", 2e-3, 0, (0.9, 0.999))
    assert (schedule.name, schedule.warmup_steps, schedule.warmup_ratio, schedule.gamma) == ("step", 500, 0.001, 0.1)
    assert recipe.train.batch_size == (128 if "r50" in name else 256)
    epoch = recipe.train.checkpoint_every
    assert recipe.train.steps == 60 * epoch
    assert epoch == pytest.approx(FACES[recipe.method.select] / recipe.train.batch_size, rel=0.02)
    assert [round(m * 60) for m in schedule.milestones] == [40, 55]
    assert (views.size, views.target, recipe.method.decoding, recipe.method.flip_test) == (256, "msra", "default", True)
    assert recipe.method.student.mean == (0.485, 0.456, 0.406) and recipe.train.ema_decay is None
    assert recipe.published.value is None and "not found" in recipe.published.source and recipe.assumed


@SCHEDULES
@pytest.mark.parametrize("epochs", [60])
def test_the_rate_is_the_official_one(golden_case, epochs):
    """At 29 steps an epoch."""
    schedule = row("landmark_wflw_hrnet_w18").optim.lr_schedule
    steps = golden_case.get("inputs/landmark_iters_29_per_epoch").tolist()
    expected = golden_case.get("outputs/landmark_lr").tolist()
    found = [2e-3 * lr_factor(schedule, step, 29 * epochs) for step in steps]
    assert found == pytest.approx(expected, abs=1e-10)


def test_the_rate_falls_at_the_epochs_of_each_row():
    for name in NAMES:
        recipe = row(name)
        epoch, schedule = recipe.train.checkpoint_every, recipe.optim.lr_schedule
        factors = [lr_factor(schedule, step, recipe.train.steps) for step in (40 * epoch - 1, 40 * epoch)]
        assert factors == pytest.approx([1, 0.1]), name
        factors = [lr_factor(schedule, step, recipe.train.steps) for step in (55 * epoch - 1, 55 * epoch)]
        assert factors == pytest.approx([0.1, 0.01]), name


def test_networks_and_starts_of_the_rows():
    r50, hrnet = row("landmark_wflw_r50").method, row("landmark_wflw_hrnet_w18").method
    assert (r50.student.name, r50.head, r50.deconv, r50.fuse_upsample) == (
        "resnet50", "deconv", (256, 256, 256), "nearest"
    )  # fmt: skip
    assert (hrnet.student.name, hrnet.head, hrnet.fuse_upsample) == ("hrnet_w18", "concat", "bilinear")
    assert (r50.backbone_std, hrnet.backbone_std, r50.init, hrnet.init) == (None, 0.001, None, None)
    nets = {"r50": "resnet50", "hrnet_w18": "hrnet_w18"}
    for net, end in product(nets, ("", "_faithful")):  # a faithful stage 2 follows a faithful stage 1
        taught, recipe = f"repfusion_celebahq_{nets[net]}{end}", row(f"landmark_wflw_{net}_distilled{end}")
        assert recipe.method.init == f"runs/{taught}" and any(f"run {taught} " in need for need in recipe.needs)
        stage_1 = RECIPES[taught]().method.student
        assert stage_1.name == recipe.method.student.name
        assert (stage_1.mean, stage_1.std) == (recipe.method.student.mean, recipe.method.student.std)
        assert recipe.method.backbone_std is None


def test_the_official_networks_fit_together():
    """On paper: maps of a quarter of the crop, from heads under the official names."""
    for name, head, keys in (
        ("landmark_wflw_r50", DeconvHead, {"deconv_layers", "final_layer"}),
        ("landmark_wflw_hrnet_w18", ConcatHead, {"final_layer"}),
    ):
        method = row(name).method
        with torch.device("meta"):
            backbone = MapBackbone(method.student, method.maps, method.fuse_upsample)
            made = head(backbone.widths[-1] if head is DeconvHead else backbone.widths, 98)
            maps = made(backbone(torch.zeros(2, 3, 256, 256)))
        assert maps.shape == (2, 98, 64, 64) and {k.split(".")[0] for k in made.state_dict()} == keys


def test_a_faithful_twin_chooses_on_the_test_faces():
    for name in NAMES:
        recipe = row(name)
        assert (recipe.method.select == "test") == name.endswith("_faithful")
        assert ("test faces" in recipe.assumed[0]) and recipe.about.endswith("as released.") == name.endswith(
            "faithful"
        )
    hashes = {recipe_hash(row(name)) for name in NAMES}
    assert len(hashes) == len(NAMES)


def test_rivals_are_as_published():
    """Spec section 2d."""
    values = {net: [r.value for r in row(f"landmark_wflw_{net}").published.rivals] for net in ("r50", "hrnet_w18")}
    assert values == {"r50": [4.88, 4.67, 4.44], "hrnet_w18": [4.60, 4.06, 3.98, 4.02]}


@pytest.mark.parametrize("override", ["method.select=held_out", "optim.lr=0.1", "method.decoding=unbiased"])
def test_a_faithful_recipe_refuses_what_it_cannot_honour(override):
    with pytest.raises(UserError, match="is not the official config's"):
        load("landmark_wflw_r50_faithful", [override])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.source=digits", "data.source 'digits' has no truth for 'landmark'"),
        ("data.source=celebamask-hq:x", "has no truth for 'landmark'; those that have: wflw, placed"),
        ("method.views.target=udp", "decoding and views.target are 'udp' both or neither"),
        ("method.head=deconvolution", "method.head = 'deconvolution'"),
        ("method.views.sise=64", "unknown key 'method.views.sise'; did you mean 'size'?"),
    ],
)
def test_bad_settings_are_one_line(change, told):
    with pytest.raises(UserError) as refused:
        load("landmark_wflw_r50", [change])
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_set_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFREP_DATA", raising=False)
    with pytest.raises(UserError, match="data/wflw does not exist"):
        api.run("landmark_wflw_r50", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_smallest_runs_end_to_end(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFREP_DATA", str(shared))
    result = api.run(DEBUG, out=tmp_path / "run")
    assert {"nme", "fr10", "auc10", "best_step"} <= result["scores"].keys() and result["scores"]["best_step"] in (1, 2)
    assert result["data"]["train_images"] == 4 and "non-commercial" in result["data"]["licence"]
    rows = json.loads((tmp_path / "run/samples/predictions.json").read_text())
    assert len(rows) == 2 and rows[0]["score"] >= rows[1]["score"]
    # best/ is the network that the scores are of.
    note = json.loads((tmp_path / "run/best/best.json").read_text())
    assert -note["score"] == result["scores"]["nme"]


def test_five_points_of_another_set(tmp_path):
    """The road is the set's, not WFLW's: corners of a digit on a canvas."""
    changes = ["data.source=placed:digits", "data.only_part=null", "method.views.size=32", "method.select=last"]
    result = api.run(DEBUG, [*changes, "evaluate.samples=0", "data.labels=20"], out=tmp_path / "run")
    card = json.loads((tmp_path / "run/config.json").read_text())
    assert len(card["classes"]) == 5 and result["scores"]["nme"] > 0
