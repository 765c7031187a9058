"""Detection's rows against the published recipe: pytest tests/recipes/test_detect_recipes.py

Numbers are typed from the sources' description, not taken from the recipes.
"""

import pytest
import torch
from toy_objects import object_set, shapes

from diffrep.methods.detect import Detect
from diffrep.recipes.detect import RECIPES
from diffrep.training.optim import lr_factor, norm_parameters, optimiser

MADE = {build.__name__: build() for build in RECIPES}
# box AP of ADDP and of MAE with ViTDet; layer decay, drop path, blocks, those that attend everywhere
SIZES = {
    "detect_coco_vitdet_b": (51.7, 51.6, 0.7, 0.1, 12, (2, 5, 8, 11)),
    "detect_coco_vitdet_l": (54.6, 55.5, 0.8, 0.4, 24, (5, 11, 17, 23)),
}


IMAGES = object_set([shapes(32, 32, 1)])


def built(name):
    with torch.device("meta"):
        return Detect(MADE[name].method.model_copy(update={"init": None}), IMAGES)


def test_which_rows_there_are():
    assert MADE.keys() == {*SIZES, "detect_coco_vitdet_debug"}
    assert all(name == recipe.name and recipe.about and recipe.needs for name, recipe in MADE.items())


@pytest.mark.parametrize("name", SIZES)
def test_every_setting_of_the_published_recipe(name):
    ours, mae, decay, drop_path, depth, everywhere = SIZES[name]
    recipe = MADE[name]
    optim, train, method = recipe.optim, recipe.train, recipe.method
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 1e-4, (0.9, 0.999), 0.1)
    assert (optim.layer_decay, optim.weight_decay_exclude_norms) == (decay, True)
    assert (train.steps, train.batch_size, train.precision) == (184_375, 64, "fp16")
    views, student = method.views, method.student
    assert (views.size, views.scale, views.flip, method.window) == (1024, (0.1, 2.0), 0.5, 14)
    assert student.options == {"img_size": 256, "drop_path_rate": drop_path}
    assert (student.mean, student.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (recipe.published.value, recipe.published.rivals[0].value) == (ours, mae)
    assert "box AP" in recipe.published.metric and recipe.assumed
    assert method.init.removeprefix("weights/") in recipe.needs[1]
    blocks = built(name).network.backbone.net.blocks
    assert len(blocks) == depth
    assert tuple(k for k, block in enumerate(blocks) if not block.attn.window) == everywhere
    assert {block.attn.window for block in blocks} == {0, 14}
    assert {len(block.attn.rel_pos_h) for block in blocks} == {27, 127}
    rates = [block.drop_path1.drop_prob for block in blocks[1:]]
    assert rates == pytest.approx([drop_path * k / (depth - 1) for k in range(1, depth)])


@pytest.mark.parametrize("name", SIZES)
def test_the_published_rates(name):
    recipe = MADE[name]
    steps = (0, 1, 249, 250, 163_888, 163_889, 177_545, 177_546)
    found = [recipe.optim.lr * lr_factor(recipe.optim.lr_schedule, step, recipe.train.steps) for step in steps]
    wanted = [1e-7, 4.996e-7, 9.96004e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_the_published_factors_of_layers_and_what_does_not_decay(name):
    """0.7^13 = 0.0096889 for the patches, 0.7 for the last block, 1 for pyramid and heads."""
    method, optim, depth = built(name), MADE[name].optim, SIZES[name][4]
    groups = optimiser(
        optim, method.parameter_groups(), 64, *method.depths(), norm_parameters(method)
    ).param_groups  # fmt: skip
    at = {id(p): (group["peak_lr"] / 1e-4, group["weight_decay"]) for group in groups for p in group["params"]}
    net, network = method.network.backbone.net, method.network
    assert at.keys() == {id(p) for p in network.parameters()}
    decay = SIZES[name][2]
    assert at[id(net.patch_embed.proj.weight)] == (pytest.approx(decay ** (depth + 1)), 0.1)
    assert at[id(net.pos_embed)] == (pytest.approx(decay ** (depth + 1)), 0)
    for k, block in enumerate(net.blocks):
        factor = pytest.approx(decay ** (depth - k))
        assert at[id(block.attn.qkv.weight)] == at[id(block.attn.qkv.bias)] == (factor, 0.1)
        assert at[id(block.attn.rel_pos_h)] == (factor, 0.1) and at[id(block.norm1.weight)] == (factor, 0)
    pyramid = network.backbone.simfp_2
    assert at[id(pyramid[0].weight)] == (1, 0.1) and at[id(pyramid[1].weight)] == at[id(pyramid[4].norm.bias)] == (1, 0)
    assert at[id(network.regions.box_predictor.cls_score.weight)] == (1, 0.1)
    if name.endswith("_b"):
        assert at[id(net.patch_embed.proj.weight)][0] == pytest.approx(0.0096889, rel=1e-5)
