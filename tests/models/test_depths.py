"""In which layer a parameter lies, and the rates that follow: pytest tests/models/test_depths.py

Factors are those of the official `lr_decay` at base and large, run with the official fine-tuning's networks.
"""

import pytest
import torch

from diffrep.errors import UserError
from diffrep.models import depths
from diffrep.models.students import create
from diffrep.training.optim import OptimConfig, optimiser

TINY = {"img_size": 32, "embed_dim": 8, "num_heads": 2}


def vit(depth=12, pooling="avg", **options):
    return create("vit_base_patch16_224", 5, **TINY, depth=depth, global_pool=pooling, **options)


def groups_of(backbone, **settings):
    """{parameter name: (share of the rate, decay)}, and the number of groups."""
    config = OptimConfig(lr=1.0, weight_decay=0.05, **settings)
    parts = {"student": [p for n, p in backbone.named_parameters() if not n.startswith("head")]}
    parts |= {"head": [*backbone.head.parameters()]}
    made = optimiser(config, parts, 256, depths.layers(backbone), depths.tables(backbone))
    names = {p: n for n, p in backbone.named_parameters()}
    flat = [names[p] for group in made.param_groups for p in group["params"]]
    assert sorted(flat) == sorted(names.values())  # each exactly once
    found = {names[p]: (g["peak_lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    return found, made


# The whole rate at the head, each layer below at a factor less: id 0 of L + 2 gets decay^(L + 1).
@pytest.mark.parametrize("depth, decay, lowest", [(12, 0.65, 0.0036972), (24, 0.8, 0.0037779)])
def test_factors_are_the_official_ones(depth, decay, lowest):
    found, made = groups_of(vit(depth), layer_decay=decay, weight_decay_exclude_1d=True)
    rates = {name: rate for name, (rate, _) in found.items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert rates[name] == pytest.approx(lowest, rel=1e-4) == decay ** (depth + 1)
    for block in range(depth):
        of_block = {rate for name, rate in rates.items() if name.startswith(f"blocks.{block}.")}
        assert len(of_block) == 1 and of_block.pop() == pytest.approx(decay ** (depth - block))
    assert rates[f"blocks.{depth - 1}.mlp.fc2.weight"] == pytest.approx(decay)
    assert {rates[name] for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")} == {1.0}
    # The official code has 28 groups at base; the head is a part of its own here, and its norm is not.
    assert len({(rate, wd) for rate, wd in found.values()}) == 2 * (depth + 2)
    assert made.param_groups[0]["peak_lr"] == 1.0  # what is logged as the rate


def test_no_decay_of_biases_norms_tables_and_class_tokens():
    found, _ = groups_of(vit(2), weight_decay_exclude_1d=True)
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    rest = found.keys() - spared
    assert {"cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.1.attn.qkv.bias", "head.bias"} <= spared
    assert rest == {
        "patch_embed.proj.weight", "head.weight",
        *(f"blocks.{k}.{part}.weight" for k in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }  # fmt: skip
    assert all(decay == 0.05 for _, decay in groups_of(vit(2))[0].values())  # as it was


def test_timms_own_grouping_agrees():
    from timm.optim import param_groups_layer_decay

    backbone = vit(3)
    found, _ = groups_of(backbone, layer_decay=0.7, weight_decay_exclude_1d=True)
    theirs = param_groups_layer_decay(backbone, 0.05, backbone.no_weight_decay(), layer_decay=0.7)
    by_theirs = {p: (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    assert found == {name: pytest.approx(by_theirs[p]) for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("pooling, options", [("token", {}), ("avg", {"pre_norm": True})])
def test_norms_lie_with_what_they_stand_beside(pooling, options):
    """The one behind the blocks with the head (timm: with the last block), the one of embeddings with them."""
    found, _ = groups_of(vit(2, pooling, **options), layer_decay=0.5)
    rates = {name: rate for name, (rate, _) in found.items()}
    assert rates["head.weight"] == 1.0 and rates["blocks.1.norm2.weight"] == 0.5
    assert all(rate == 1.0 for name, rate in rates.items() if name.startswith(("norm.", "fc_norm.")))
    assert all(rate == 0.125 for name, rate in rates.items() if name.startswith("norm_pre."))


def test_a_rate_by_part_goes_on_top():
    found, made = groups_of(vit(2), layer_decay=0.5, group_lr={"head": 10.0, "student": 2.0})
    assert found["head.weight"][0] == 10.0 and found["fc_norm.weight"][0] == 2.0
    assert found["cls_token"][0] == pytest.approx(2 * 0.5**3)
    assert {group["name"] for group in made.param_groups} == {*(f"student.{k}" for k in range(4)), "head.3"}


def test_other_networks_of_timm_have_layers_and_ours_say_that_they_have_none():
    resnet = depths.layers(create("resnet18", 5))
    assert len(resnet) > 4 and sum(map(len, resnet)) == len(list(create("resnet18", 5).parameters()))
    backbone = create("conv_small", 5)
    assert depths.layers(backbone) == [] == depths.tables(backbone)
    with pytest.raises(UserError, match=r"optim\.layer_decay: this network does not say"):
        optimiser(OptimConfig(lr=1.0, layer_decay=0.5), {"student": list(backbone.parameters())}, 8)


def test_muon_and_sgd_take_what_is_spared():
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    for name in ("sgd", "muon", "lars", "adamw"):
        config = OptimConfig(name=name, lr=0.5, weight_decay=0.1, weight_decay_exclude_1d=True)
        made = optimiser(config, {"student": [weight, bias]}, 8)
        taken = [group["weight_decay"] for group in made.param_groups]
        assert taken == [0.2 if name == "muon" else 0.1, 0.0]
