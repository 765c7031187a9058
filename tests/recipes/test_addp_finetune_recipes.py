"""Fine-tuning and probing ADDP: every argument of the scripts: pytest tests/recipes/test_addp_finetune_recipes.py

Numbers are typed from the scripts, the parser's defaults and the README, not taken from the recipes.
"""

import pytest

from diffrep import api
from diffrep.files import read_json
from diffrep.models import depths
from diffrep.models.students import create
from diffrep.recipes import RECIPES
from diffrep.training.optim import lr_factor, optimiser

# blr, layer_decay, drop_path, warmup, epochs, published top-1
SCRIPTS = {
    "addp_finetune_base": ("vit_base_patch16_224", 1e-3, 0.65, 0.1, 20, 100, 83.9),
    "addp_finetune_large": ("vit_large_patch16_224", 2.5e-4, 0.8, 0.2, 5, 50, 85.9),
}
STEPS = 1251  # per epoch: 1,281,167 images, 1024 at once, the rest dropped


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_of_the_finetune_scripts(name):
    student, blr, decay, drop_path, _, epochs, top1 = SCRIPTS[name]
    recipe = RECIPES[name]()
    method, optim, train = recipe.method, recipe.optim, recipe.train
    assert (method.student.name, method.student.options) == (student, {"img_size": 256})
    assert (method.student.mean, method.student.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert method.init == f"weights/addp-vit-{name.split('_')[-1]}-16" and recipe.published.value == top1
    assert (method.tokenizer_norm, method.pooling, method.drop_path) == (False, "avg", drop_path)
    assert (method.loss, method.label_smoothing, method.head_std, method.head_first) == ("ce", 0.1, 2e-5, 0)
    views = method.augment
    assert (views.rand_augment, views.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (views.mixup, views.cutmix, views.mix_prob, views.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (optim.name, optim.betas, optim.weight_decay, optim.layer_decay) == ("adamw", (0.9, 0.999), 0.05, decay)
    assert optim.weight_decay_exclude_1d and optim.rate(train.batch_size) == pytest.approx(4 * blr)
    assert (train.batch_size, train.steps) == (1024, epochs * STEPS)
    assert (train.precision, train.clip_norm, train.ema_decay) == ("fp16", None, None)
    assert (recipe.data.image_size, recipe.data.augment) == (256, "resized_crop:1000000:bicubic")
    assert recipe.evaluate.protocol == "classifier" and recipe.assumed and len(recipe.needs) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_rate_at_an_epoch(name):
    """lr e / warmup, then 1e-6 + (lr - 1e-6) half a cosine; each layer at its share of that."""
    _, blr, _, _, warmup, epochs, _ = SCRIPTS[name]
    optim, steps = RECIPES[name]().optim, epochs * STEPS
    peak = 4 * blr
    rate = {epoch: peak * lr_factor(optim.lr_schedule, epoch * STEPS, steps) for epoch in (0, 1, warmup, epochs)}
    assert rate[0] == 0 and rate[1] == pytest.approx(peak / warmup) and rate[warmup] == pytest.approx(peak)
    assert rate[epochs] == pytest.approx(1e-6)
    middle = lr_factor(optim.lr_schedule, (warmup + epochs) * STEPS // 2, steps)
    assert peak * middle == pytest.approx((peak + 1e-6) / 2, rel=1e-3)


def test_the_groups_of_the_base_script():
    """28 of 14 depths, the lowest at 0.0036972 of the rate (run with the official code)."""
    recipe = RECIPES["addp_finetune_base"]()
    options = {"img_size": 32, "embed_dim": 8, "num_heads": 2, "global_pool": "avg"}
    backbone = create("vit_base_patch16_224", 10, **options)
    parts = {"student": list(backbone.parameters())}
    made = optimiser(recipe.optim, parts, 1024, depths.layers(backbone), depths.tables(backbone))
    assert len(made.param_groups) == 28
    assert min(group["peak_lr"] for group in made.param_groups) / 4e-3 == pytest.approx(0.0036972, rel=1e-4)


def test_the_probe_is_maes():
    """main_linprobe: 90 epochs, 16,384 at once, blr 0.1, LARS without decay, 10 epochs of warm-up, down to 0."""
    recipe = RECIPES["addp_linear_probe_base"]()
    method, optim, train = recipe.method, recipe.optim, recipe.train
    per_epoch = 1_281_167 // 16_384
    assert (optim.name, optim.weight_decay, optim.momentum) == ("lars", 0, 0.9)
    assert optim.rate(train.batch_size) == pytest.approx(6.4)
    assert (train.batch_size, train.steps, optim.lr_schedule.warmup_steps) == (16_384, 90 * per_epoch, 10 * per_epoch)
    assert (method.head_first, method.head_norm, method.head_std) == (1, True, 0.01)
    assert method.augment is None and method.label_smoothing == 0 and optim.lr_schedule.final == 0
    assert recipe.published.value is None and "not found" in recipe.published.source
    assert {rival.method.split()[0]: rival.value for rival in recipe.published.rivals} == {"MAGE": 74.7, "MAE": 67.8}


def test_the_debug_twin_goes_from_images_to_scores(tmp_path):
    """Everything of the large recipes on, two steps each; then the encoder scored as it is, with either pooling."""
    api.run("addp_finetune_debug", out=tmp_path)
    results = {name: read_json(tmp_path / f"{name}-s0" / "result.json") for name in ("finetuned", "probed", "addp")}
    assert {"linear_probe_50", "knn_50"} <= results["addp"]["scores"].keys()
    for name in ("finetuned", "probed"):
        assert {"linear_probe_50", "knn_50", "top1"} <= results[name]["scores"].keys()
        assert results[name]["loaded"]["missing"] == [] and results[name]["init"].endswith("addp-s0")
    # The trunk of the probe is that of pretraining, frozen: same vectors, same scores; 10 classes of 16 numbers learn.
    assert results["probed"]["parameters"] == 170 and results["finetuned"]["parameters"] > 170
    assert results["probed"]["scores"]["linear_probe_50"] == results["addp"]["scores"]["linear_probe_50"]
    for pooling in ("avg", "cls"):
        asked = [f"method.pooling={pooling}", f"method.init={tmp_path / 'addp-s0'}", "train.steps=0"]
        student = results["finetuned"]  # its recipe, on the encoder as it is
        assert student["kind"] == "finetune"
        found = api.run(_alone(tmp_path), asked, out=tmp_path / pooling)
        assert {"linear_probe_50", "knn_50"} <= found["scores"].keys()


def _alone(folder):
    """The fine-tuning stage as a recipe of its own."""
    return str(folder / "finetuned-s0" / "recipe.yaml")
