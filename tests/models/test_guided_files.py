"""Files of guided-diffusion, and diffusers both ways: pytest tests/models/test_guided_files.py"""

import functools
from contextlib import contextmanager

import pytest
import torch
from golden_guided import close, config_of, inputs_of, is_guided, network_of, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffrep.errors import UserError
from diffrep.models.guided_diffusers import from_diffusers, to_diffusers
from diffrep.models.guided_files import PRESETS, GuidedUnseen, guided_config, looks_like_guided, on_paper
from diffrep.models.guided_unet import GuidedUNet, GuidedUNetConfig

SMALL = GuidedUNetConfig(
    image_size=8, out_channels=6, model_channels=32, num_res_blocks=2, channel_mult=(1, 2, 1), attention_factors=(2,),
    num_classes=5, num_head_channels=16, scale_shift_norm=True, resblock_updown=True, attention_order="legacy",
)  # fmt: skip


def unseen_of(config):
    heads = config.num_head_channels
    return GuidedUnseen(
        image_size=config.image_size,
        attention_order=config.attention_order,
        num_heads=None if heads else config.num_heads,
        num_head_channels=heads,
    )


def changed(config, **fields):
    """Checked again, unlike model_copy."""
    return GuidedUNetConfig(**(config.model_dump() | fields))


@functools.cache
def filled(config):
    """A network whose values all differ from those of a fresh one."""
    network = GuidedUNet(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.1 + (value.dim() == 1 and "weight" in name))
    return network.eval().requires_grad_(False)


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def visible(config):
    """As a file tells it: of several ways to write one network down, the plain one."""
    blocks = config.resblock_updown and len(config.widths) > 1
    return changed(
        config,
        channel_mult=tuple(width / config.model_channels for width in config.widths),
        num_heads=1 if config.num_head_channels else config.num_heads,  # official code lets the width overrule
        num_heads_upsample=None,
        resblock_updown=blocks,
        conv_resample=config.conv_resample or blocks or len(config.widths) == 1,
    )


@st.composite
def configs(draw):
    levels = draw(st.lists(st.sampled_from([0.5, 1, 1.5, 2, 3]), min_size=1, max_size=4))
    attended = draw(st.sets(st.integers(0, len(levels) - 1)))
    channels = draw(st.sampled_from([1, 3, 4]))
    heads = draw(st.sampled_from([{"num_heads": 2}, {"num_heads": 1}, {"num_head_channels": 16}]))
    flags = {name: draw(st.booleans()) for name in ("scale_shift_norm", "resblock_updown", "conv_resample")}
    return GuidedUNetConfig(
        image_size=2 ** len(levels),
        in_channels=channels,
        out_channels=channels * draw(st.sampled_from([1, 2])),
        model_channels=draw(st.sampled_from([64, 192])),
        num_res_blocks=draw(st.integers(1, 3)),
        channel_mult=tuple(levels),
        attention_factors=tuple(2**level for level in sorted(attended)),
        num_classes=draw(st.sampled_from([None, 1, 7])),
        attention_order=draw(st.sampled_from(["legacy", "new"])),
        **heads,
        **flags,
    )


# What a file tells


@pytest.mark.golden(of=is_guided)
def test_golden_weights_tell_their_config(golden_case):
    config = config_of(golden_case.meta["unet_kwargs"])
    assert guided_config(weights_of(golden_case), unseen_of(config), "golden") == visible(config)


@given(configs())
@settings(max_examples=30, deadline=None)
def test_every_network_is_read_off_its_tensors(config):
    state = on_paper(config)
    assert looks_like_guided(state)
    assert guided_config(state, unseen_of(config), "FILE") == visible(config)


@pytest.mark.parametrize("key", PRESETS)
def test_published_files_are_read_off_their_tensors(key):
    known = PRESETS[key]
    assert guided_config(on_paper(known.config), known.unseen, known.file) == known.config


# Millions of parameters, as the paper's tables of hyper-parameters give them for 64, 128, 256 and 512 pixels, and
# (without classes) counted of the official code.
@pytest.mark.parametrize(
    ("key", "millions"),
    [("adm-64", 296), ("adm-128", 422), ("adm-256", 554), ("adm-512", 559), ("adm-256-uncond", 552.814)],
)
def test_published_sizes(key, millions):
    counted = sum(value.numel() for value in on_paper(PRESETS[key].config).values()) / 1e6
    assert counted == pytest.approx(millions, abs=0.0005 if isinstance(millions, float) else 0.5)


def test_what_published_files_cannot_tell():
    assert {key: (p.file, p.unseen.image_size, p.noise_schedule) for key, p in PRESETS.items()} == {
        "adm-64": ("64x64_diffusion.pt", 64, "cosine"),
        "adm-128": ("128x128_diffusion.pt", 128, "linear"),
        "adm-256": ("256x256_diffusion.pt", 256, "linear"),
        "adm-256-uncond": ("256x256_diffusion_uncond.pt", 256, "linear"),
        "adm-512": ("512x512_diffusion.pt", 512, "linear"),
        "adm-lsun-bedroom": ("lsun_bedroom.pt", 256, "linear"),
        "adm-lsun-cat": ("lsun_cat.pt", 256, "linear"),
        "adm-lsun-horse": ("lsun_horse.pt", 256, "linear"),
        "adm-lsun-horse-nodropout": ("lsun_horse_nodropout.pt", 256, "linear"),
    }
    assert {key for key, p in PRESETS.items() if p.unseen.attention_order == "new"} == {"adm-64"}
    assert {key: p.unseen.num_heads for key, p in PRESETS.items() if p.unseen.num_heads} == {"adm-128": 4}
    assert {p.unseen.num_head_channels for p in PRESETS.values()} == {None, 64}
    assert {p.unseen.noise_schedule for p in PRESETS.values()} == {"cosine", "linear"}
    for known in PRESETS.values():  # attention at 32, 16 and 8 pixels
        assert [known.config.image_size // f for f in known.config.attention_factors] == [32, 16, 8]


# Refusals


def without(*starts):
    return lambda state: {n: v for n, v in state.items() if not n.startswith(starts)}


def put(name, *shape, dtype=torch.float32):
    return lambda state: state | {name: torch.empty(shape, dtype=dtype, device="meta")}


def classifier(state):
    kept = without("output_blocks.", "out.2.")(state)
    return kept | {"out.2.positional_embedding": torch.zeros(32, 65), "out.2.qkv_proj.weight": torch.zeros(96, 32, 1)}


FIVE = ", ".join(
    f"middle_block.1.{n}" for n in ("norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj_out.weight")
)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("middle_block.1.norm.bias"), r"1 missing \(middle_block.1.norm.bias\)"),
        (without("middle_block.1.", "out.0."), rf"8 missing \({FIVE}, \.\.\.\)"),
        (put("more.weight", 3), r"1 left over \(more.weight\)"),
        (put("input_blocks.99999999999.0.op.weight", 3), "1 left over"),
        (put("output_blocks.99999999999.0.in_layers.0.weight", 3), "1 left over"),
        (without("output_blocks.4."), r": 18 missing \(output_blocks.4.0.in_layers.0.weight, [^;]*\)$"),
        (put("output_blocks." + "9" * 5000 + ".0.conv.weight", 3), "shapes that no"),
        (put("middle_block.1.qkv.weight", 96, 7, 1), r"1 of another shape \(middle_block.1.qkv.weight \(96, 7, 1\)"),
        (put("label_emb.weight"), "shapes that no"),
        (put("label_emb.weight", 5, 4), r"label_emb.weight \(5, 4\) instead of \(5, 128\)"),
        (put("out.2.weight", 5, 32, 3, 3), "out_channels 5 does not fit; valid: 3 or"),
        (put("out.0.weight", 32, dtype=torch.int64), r"1 no weights \(out.0.weight\)"),
        (without("out.2.weight"), "lacks out.2.weight"),
        (without("time_embed."), "lacks time_embed.0.weight"),
        (lambda state: {}, "lacks time_embed.0.weight"),
        (put("time_embed.0.weight", 128, 0), "shapes that no"),
        (put("time_embed.0.weight", 128, 31), "model_channels"),
        (put("time_embed.0.weight", 128, 62), r"time_embed.0.weight \(128, 62\) instead of \(248, 62\)"),
        (classifier, "is a classifier of guided-diffusion: it names classes and predicts no noise"),
        (put("input_blocks.0.0.weight", 32, 6, 3, 3), r"super-resolution network .*\(6 channels\)"),
    ],
)
def test_what_is_no_diffusion_file_is_refused(spoil, words):
    with pytest.raises(UserError, match=words) as error:
        guided_config(spoil(on_paper(SMALL)), unseen_of(SMALL), "FILE")
    assert str(error.value).startswith("FILE") and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"image_size": 10}, "image_size 10 is not divisible by 4"),
        ({"num_head_channels": 24}, "num_head_channels 24 does not divide the width"),
        ({"num_head_channels": None, "num_heads": 3}, "3 heads do not divide the width"),
    ],
)
def test_what_is_said_has_to_fit(said, words):
    unseen = GuidedUnseen(**(unseen_of(SMALL).model_dump() | said))
    with pytest.raises(UserError, match=words):
        guided_config(on_paper(SMALL), unseen, "FILE")


@pytest.mark.parametrize("heads", [{}, {"num_heads": 4, "num_head_channels": 64}])
def test_heads_are_said_in_one_way(heads):
    with pytest.raises(ValidationError, match="give either num_heads or num_head_channels"):
        GuidedUnseen(image_size=8, attention_order="new", **heads)


def test_other_networks_do_not_look_like_these():
    state = on_paper(SMALL)
    assert looks_like_guided(classifier(state))  # refused later, by its name
    assert not looks_like_guided(put("input_blocks.1.1.transformer_blocks.0.norm1.weight", 3)(state))
    assert not looks_like_guided({"conv1.weight": torch.zeros(1)}) and not looks_like_guided({})


# diffusers


def unet(words, state):
    """diffusers' own network, strictly loaded."""
    from diffrep import _torchvision_compat

    _torchvision_compat.install()
    from diffusers import UNet2DModel

    network = UNet2DModel(**words)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@contextmanager
def refused(words):
    with pytest.raises(UserError, match=words) as error:
        yield
    assert str(error.value).startswith("FILE") and "\n" not in str(error.value)


def in_diffusers(case):
    """Whether there is such a UNet2DModel: all else is refused, below."""
    if not is_guided(case):
        return False
    config = config_of(case.meta["unet_kwargs"])
    one_width = len({width // heads for width, heads in config.attentions}) == 1
    resized = config.resblock_updown or config.conv_resample
    return config.channel_mult[0] == 1 and resized and (one_width or {h for _, h in config.attentions} == {1})


@pytest.mark.golden(of=in_diffusers)
@torch.no_grad()
def test_golden_network_in_diffusers_and_back(golden_case):
    state, (x, timesteps, labels) = weights_of(golden_case), inputs_of(golden_case)
    config = network_of(golden_case).config
    theirs = to_diffusers(config, state, "golden")
    close(unet(*theirs)(x, timesteps, labels).sample, golden_case.get("outputs/forward"))
    again, back = from_diffusers(*theirs, "golden", config.attention_order)
    assert same(back, {name: state[name] for name in back}) and back.keys() == state.keys()
    assert again.attentions == config.attentions


VARIANTS = [
    {},
    {"attention_factors": (1, 4)},
    {"attention_factors": ()},
    {"attention_factors": (), "resblock_updown": False, "num_classes": None},
    {"attention_factors": (1, 2, 4), "resblock_updown": False, "scale_shift_norm": False, "out_channels": 3},
    {"attention_order": "new", "num_res_blocks": 1, "channel_mult": (1,), "attention_factors": (1,)},
    {"num_head_channels": None, "num_heads": 1},
    {"num_head_channels": None, "num_heads": 2, "num_heads_upsample": 4, "attention_factors": ()},
    {"num_head_channels": None, "num_heads": 4, "channel_mult": (1, 2, 2), "attention_factors": (2, 4)},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("order", ["legacy", "new"])
def test_the_same_network_in_diffusers(fields, order):
    config = changed(SMALL, attention_order=order, **{k: v for k, v in fields.items() if k != "attention_order"})
    network = filled(config)
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([17.0, 801.5])
    labels = torch.tensor([4, 0]) if config.num_classes else None
    words, state = to_diffusers(config, network.state_dict(), "FILE")
    theirs = unet(words, state)
    close(theirs(x, t, labels).sample, network(x, t, labels))
    again, back = from_diffusers(dict(theirs.config), theirs.state_dict(), "FILE", order)
    assert same(back, network.state_dict())
    if not config.num_head_channels:
        again = changed(again, num_head_channels=None, num_heads=config.num_heads)
    assert again == changed(config, num_heads_upsample=None, num_heads=again.num_heads)
    close(filled_with(from_diffusers(words, state, "FILE"))(x, t, labels), network(x, t, labels))  # new order, whatever


def filled_with(read):
    config, state = read
    network = GuidedUNet(config)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channel_mult": (0.5, 1, 1), "model_channels": 64}, "first level is 32 wide .* embedded in 64; in diffusers"),
        ({"channel_mult": (2, 2, 2)}, "first level is 64 wide"),
        ({"resblock_updown": False, "conv_resample": False}, "change size without weights"),
        (
            {"num_head_channels": None, "num_heads": 4},
            "heads 8 and 16 channels wide; in diffusers all are of one width",
        ),
        (
            {"num_head_channels": None, "num_heads": 1, "num_heads_upsample": 2, "channel_mult": (1, 2, 2)},
            "heads 32 and 64 channels wide",
        ),
    ],
)
def test_what_diffusers_cannot_express_is_refused(fields, words):
    config = changed(SMALL, **fields)
    with refused(words):
        to_diffusers(config, on_paper(config), "FILE")


def test_tensors_that_do_not_fit_go_neither_way():
    with refused("1 missing .out.0.bias"):
        to_diffusers(SMALL, without("out.0.bias")(on_paper(SMALL)), "FILE")
    words, state = to_diffusers(SMALL, on_paper(SMALL), "FILE")
    with refused("1 missing .mid_block.attentions.0.to_q.weight"):
        from_diffusers(words, without("mid_block.attentions.0.to_q.weight")(state), "FILE")
    with refused("1 left over .more"):
        from_diffusers(words, put("more", 3)(state), "FILE")
    with refused(r"conv_in.weight \(32, 3, 1, 1\) instead of \(32, 3, 3, 3\)"):
        from_diffusers(words, put("conv_in.weight", 32, 3, 1, 1)(state), "FILE")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"freq_shift": 1}, "no U-Net of guided-diffusion: it has freq_shift 1 instead of 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 instead of 1e-05"),
        ({"downsample_padding": 0}, "downsample_padding 0 instead of 1"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups None instead of 32"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        ({"sample_size": None}, "sample_size = None"),
        ({"sample_size": (8, 8)}, "sample_size = "),
        ({"block_out_channels": ()}, "block_out_channels = "),
        ({"block_out_channels": (0, 0, 0)}, "model_channels = 0"),
        ({"block_out_channels": (32, 64)}, "its way up is not its way down reversed"),
        ({"block_out_channels": (32, 80, 32)}, "width 80 is not divisible"),
        ({"attention_head_dim": 24}, "num_head_channels 24 does not divide"),
        ({"down_block_types": ("SkipDownBlock2D",) * 3}, "it has a level SkipDownBlock2D"),
        ({"up_block_types": ("ResnetUpsampleBlock2D",) * 3}, "its way up is not its way down reversed"),
        ({"downsample_type": "conv"}, "only some of its levels change size by residual blocks"),
        ({"downsample_type": None}, "downsample_type = None"),
    ],
)
def test_other_unets_are_refused(spoil, words):
    theirs, state = to_diffusers(SMALL, on_paper(SMALL), "FILE")
    with refused(words):
        from_diffusers(theirs | spoil, state, "FILE")


@pytest.mark.parametrize("name", ["sample_size", "block_out_channels", "down_block_types", "up_block_types"])
def test_a_config_without_its_levels_is_refused(name):
    theirs, state = to_diffusers(SMALL, on_paper(SMALL), "FILE")
    with refused(f"{name} is missing"):
        from_diffusers({k: v for k, v in theirs.items() if k != name}, state, "FILE")
