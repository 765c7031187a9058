"""Segmentation's rows against the configs and the published recipe: pytest tests/recipes/test_segment_recipes.py

Numbers are typed from the sources' description, not taken from the recipes.
"""

import pytest
import torch
from toy_masks import mask_set

from diffrep.methods.segment import SIDE_WEIGHTS, Segment
from diffrep.recipes import repfusion_rows
from diffrep.recipes.segment import RECIPES
from diffrep.training.optim import lr_factor, optimiser

MADE = {build.__name__: build() for build in RECIPES}
FACES = [f"segment_celebamask_bisenet_{net}{start}" for net in ("r18", "r50") for start in ("", "_distilled")]
SCENES = {"segment_ade20k_upernet_vit_b": (48.1, 0.65, 0.1), "segment_ade20k_upernet_vit_l": (54.3, 0.8, 0.2)}


def rates(recipe, steps):
    return [recipe.optim.lr * lr_factor(recipe.optim.lr_schedule, step, recipe.train.steps) for step in steps]


def test_which_rows_there_are():
    debug = {"segment_celebamask_bisenet_r18_debug", "segment_ade20k_upernet_debug"}
    faithful = {f"{name}_faithful" for name in FACES}
    assert MADE.keys() == {*FACES, *faithful, *SCENES, "segment_celebamask_bisenet_ohem", *debug}
    assert all(recipe.method.side_weight is None for recipe in MADE.values())
    assert all(name == recipe.name and recipe.about and recipe.needs for name, recipe in MADE.items())


@pytest.mark.parametrize("name", [*FACES, *(f"{name}_faithful" for name in FACES)])
def test_every_setting_of_the_face_configs(name):
    recipe = MADE[name]
    optim, train, views = recipe.optim, recipe.train, recipe.method.views
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 5e-3, 0.9, 5e-4)
    assert not optim.group_lr and not optim.weight_decay_exclude_1d
    assert (train.steps, train.batch_size, train.checkpoint_every) == (160_000, 16, 16_000)
    wanted = [5.0e-4, 2.74242e-3, 4.97243e-3, 3.59737e-3, 1.50716e-3, 1.00102e-4]
    assert rates(recipe, (0, 500, 1000, 50000, 120000, 159999)) == pytest.approx(wanted, rel=1e-5)
    assert (views.base, views.ratio_range, views.crop, views.cat_max_ratio) == ((512, 512), (0.5, 2.0), 448, 0.75)
    assert (views.flip, views.colour, views.test, views.test_ratios) == (0.5, "photometric", "whole", (1.0,))
    assert views.swap_mirrored == ("faithful" not in name) and not views.ratios and not views.test_flip
    method = recipe.method
    assert (method.head, SIDE_WEIGHTS[method.head], method.loss, method.select) == ("bisenet", 1.0, "ce", "last")
    assert method.student.name == ("resnet18" if "r18" in name else "resnet50")
    assert (method.student.mean, method.student.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert recipe.published.value is None and "not found" in recipe.published.source


@pytest.mark.parametrize("name", [name for name in MADE if "distilled" in name])
def test_where_distilled_networks_start(name):
    """Stage 1 is a recipe of ours for the same network, which sees images as stage 2 does."""
    first = MADE[name].method.init.removeprefix("runs/")
    (build,) = [build for build in repfusion_rows.RECIPES if build.__name__ == first]
    student, own = build().method.student, MADE[name].method.student
    assert (student.name, student.mean, student.std) == (own.name, own.mean, own.std)
    assert first.endswith("faithful") == name.endswith("faithful") and any(first in need for need in MADE[name].needs)


def test_every_setting_of_the_recipe_of_hard_pixels():
    recipe = MADE["segment_celebamask_bisenet_ohem"]
    optim, train, method, views = recipe.optim, recipe.train, recipe.method, recipe.method.views
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 1e-2, 0.9, 5e-4)
    assert optim.group_lr == {"head": 10} and (train.steps, train.batch_size) == (80_000, 16)
    assert rates(recipe, (0, 500, 1000)) == pytest.approx([1e-5, (1e-5 * 1e-2) ** 0.5, 1e-2], rel=1e-6)
    assert rates(recipe, (40_500,)) == pytest.approx([1e-2 * 0.5**0.9], rel=1e-6)
    assert (method.loss, method.hard_below, method.hard_share) == ("ohem", 0.7, 1 / 16)
    assert views.ratios == (0.75, 1, 1.25, 1.5, 1.75, 2) and (views.crop, views.base) == (448, (512, 512))
    assert (views.colour, views.swap_mirrored, views.cat_max_ratio) == ("jitter", True, 1)
    assert any("padded; published: enlarged" in line for line in recipe.assumed)  # 0.75 x 512 < 448


@pytest.mark.parametrize("name", SCENES)
def test_every_setting_of_the_scene_recipe(name):
    miou, decay, drop_path = SCENES[name]
    recipe = MADE[name]
    optim, train, method, views = recipe.optim, recipe.train, recipe.method, recipe.method.views
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0.05)
    assert (optim.layer_decay, optim.weight_decay_exclude_1d) == (decay, True)
    assert (train.steps, train.batch_size, train.precision) == (160_000, 16, "fp16")
    # 1,500 steps of warm-up from a millionth of a line that falls to 0
    wanted = [1e-10, 3.3229e-5, 9.90625e-5, 6.875e-5, 2.5e-5, 6.25e-10]
    assert rates(recipe, (0, 500, 1500, 50000, 120000, 159999)) == pytest.approx(wanted, rel=1e-4)
    assert method.student.options == {"img_size": 512, "drop_path_rate": drop_path}
    assert (method.head, SIDE_WEIGHTS[method.head], method.width, method.maps) == ("upernet", 0.4, None, ())
    assert (views.base, views.crop, views.test, views.window, views.stride) == ((2048, 512), 512, "slide", 512, 256)
    assert recipe.published.value == miou and recipe.assumed and len(recipe.needs) == 2
    if name.endswith("b"):
        assert [rival.value for rival in recipe.published.rivals] == [48.13, 48.70]


def built(name):
    """The network on paper, from no weights."""
    config = MADE[name].method.model_copy(update={"init": None})
    classes = tuple(f"c{k}" for k in range(150 if "ade20k" in name else 19))
    images = mask_set([torch.zeros(8, 8, dtype=torch.uint8)], classes=classes, mirrored=())
    with torch.device("meta"):
        return Segment(config, images)


@pytest.mark.parametrize(("name", "count"), [(FACES[0], 13_425_721), (FACES[2], 59_243_385)])
def test_parameters_of_the_published_face_parsers(name, count):
    assert sum(p.numel() for p in built(name).parameters()) == count


def test_parameters_and_rates_of_the_published_scene_network():
    """ViT-B without last norm; 1 + 32 x 32 positions. Rates fall by 0.65 from the heads to block 11 and on."""
    method, optim = built("segment_ade20k_upernet_vit_b"), MADE["segment_ade20k_upernet_vit_b"].optim
    encoder = 12 * 7_087_872 + 768 * (16 * 16 * 3 + 1) + 768 + 768 * (1 + 32 * 32)
    assert sum(p.numel() for p in method.backbone.parameters()) == encoder
    assert sum(p.numel() for p in method.parameters()) == encoder + 7_081_728 + 67_963_542 + 1_808_534
    assert method.backbone.names == ("blocks.3", "blocks.5", "blocks.7", "blocks.11")
    made = optimiser(optim, method.parameter_groups(), 16, *method.depths())
    factor = {id(p): group["peak_lr"] / 1e-4 for group in made.param_groups for p in group["params"]}
    net = method.backbone.net
    for p, power in [(net.pos_embed, 13), (net.patch_embed.proj.weight, 13), (net.blocks[0].attn.qkv.weight, 12)]:
        assert factor[id(p)] == pytest.approx(0.65**power)
    assert factor[id(net.blocks[11].mlp.fc2.weight)] == pytest.approx(0.65)
    assert factor[id(method.network.decode_head.conv_seg.weight)] == 1
    decayed = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decayed[id(net.pos_embed)] == 0 and decayed[id(net.blocks[0].norm1.weight)] == 0
    assert decayed[id(net.blocks[0].attn.qkv.weight)] == 0.05


def test_maps_of_the_large_network():
    assert built("segment_ade20k_upernet_vit_l").backbone.names == ("blocks.7", "blocks.11", "blocks.15", "blocks.23")
