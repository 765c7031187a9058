"""The third road on CIFAR-10, as it is told and as it is counted: pytest tests/recipes/test_addp_cifar10_recipes.py"""

import re

import pytest
from torch import arange

from diffrep.assemble import METHODS, multiply_adds_per_image
from diffrep.diffusion.masking import masked_after
from diffrep.frozen.tokens import write_network
from diffrep.methods.token_predictor import mage_counts
from diffrep.recipes import RECIPES
from diffrep.recipes.addp_cifar10 import DRAWN, ENCODERS, TRAINED

RATE = 60e9  # multiply-adds a second


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The methods as the recipes build them, each on those before it; and what a whole run counts."""
    folder, made = tmp_path_factory.mktemp("networks"), {}
    for kind, name in (("tokenizer", "tokenizer"), ("token_predictor", "token_predictor"), ("addp", "addp")):
        recipe = RECIPES["addp_cifar10_small"]().stages[name]
        before = {field: str(folder) for field in ("tokenizer", "token_predictor") if hasattr(recipe.method, field)}
        method = METHODS[kind](recipe.method.model_copy(update=before), 10, 32)
        write_network(folder, kind, method.network, name, "ours")
        made[kind] = method, multiply_adds_per_image(method, 32) * recipe.train.steps * recipe.train.batch_size
    return made


@pytest.mark.parametrize(
    ("name", "kind", "parameters", "images"),
    [
        ("tokenizer_cifar10_small", "tokenizer", "0.72 M", 147_200),
        ("token_predictor_cifar10_small", "token_predictor", "2.2 M", 192_000),
        ("addp_cifar10", "addp", "2.2 M", 204_800),
    ],
)
def test_what_is_said_of_size_and_cost_is_counted(networks, name, kind, parameters, images):
    make = RECIPES[name]
    recipe, (method, counted) = make(), networks[kind]
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(float(parameters.split()[0]), rel=0.03)
    assert f"{parameters} parameters, {images:,} images" in make.__doc__
    assert recipe.train.steps * recipe.train.batch_size == images
    said = float(re.search(r"(\d\.\de\d\d) multiply-adds", recipe.about)[1])
    if kind == "addp":  # what its training skips is not counted alike everywhere
        assert 0.5 * said < counted <= 1.02 * said and said / RATE < 3600
    else:
        assert counted == pytest.approx(said, rel=0.02) and said / RATE / 60 == pytest.approx(20, abs=2)


def test_the_tokens_are_those_that_are_told(networks):
    method = networks["tokenizer"][0]
    assert 32 // method.config.network.stride == 8 and len(method.network.codebook) == 256
    assert networks["token_predictor"][0].shown(arange(64.0)[None]).shape == (1, 32)


def test_fine_tuning_and_scratch_have_the_encoders_network(networks):
    study = RECIPES["addp_cifar10_small"]()
    config = networks["addp"][0].student.config
    assert study.stages["scratch"].method.student == study.stages["addp_tuned"].method.student == config
    token_encoder = networks["token_predictor"][0].student.config
    assert study.stages["token_predictor_tuned"].method.student == token_encoder
    assert study.stages["scratch"].method.init is None and study.stages["addp_tuned"].method.init == "stage:addp"
    assert study.stages["scratch"].train.steps == 2 * study.stages["addp_tuned"].train.steps


def test_the_study_reads_its_own_networks_and_tests_read_few_labels():
    study = RECIPES["addp_cifar10_small"]()
    alone = {"tokenizer": "tokenizer_cifar10_small", "token_predictor": "token_predictor_cifar10_small"}
    for stage, name in {**alone, "addp": "addp_cifar10"}.items():
        mine, shipped = study.stages[stage].model_dump(), RECIPES[name]().model_dump()
        for field in ("tokenizer", "token_predictor"):
            if field in shipped["method"]:
                assert shipped["method"][field] == f"runs/{alone[field]}" in " ".join(shipped["needs"])
                assert mine["method"][field] == f"stage:{field}"
                shipped["method"][field] = mine["method"][field]
        assert mine | {"needs": ()} == shipped | {"needs": ()}
    for arm in ENCODERS:
        assert study.stages[arm].evaluate.probe_labels == (1_000,)
    assert study.arms == ENCODERS | DRAWN | TRAINED
    assert study.stages["untrained"].train.steps == 0
    walk = study.stages["alternation"].alternation
    assert len(masked_after(walk, 64)) == len(mage_counts(walk, 64)) == 16
