"""DiT's weights, dict in and dict out: pytest tests/models/test_dit_files.py"""

import pytest
import torch
from golden_dit import config_of, is_dit, noise, tiny
from safetensors.torch import load, save
from walks import off

from diffrep import _torchvision_compat
from diffrep.errors import UserError
from diffrep.models.dit import DiT, DiTConfig
from diffrep.models.dit_files import (
    PRESETS,
    build,
    dit_config,
    dit_weights,
    from_diffusers,
    looks_like_dit,
    to_diffusers,
)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def state_of(**changes):
    """A tiny DiT's config and weights."""
    network = tiny(**changes)
    return network.config, network.state_dict()


def refused(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What a state dict was built as


@pytest.mark.golden(of=is_dit)
@torch.no_grad()
def test_golden_weights_tell_their_config(golden_case):
    state, config = golden_case.under("weights/"), config_of(golden_case)
    assert looks_like_dit(state)
    classes = None if config.has_null_class else config.num_classes
    found = dit_config(state, config.num_heads, "official", "golden", classes)
    assert found == config
    network = build(found, state, "golden")
    x, t, y = (golden_case.get(f"inputs/{k}") for k in "xty")
    assert off(network(x, t, y), golden_case.get("outputs/forward")) < 2e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 3, "patch_size": 1, "in_channels": 3, "learn_sigma": False},
        {"depth": 11, "mlp_ratio": 1.3, "num_heads": 1, "num_classes": 1},
        {"patch_size": 4, "sinusoid": "diffusers", "hidden_size": 28},
    ],
)
def test_names_and_shapes_tell_the_rest(changes):
    config, state = state_of(**changes)
    found = dit_config(state, config.num_heads, config.sinusoid, "tiny")
    assert found == config.model_copy(update={"mlp_ratio": found.mlp_ratio}) and found.mlp_width == config.mlp_width
    assert same(build(found, state, "tiny").state_dict(), state)


def test_heads_of_the_official_widths():
    for width, heads in {1152: 16, 1024: 16, 768: 12, 384: 6}.items():
        with torch.device("meta"):
            state = DiT(DiTConfig(hidden_size=width, depth=1, num_heads=heads)).state_dict()
        assert dit_config(state, None, "official", "f").num_heads == heads
        assert dit_config(state, heads // 2, "official", "f").num_heads == heads // 2
    message = refused(dit_config, state_of()[1], None, "official", "my.pt")
    assert "my.pt has width 16, and heads cannot be seen in a file: say num_heads (known widths: 384, 768" in message


def test_whether_the_last_class_is_none():
    _, state = state_of()  # 6 rows
    asked = [dit_config(state, 2, "official", "f", classes) for classes in (None, 5, 6)]
    assert [(c.num_classes, c.has_null_class) for c in asked] == [(5, True), (5, True), (6, False)]
    assert "f has 6 rows of classes, so num_classes is 5 or 6, not 7" in refused(
        dit_config, state, 2, "official", "f", 7
    )


def test_the_released_networks():
    for name, pixels, parameters in (("dit-xl-2-256", 256, 675_129_632), ("dit-xl-2-512", 512, 676_014_368)):
        preset = PRESETS[name]
        assert preset.file == f"DiT-XL-2-{pixels}x{pixels}.pt" and preset.licence == "CC BY-NC 4.0"
        with torch.device("meta"):
            state = DiT(preset.config).state_dict()
        assert len(state) == 292 and sum(value.numel() for value in state.values()) == parameters
        assert dit_config(state, None, "official", name) == preset.config


# Checkpoints


def test_of_a_training_checkpoint_the_average_is_taken():
    state = {"w": torch.ones(1)}
    plain, ema = {"w": torch.zeros(1)}, {"module.w": torch.ones(1)}
    for wrapped in ({"model": plain, "ema": ema, "opt": {"state": {}}, "args": None}, {"ema": state}, {"model": state}):
        assert same(dit_weights(wrapped, "f"), state)
    assert same(dit_weights(state, "f"), state)
    assert same(dit_weights({"model": state, "ema": None}, "f"), state)
    assert "f holds a list and no weights by name" in refused(dit_weights, [1], "f")


# Refusals


def test_what_does_not_fit_is_named_and_counted():
    config, state = state_of()
    blocks = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    message = refused(build, config, blocks, "my.pt")
    first = ", ".join(name for name in state if name.startswith("blocks.1."))
    assert "my.pt: tensors do not fit: 10 missing (" in message
    assert f"({', '.join(first.split(', ')[:5])}, ...)" in message
    assert "1 left over (extra)" in refused(build, config, state | {"extra": torch.ones(1)}, "f")
    shape = "1 of another shape (final_layer.linear.bias (3,) instead of (32,))"
    assert shape in refused(build, config, state | {"final_layer.linear.bias": torch.ones(3)}, "f")
    whole = state | {"final_layer.linear.bias": torch.ones(32, dtype=torch.int64)}
    assert "1 no weights (final_layer.linear.bias)" in refused(build, config, whole, "f")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("pos_embed", None, "f is no DiT: it lacks pos_embed"),
        ("blocks.0.mlp.fc1.weight", None, "f is no DiT: it lacks blocks.0.mlp.fc1.weight"),
        ("x_embedder.proj.weight", torch.ones(16, 4), "f: its tensors have shapes that no DiT has"),
        ("x_embedder.proj.weight", torch.ones(16, 4, 0, 0), "f: its tensors have shapes that no DiT has"),
        ("y_embedder.embedding_table.weight", torch.ones(()), "f: its tensors have shapes that no DiT has"),
        ("final_layer.linear.weight", torch.ones(20, 16), "f: its tensors have shapes that no DiT has"),
        ("pos_embed", torch.ones(1, 0, 16), "input_size = 0"),
    ],
)
def test_what_cannot_be_a_dit_is_refused(name, value, told):
    state = {k: v for k, v in (state_of()[1] | {name: value}).items() if v is not None}
    assert told in refused(dit_config, state, 2, "official", "f")


def test_half_precision_is_read_as_float32():
    config, state = state_of()
    half = {name: value.half() for name, value in state.items()}
    network = build(config, half, "f")
    assert same(network.state_dict(), {name: value.float() for name, value in half.items()})
    assert network.blocks[0].attn.qkv.weight.requires_grad and not network.pos_embed.requires_grad


# diffusers


def plain_diffusers(config, state):
    _torchvision_compat.install()
    from diffusers import DiTTransformer2DModel

    theirs, weights = to_diffusers(config, state)
    model = DiTTransformer2DModel(**theirs)
    model.load_state_dict(weights)  # strictly
    return model.eval()


@pytest.mark.parametrize("sinusoid", ["official", "diffusers"])
def test_there_and_back_is_the_identity(sinusoid):
    config, state = state_of(sinusoid=sinusoid)
    theirs, weights = to_diffusers(config, state)
    assert len(weights) == 2 + 4 + 3 * (5 + 12 + 2)
    assert same(load(save(weights)), weights)  # no tensor twice in memory, which such a file refuses
    ours, again = from_diffusers(theirs, weights, sinusoid)
    assert ours == config and same(again, state) and list(again) == list(state)


@torch.no_grad()
def test_plain_diffusers_computes_as_we_do_with_its_sinusoid():
    config, state = state_of(sinusoid="diffusers")
    model, network = plain_diffusers(config, state), build(config, state, "tiny")
    x, t, y = noise(4, 4, 8, 8), torch.tensor([0, 7, 533, 999]), torch.tensor([0, 2, 4, 5])
    assert off(network(x, t, y), model(x, t, class_labels=y).sample) < 1e-6
    official = build(config.model_copy(update={"sinusoid": "official"}), state, "tiny")
    assert off(official(x[2:], t[2:], y[2:]), model(x, t, class_labels=y).sample[2:]) > 0.01


@torch.no_grad()
def test_diffusers_with_the_official_waves_computes_as_the_official_network():
    config, state = state_of()
    model, network = plain_diffusers(config, state), build(config, state, "tiny")
    for block in model.transformer_blocks:
        assert block.norm3.eps == 1e-6  # told in its config
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = noise(4, 4, 8, 8), torch.tensor([0, 7, 533, 999]), torch.tensor([0, 2, 4, 5])
    assert off(network(x, t, y), model(x, t, class_labels=y).sample) < 2e-5


@torch.no_grad()
def test_a_model_that_diffusers_made_is_read():
    _torchvision_compat.install()
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, patch_size=2,
            num_embeds_ada_norm=3, out_channels=4,
        ).eval()  # fmt: skip
    config, state = from_diffusers(model.config, model.state_dict(), "diffusers")
    x, t, y = noise(2, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([1, 3])
    assert not config.learn_sigma
    assert off(build(config, state, "d")(x, t, y), model(x, t, class_labels=y).sample) < 1e-5


def test_what_the_other_side_cannot_express_is_refused():
    for changes in ({"mlp_ratio": 2.0}, {"has_null_class": False}):
        assert "four times the width and a null class" in refused(to_diffusers, *state_of(**changes))
    config, state = state_of()
    shifted = state | {"pos_embed": state["pos_embed"] + 0.1}
    assert "pos_embed is not the table" in refused(to_diffusers, config, shifted)
    assert "1 missing (pos_embed)" in refused(
        to_diffusers, config, {k: v for k, v in state.items() if k != "pos_embed"}
    )


def test_foreign_diffusers_files_are_refused():
    theirs, weights = to_diffusers(*state_of())
    own = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    assert f"{own} is not that of block 0" in refused(from_diffusers, theirs, weights | {own: weights[own] + 1})
    assert "1 unexplained tensors (extra)" in refused(from_diffusers, theirs, weights | {"extra": weights[own]})
    gone = "transformer_blocks.1.attn1.to_k.bias"
    assert f"lacks {gone}" in refused(from_diffusers, theirs, {k: v for k, v in weights.items() if k != gone})
    for change, told in (
        ({"norm_type": "layer_norm"}, "its config has norm_type layer_norm"),
        ({"num_layers": 10**9}, "its config has 1000000000 layers"),
        ({"attention_head_dim": None}, "no whole number of heads"),
    ):
        assert told in refused(from_diffusers, theirs | change, weights)
    del theirs["patch_size"]
    assert "its config lacks patch_size" in refused(from_diffusers, theirs, weights)
