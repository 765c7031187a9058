"""guided-diffusion's U-Net: pytest tests/models/test_guided_unet.py"""

import math

import pytest
import torch
from golden_guided import close, config_of, inputs_of, is_guided, network_of, weights_of
from pydantic import ValidationError
from torch import nn

from diffrep import counting, taps
from diffrep.errors import UserError
from diffrep.models.guided_unet import GroupNorm, GuidedUNet, GuidedUNetConfig, QKVAttention, TimeEmbedding

TAP = "middle_block.2.out_layers.3"
TINY = {
    "image_size": 8, "out_channels": 6, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2),
    "attention_factors": (2,), "num_classes": 5, "num_head_channels": 16, "scale_shift_norm": True,
    "resblock_updown": True, "attention_order": "legacy",
}  # fmt: skip


def tiny(**changed):
    """All values drawn, those too that a fresh network has at zero."""
    network = GuidedUNet(GuidedUNetConfig(**(TINY | changed)))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.1 + ("norm.weight" in name))
    return network.eval()


def batch(count=4, size=8, channels=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=rng), torch.tensor([3, 700, 3, 41])[:count]


def features(network, names, *inputs):
    """What a full pass leaves at modules."""
    found = {}
    for name in names:
        taps.find_module(network, name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
    network(*inputs)
    return found


def relative(one, other):
    return float((one - other).norm() / other.norm())


# The official numbers


@pytest.mark.golden(of=is_guided)
@torch.no_grad()
def test_golden_forward(golden_case):
    close(network_of(golden_case)(*inputs_of(golden_case)), golden_case.get("outputs/forward"))


@pytest.mark.golden(of=lambda case: is_guided(case) and "outputs/time_embed" in case.keys)
@torch.no_grad()
def test_golden_time_embedding(golden_case):
    close(
        network_of(golden_case).time_embed(golden_case.get("inputs/timesteps")), golden_case.get("outputs/time_embed")
    )


@pytest.mark.golden(of=lambda case: is_guided(case) and any(k.startswith("outputs/feature/") for k in case.keys))
@torch.no_grad()
def test_golden_features(golden_case):
    network, expected = network_of(golden_case), golden_case.under("outputs/feature/")
    for name, feature in features(network, expected, *inputs_of(golden_case)).items():
        close(feature, expected.pop(name))
    assert not expected


@pytest.mark.golden(of=lambda case: is_guided(case) and "outputs/forward_float_time" in case.keys)
@torch.no_grad()
def test_golden_fractional_time(golden_case):
    x, timesteps, labels = inputs_of(golden_case, "inputs/timesteps_float")
    assert (timesteps != timesteps.round()).any()
    close(network_of(golden_case)(x, timesteps, labels), golden_case.get("outputs/forward_float_time"))


@pytest.mark.golden(of=lambda case: is_guided(case) and f"outputs/feature/{TAP}" in case.keys)
@torch.no_grad()
def test_golden_middle_less_tap_is_what_the_last_middle_block_was_given(golden_case):
    names = ("middle_block", TAP, "middle_block.1")
    found = features(network_of(golden_case), names, *inputs_of(golden_case))
    torch.testing.assert_close(found["middle_block"] - found[TAP], found["middle_block.1"], rtol=0, atol=1e-5)


@pytest.mark.golden(of=is_guided)
@torch.no_grad()
def test_golden_weights_fit_both_attention_orders_which_differ_with_more_than_one_head(golden_case):
    inputs, orders = inputs_of(golden_case), ("legacy", "new")
    one, other = (features(network_of(golden_case, attention_order=o), [TAP], *inputs)[TAP] for o in orders)
    config = config_of(golden_case.meta["unet_kwargs"])
    if all(heads == 1 for _, heads in config.attentions):
        assert torch.equal(one, other)
    else:
        assert relative(one, other) > 0.05


@pytest.mark.golden(of=is_guided)
def test_golden_names_are_all_of_ours(golden_case):
    assert network_of(golden_case).state_dict().keys() == weights_of(golden_case).keys()


# Size and cost


ADM_64 = {
    "image_size": 64, "model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4),
    "attention_factors": (2, 4, 8), "num_classes": 1000, "num_head_channels": 64, "attention_order": "new",
}  # fmt: skip
ADM_256 = {
    "image_size": 256, "model_channels": 256, "num_res_blocks": 2, "channel_mult": (1, 1, 2, 2, 4, 4),
    "attention_factors": (8, 16, 32), "num_classes": None, "num_head_channels": 64,
}  # fmt: skip


def on_paper(**changed):
    """No memory: these networks have gigabytes."""
    with torch.device("meta"):
        return GuidedUNet(GuidedUNetConfig(**(TINY | changed)))


def count(*modules):
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


# M parameters in all, up to the middle, behind it; G multiply-adds in all, up to the middle; the tap.
# Source: the official code, counted by torch on the meta device.
PUBLISHED = [
    (ADM_64, (295.904, 117.775, 178.130), (109.68, 31.31), (768, 8, 8)),
    (ADM_256, (552.814, 210.904, 341.910), (1119.83, 290.15), (1024, 8, 8)),
]


@pytest.mark.parametrize(("size", "parameters", "cost", "shape"), PUBLISHED, ids=["adm-64", "adm-256-uncond"])
def test_published_sizes_and_costs(size, parameters, cost, shape):
    network = on_paper(**size)
    upwards = count(network.output_blocks, network.out)
    found = [count(network), count(network) - upwards, upwards]
    assert [round(n / 1e6, 3) for n in found] == pytest.approx(parameters, abs=0.0005)
    x, t = torch.empty(1, 3, *[size["image_size"]] * 2, device="meta"), torch.empty(1, device="meta")
    labels = torch.zeros(1, dtype=torch.int64, device="meta") if size["num_classes"] else None

    def run():
        return network(x, t, labels)

    middle = [taps.Tap(TAP, shape, None)]
    read = {}
    found = [counting.multiply_adds(run), counting.multiply_adds(lambda: read.update(taps.read(network, run, middle)))]
    assert [n / 1e9 for n in found] == pytest.approx(cost, abs=0.006)
    assert read[TAP].shape == (1, *shape)


# Parts


def test_time_is_embedded_once_for_each_distinct_step_and_as_if_it_were_not():
    embed, t = TimeEmbedding(32), torch.tensor([5.5, 900.0, 5.5, 0.0, 900.0])
    seen = []
    embed[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    plain = embed[2](embed[1](embed[0](embed.sines(t))))
    found = embed(t)
    assert seen == [5, 3]
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(embed(t.double()[:1]), embed(t[:1]))


def test_sines_by_hand():
    found = TimeEmbedding(4).sines(torch.tensor([0, 300]))
    assert torch.equal(found[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    expected = [math.cos(300), math.cos(3), math.sin(300), math.sin(3)]  # 10000^(-1/2) = 1/100
    torch.testing.assert_close(found[1], torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_by_its_formula(order):
    heads, d, places = 3, 4, 5
    qkv = torch.randn(2, 3 * heads * d, places, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = QKVAttention(heads, order)(qkv)
    for head in range(heads):
        starts = [(3 * head + k) * d if order == "legacy" else (k * heads + head) * d for k in range(3)]
        q, k, v = (qkv[:, s : s + d] for s in starts)
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / d**0.5, -1)
        expected = torch.einsum("bnm,bcm->bcn", weights, v)
        torch.testing.assert_close(found[:, head * d : head * d + d], expected)


def test_norms_are_computed_in_float32_under_autocast(monkeypatch):
    norm, computed, seen = GroupNorm(32).bfloat16(), nn.functional.group_norm, []
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()

    def watched(x, groups, weight, bias, eps):
        found = computed(x, groups, weight, bias, eps)
        seen.extend(value.dtype for value in (x, weight, bias, found))
        return found

    monkeypatch.setattr(nn.functional, "group_norm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert set(seen) == {torch.float32} and inside.dtype == torch.bfloat16 and torch.equal(inside, norm(x))


@torch.no_grad()
def test_half_precision_stays_near():
    network, (x, t) = tiny(), batch()
    plain = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, t)
    assert found.dtype == torch.bfloat16 and 0 < relative(found.float(), plain) < 0.05
    assert relative(network.bfloat16()(x.bfloat16(), t).float(), plain) < 0.05


# The network


@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("blocks", "conv"), [(True, True), (False, True), (False, False)])
@torch.no_grad()
def test_every_kind_gives_maps_of_the_image_and_reads_x_t_and_class(order, norm, blocks, conv):
    network = tiny(attention_order=order, scale_shift_norm=norm, resblock_updown=blocks, conv_resample=conv)
    (x, t), labels = batch(), torch.tensor([0, 1, 2, 4])
    plain = network(x, t, labels)
    assert plain.shape == (4, 6, 8, 8)
    for changed in [(x + 0.1, t, labels), (x, t + 1, labels), (x, t, (labels + 1) % 5), (x, t, None)]:
        assert (network(*changed) - plain).flatten(1).abs().amax(1).min() > 1e-5
    torch.testing.assert_close(network(x[:2], t[:2], labels[:2]), plain[:2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_labels_nothing_is_added():
    network, (x, t) = tiny(), batch()
    without = network(x, t)
    network.label_emb.weight[2] = 0
    torch.testing.assert_close(network(x, t, torch.full((4,), 2)), without)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(UserError, match="unconditional"):
        tiny(num_classes=None)(*batch(), torch.tensor([0, 1, 2, 3]))


@torch.no_grad()
def test_a_tap_in_the_middle_stops_the_pass_there():
    network, (x, t) = tiny(), batch()
    whole = features(network, [TAP], x, t)[TAP]
    for value in network.output_blocks.parameters():
        value.fill_(math.nan)
    listed = taps.list_taps(network, lambda: network(x, t), 8)
    assert listed[TAP].shape == (64, 4, 4) and listed[TAP].calls == 1 and listed["output_blocks.3"].shape == (32, 8, 8)
    assert listed["time_embed"].shape == (128,)
    read = taps.read(network, lambda: network(x, t), [listed[TAP]])
    assert torch.equal(read[TAP], whole)


@torch.no_grad()
def test_a_fresh_network_begins_as_the_official_one():
    """Its last convolution and those of every block are zero."""
    assert not GuidedUNet(GuidedUNetConfig(**TINY))(*batch()).any()


def test_every_parameter_learns():
    network, (x, t) = tiny(), batch()
    network(x, t, torch.tensor([0, 1, 2, 4])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_size": 9}, "image_size 9 is not divisible by 2"),
        ({"image_size": 0}, "greater than or equal to 1"),
        ({"channel_mult": (1, 1.7)}, "width 54 is not divisible by the 32 groups"),
        ({"channel_mult": (0, 1)}, "width 0 is not divisible"),
        ({"channel_mult": ()}, "at least 1"),
        ({"attention_factors": (4,)}, r"attention_factors 4 is none of its levels' factors \[1, 2\]"),
        ({"num_head_channels": 48}, "num_head_channels 48 does not divide the width 64"),
        ({"num_head_channels": None, "num_heads": 3}, "3 heads do not divide the width 64"),
        ({"num_head_channels": None, "num_heads_upsample": 5}, "5 heads do not divide the width 64"),
        ({"out_channels": 4}, "out_channels 4 does not fit; valid: 3 or, with a learned variance, 6"),
        ({"attention_order": "old"}, "'legacy' or 'new'"),
        ({"dropout": 0.1}, "not permitted"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changed, words):
    with pytest.raises(ValidationError, match=words) as error:
        GuidedUNetConfig(**(TINY | changed))
    assert len(error.value.errors()) == 1 and "\n" not in error.value.errors()[0]["msg"]


def test_widths_of_fractions():
    """As official int(): 0.5 of 64; and a third, which as a number falls short of itself."""
    config = GuidedUNetConfig(
        **(TINY | {"model_channels": 96, "channel_mult": (32 / 96, 64 / 96, 1.0), "image_size": 8})
    )
    assert config.widths == (32, 64, 96)
