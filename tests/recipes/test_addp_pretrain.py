"""The pretraining scripts of the official repository as recipes: pytest tests/recipes/test_addp_pretrain.py

Numbers are typed from scripts and parser (specification 2.2, 2.4, 2.5), not taken from the recipes.
"""

import pytest
import torch

from diffrep.data.transforms import augmentation
from diffrep.diffusion.masking import PairMaskConfig
from diffrep.methods.addp import config_of
from diffrep.models.addp_vit import ADDPVit
from diffrep.recipes import RECIPES
from diffrep.training.optim import lr_factor

# epochs, --token_predictor, trainable parameters, FID, IS
SCRIPTS = {
    "addp_pretrain_base_1600ep": (1600, "mage-vitb-1600.pth", 146_868_969, 8.9, "IS 95.3"),
    "addp_pretrain_large_800ep": (800, "mage-vitl-1600.pth", 410_417_897, 7.6, "IS 105.1"),
}
SCRIPT = pytest.mark.parametrize("name", SCRIPTS)
UNUSED = {"base": (768, 1_182_720 - 257 * 768), "large": (1024, 1_576_704 - 257 * 1024)}  # trainable, and never read


@SCRIPT
def test_every_argument_of_the_script(name):
    epochs, predictor, parameters, *_ = SCRIPTS[name]
    recipe = RECIPES[name]()
    optim, train, method = recipe.optim, recipe.train, recipe.method
    assert (train.steps, train.batch_size, train.clip_norm, train.precision) == (epochs * 312, 4096, 3.0, "fp16")
    assert optim.rate(train.batch_size) == pytest.approx(1.6e-3) and train.ema_decay is None
    assert (optim.name, optim.betas, optim.weight_decay, optim.group_lr) == ("adamw", (0.9, 0.95), 0.05, {})
    assert optim.weight_decay_exclude_1d and optim.layer_decay == 1
    assert (recipe.data.image_size, recipe.seed, method.label_smoothing, method.codes_alone) == (256, 0, 0.1, False)
    crops = augmentation(recipe.data.augment).places
    assert (crops.least_area, crops.is_bicubic, crops.num_views) == (0.2, True, 1_000_000)
    assert method.tokenizer == "weights/vqgan_jax_strongaug.ckpt" and method.token_predictor == f"weights/{predictor}"
    assert method.mask == PairMaskConfig(minimum=0.5, maximum=1.0, mu=0.55, std=0.25, offset=5, ratio_per="batch")
    assert train.checkpoint_every == 5 * 312
    assert (method.network.dropout, method.network.decoder_depth, method.network.decoder_num_heads) == (0.1, 8, 16)
    size = name.split("_")[2]
    with torch.device("meta"):
        network = ADDPVit(config_of(method.network, {"image_size": 256, "patch_size": 16, "num_codes": 1024}))
    assert network.config.embed_dim == UNUSED[size][0]
    assert sum(p.numel() for p in network.parameters()) + UNUSED[size][1] == parameters


@SCRIPT
def test_the_rate_of_the_official_schedule(name):
    """0 at first, lr e / 40 to epoch 40, then half a cosine to 0 (specification 8, fact 15)."""
    recipe, epochs = RECIPES[name](), SCRIPTS[name][0]
    schedule, steps = recipe.optim.lr_schedule, recipe.train.steps
    for epoch, expected in ((0, 0.0), (10, 0.25), (40, 1.0), ((epochs + 40) / 2, 0.5), (epochs, 0.0)):
        assert lr_factor(schedule, round(epoch * 312), steps) == pytest.approx(expected, abs=1e-9)
    assert lr_factor(schedule, 1, steps) == pytest.approx(1 / (40 * 312))


@SCRIPT
def test_what_is_published_needed_and_assumed(name):
    recipe = RECIPES[name]()
    _, predictor, _, fid, inception_score = SCRIPTS[name]
    assert recipe.published.value == fid and inception_score in recipe.published.metric
    told = " ".join(recipe.needs)
    assert predictor in told and "vqgan_jax_strongaug.ckpt" in told and "non-commercial" in told and "MIT" in told
    said = " ".join(recipe.assumed)
    for word in ("cropped as stored", "each process", "predictor_dropout", "float16", "every 500", "held out"):
        assert word in said
    assert f"{SCRIPTS[name][0]} epochs" in recipe.about
