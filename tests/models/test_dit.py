"""DiT against the official network, alone and in a walk: pytest tests/models/test_dit.py"""

import functools

import pytest
import torch
from golden_dit import dit_of, is_dit, noise, tiny
from pydantic import ValidationError
from walks import Given, off, one_step, since, until

from diffrep import counting, taps
from diffrep.diffusion.sampling import clean_from_noise, clipped, ddim, ddim_reverse, ddpm, guided, posterior
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.models.dit import DiT, DiTConfig, position_table, sinusoid
from diffrep.taps import Tap

# The official numbers: one call


@pytest.mark.golden(of=is_dit)
@torch.no_grad()
def test_golden_every_stage_of_a_call(golden_case):
    network, (x, t, y) = dit_of(golden_case), (golden_case.get(f"inputs/{k}") for k in "xty")
    assert network.grid == (x.shape[-1] // golden_case.meta["patch_size"],) * 2
    blocks = [f"blocks.{i}" for i in range(golden_case.meta["depth"])]
    names = ["t_embedder", "y_embedder", "x_embedder", *blocks, "final_layer"]
    found = taps.read(network, lambda: network(x, t, y), [Tap(name, (), None) for name in names])
    official = ["t_emb", "y_emb", "patch", *(f"block{i}" for i in range(len(blocks))), "final_tokens"]
    for ours, theirs in zip(names, official, strict=True):
        assert off(found[ours], golden_case.get(f"outputs/{theirs}")) < 2e-5, ours
    assert off(found["x_embedder"] + network.pos_embed, golden_case.get("outputs/tokens_in")) < 2e-5
    assert off(sinusoid(t), golden_case.get("outputs/t_freq")) < 2e-5


@pytest.mark.golden(of=is_dit)
@torch.no_grad()
def test_golden_prediction_also_between_timesteps(golden_case):
    network, (x, y) = dit_of(golden_case), (golden_case.get(f"inputs/{k}") for k in "xy")
    for timesteps, name in (("t", "forward"), ("t_frac", "forward_t_frac")):
        assert off(network(x, golden_case.get(f"inputs/{timesteps}"), y), golden_case.get(f"outputs/{name}")) < 2e-5


@pytest.mark.golden(of=lambda case: "grid_size" in case.meta and "outputs/pos_embed" in case.keys)
def test_golden_position_table(golden_case):
    expected = golden_case.get("outputs/pos_embed")
    found = position_table(golden_case.meta["embed_dim"], golden_case.meta["grid_size"])
    assert found.dtype == torch.float64 and float((found - expected).abs().max()) < 1e-12


@pytest.mark.golden(of=is_dit)
def test_golden_position_table_of_a_network_is_equal_bit_for_bit(golden_case):
    fresh, loaded = DiT(dit_of(golden_case).config), golden_case.get("weights/pos_embed")
    assert torch.equal(fresh.pos_embed, loaded) and not fresh.pos_embed.requires_grad


# The official numbers: one step of a walk


def schedules(case):
    """(the whole one, the respaced one)."""
    whole = NoiseSchedule.named("linear", case.meta.get("diffusion_steps", 1000))
    return whole, whole.respaced(case.meta["respacing"])


def steps(case):
    """One tuple per image: row, step, x, what our network predicts of it; the step itself is taken in float64."""
    network, (_, schedule) = dit_of(case), schedules(case)
    x, y = case.get("inputs/x"), case.get("inputs/y")
    for k, step in enumerate(case.get("inputs/ti").tolist()):
        row = slice(k, k + 1)
        with torch.no_grad():
            output = network(x[row], torch.tensor([int(schedule.timestep[step])]), y[row])
        yield row, step, x[row].double(), output.double()


def has(*names):
    return lambda case: is_dit(case) and {f"outputs/{name}" for name in names} <= case.keys


@pytest.mark.golden(of=has("pmv_mean", "pmv_variance", "pmv_log_variance", "pmv_pred_xstart", "p_sample"))
def test_golden_posterior_and_ancestral_step(golden_case):
    _, schedule = schedules(golden_case)
    for row, step, x, output in steps(golden_case):
        expected = {n.removeprefix("outputs/"): golden_case.get(n)[row] for n in golden_case.keys if "outputs/p" in n}
        mean, log_variance = posterior(output, x, schedule, step)
        clean = clean_from_noise(x, output[:, : x.shape[1]], schedule.alpha_bar_at(step))
        assert off(mean, expected["pmv_mean"]) < 2e-5 and off(clean, expected["pmv_pred_xstart"]) < 2e-5
        assert off(log_variance, expected["pmv_log_variance"]) < 2e-5
        assert off(log_variance.exp(), expected["pmv_variance"]) < 2e-4
        draws = Given([golden_case.get("inputs/step_noise")[row]] if step else [])
        part = until(schedule, step)
        found = one_step(functools.partial(ddpm, noise=x, schedule=part, rng=draws), output, part, part.timestep[-1])
        assert off(found, expected["p_sample"]) < 2e-5


@pytest.mark.golden(of=has("pmv_clip_mean", "pmv_clip_pred_xstart"))
def test_golden_clipped_posterior(golden_case):
    whole, schedule = schedules(golden_case)
    for row, step, x, output in steps(golden_case):
        timestep = torch.tensor([int(schedule.timestep[step])])
        held = clipped(lambda x, timestep, output=output: output, whole)(x, timestep)
        clean = clean_from_noise(x, held[:, : x.shape[1]], schedule.alpha_bar_at(step))
        assert off(clean, golden_case.get("outputs/pmv_clip_pred_xstart")[row]) < 2e-4
        assert off(posterior(held, x, schedule, step)[0], golden_case.get("outputs/pmv_clip_mean")[row]) < 2e-4


@pytest.mark.golden(of=lambda case: is_dit(case) and any(k.startswith("outputs/ddim_eta") for k in case.keys))
def test_golden_ddim_step(golden_case):
    _, schedule = schedules(golden_case)
    etas = sorted(k.removeprefix("outputs/ddim_eta") for k in golden_case.keys if k.startswith("outputs/ddim_eta"))
    for row, step, x, output in steps(golden_case):
        part = until(schedule, step)
        for eta in etas:
            draws = Given([golden_case.get("inputs/step_noise")[row]] if step and float(eta) else [])
            walk = functools.partial(ddim, noise=x, schedule=part, rng=draws, eta=float(eta))
            expected = golden_case.get(f"outputs/ddim_eta{eta}")[row]
            assert off(one_step(walk, output, part, part.timestep[-1]), expected) < 2e-5, (eta, step)


@pytest.mark.golden(of=has("ddim_reverse"))
def test_golden_ddim_reverse_step(golden_case):
    _, schedule = schedules(golden_case)
    for row, step, x, output in steps(golden_case):
        part = since(schedule, step)
        walk = functools.partial(ddim_reverse, images=x, schedule=part)
        found = one_step(walk, output, part, schedule.timestep[step])
        assert off(found, golden_case.get("outputs/ddim_reverse")[row]) < 2e-4


# The official numbers: guidance, alone and for a whole walk


def official_halves(network, labels, null, s, channels):
    """The official batch: conditional half, unconditional half, and x of the first half alone.

    Guided noise goes to both halves; what is not guided stays conditional in the first and unconditional in the second.
    """

    def denoiser(x, timestep):
        x, timestep = x.chunk(2)[0], timestep.chunk(2)[0]
        conditional, unconditional = network(x, timestep, labels), network(x, timestep, null)
        first = guided(conditional, unconditional, s, channels)
        return torch.cat([first, torch.cat([first[:, :channels], unconditional[:, channels:]], 1)])

    return denoiser


def rules(case):
    """{how the file calls it: (denoiser, guided channels)}; the null class is asked for as ours is, by no label."""
    network, y, s = dit_of(case), case.get("inputs/cfg_y"), case.meta["cfg_scale"]
    labels, null = y.chunk(2)
    assert bool((null == case.meta["num_classes"]).all())
    channels = {"cfg3": 3, "cfg4": case.meta["in_channels"]}
    return {name: official_halves(network, labels, None, s, count) for name, count in channels.items()}


@pytest.mark.golden(of=has("cfg3", "cfg4"))
@torch.no_grad()
def test_golden_guidance_of_three_channels_and_of_all(golden_case):
    x, t = golden_case.get("inputs/cfg_x"), golden_case.get("inputs/cfg_t")
    other = torch.cat([x.chunk(2)[0], noise(*x.chunk(2)[1].shape)])  # the second half is not read
    for name, denoiser in rules(golden_case).items():
        assert off(denoiser(x, t), golden_case.get(f"outputs/{name}")) < 2e-5
        assert torch.equal(denoiser(other, t), denoiser(x, t))


@pytest.mark.golden(of=lambda case: is_dit(case) and any(k.startswith("outputs/chain_") for k in case.keys))
@torch.no_grad()
def test_golden_whole_walks(golden_case):
    _, schedule = schedules(golden_case)
    x, denoisers = golden_case.get("inputs/cfg_x"), rules(golden_case)
    walks = {"ddpm": ddpm, "ddim": ddim}
    for key in sorted(k for k in golden_case.keys if k.startswith("outputs/chain_")):
        sampler, rule = key.removeprefix("outputs/chain_").split("_")
        draws = Given(golden_case.get("inputs/chain_noise"))
        assert off(walks[sampler](denoisers[rule], x, schedule, draws), golden_case.get(key)) < 2e-5, key


# Guidance, with a network of four channels and a learned variance


@torch.no_grad()
def test_what_guidance_leaves_alone():
    network, x, t = tiny(), noise(2, 4, 8, 8), torch.tensor([30, 700])
    conditional, null = network(x, t, torch.tensor([1, 4])), network(x, t)
    assert torch.equal(null, network(x, t, torch.tensor([5, 5]))) and not torch.equal(null, conditional)
    for s in (0.0, 1.0, 2.5):
        found = guided(conditional, null, s, 3)
        assert torch.equal(found[:, 3:], conditional[:, 3:])
        torch.testing.assert_close(found[:, :3], (null + s * (conditional - null))[:, :3])
    torch.testing.assert_close(guided(conditional, null, 1.0, 3), conditional)
    zero = guided(conditional, null, 0.0, 3)
    assert torch.equal(zero[:, :3], null[:, :3]) and not torch.equal(zero[:, 3:], null[:, 3:])
    three = tiny(in_channels=3, learn_sigma=False)
    pair = three(x[:, :3], t, torch.tensor([1, 4])), three(x[:, :3], t)
    assert torch.equal(guided(*pair, 2.5, 3), guided(*pair, 2.5))


def test_without_a_null_class_there_is_no_guidance():
    network = tiny(has_null_class=False)
    assert network.y_embedder.embedding_table.weight.shape == (5, 16)
    assert tiny().y_embedder.embedding_table.weight.shape == (6, 16)
    network(noise(1, 4, 8, 8), torch.tensor([3]), torch.tensor([4]))
    with pytest.raises(UserError, match="without a null class"):
        network(noise(1, 4, 8, 8), torch.tensor([3]))


# The official initialisation


@torch.no_grad()
def test_a_fresh_network_predicts_exactly_zero_and_its_blocks_are_the_identity():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(tiny().config)
    x, t, y = noise(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([2, 5])
    assert not network(x, t, y).any()
    c, tokens = network.condition(t, y), noise(2, 16, 16)
    for block in network.blocks:
        assert torch.equal(block(tokens, c), tokens) and block.attn.qkv.weight.any()
    network.final_layer.linear.weight.normal_()
    assert network(x, t, y).any()


def test_fresh_weights_are_spread_as_the_official_ones():
    """Xavier: uniform up to sqrt(6 / (fan in + fan out)); the patch convolution counts a patch as its fan in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(DiTConfig(input_size=8, hidden_size=128, depth=1, num_heads=2, num_classes=200))
    fans = {"x_embedder.proj": 16 + 128, "blocks.0.attn.qkv": 4 * 128, "blocks.0.mlp.fc1": 5 * 128}
    for name, fan in fans.items():
        layer, end = network.get_submodule(name), (6 / fan) ** 0.5
        assert 0.95 * end < float(layer.weight.detach().abs().max()) <= end and not layer.bias.any(), name
    drawn = network.t_embedder.mlp[0], network.t_embedder.mlp[2], network.y_embedder.embedding_table
    assert all(float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) for layer in drawn)


# Patches, positions, timesteps


@torch.no_grad()
def test_tokens_go_back_to_where_they_came_from():
    """Identity in front: token k holds patch k. The output lays channels last inside a patch."""
    network = DiT(DiTConfig(input_size=6, in_channels=4, hidden_size=16, depth=1, num_heads=2, learn_sigma=False))
    x = noise(2, 4, 6, 6)
    network.x_embedder.proj.weight.copy_(torch.eye(16).view(16, 4, 2, 2))
    tokens = network.x_embedder(x)  # (B, 9, channel x row x column)
    channels_last = tokens.view(2, 9, 4, 2, 2).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(network.unpatchify(channels_last), x)
    assert torch.equal(tokens[:, 5].view(2, 4, 2, 2), x[:, :, 2:4, 4:6])  # row 1, column 2


@torch.no_grad()
def test_rows_and_columns_are_told_apart():
    table = position_table(8, 3).view(3, 3, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[:, 0, :4], table[:, 1, :4])
    network, x, t = tiny(), noise(1, 4, 8, 8), torch.tensor([10])
    assert off(network(x.transpose(2, 3), t).transpose(2, 3), network(x, t)) > 0.01


def test_equal_timesteps_are_embedded_once():
    network, seen = tiny(), []
    network.t_embedder.mlp.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    timesteps = torch.tensor([500.25, 3, 500.25, 500, 3])
    with torch.no_grad():
        found = network.t_embedder(timesteps)
        alone = torch.cat([network.t_embedder(t[None]) for t in timesteps])
    assert seen == [3, 1, 1, 1, 1, 1] and off(found, alone) < 1e-6


def test_waves_of_a_timestep():
    """Slowest wave: 10000^(-127 / 128) officially, 1 / 10000 in diffusers."""
    t = torch.tensor([0.0, 1000.0])
    for kind, slowest in (("official", 10000 ** (-127 / 128)), ("diffusers", 1e-4)):
        found = sinusoid(t, kind)
        assert torch.equal(found[0], torch.cat([torch.ones(128), torch.zeros(128)]))
        expected = torch.tensor([1000 * slowest]).double()
        torch.testing.assert_close(found[1, [127, 255]].double(), torch.cat([expected.cos(), expected.sin()]))


# What reads the output of a block


@torch.no_grad()
def test_modulation_after_a_block_is_its_readers():
    network, x, t, y = tiny(), noise(2, 4, 8, 8), torch.tensor([5, 800]), torch.tensor([0, 3])
    c = network.condition(t, y)
    for i in range(3):
        reader = network.blocks[i + 1].attn if i < 2 else network.final_layer.linear
        seen = {}
        handles = [
            network.blocks[i].register_forward_hook(lambda _m, _i, out, seen=seen: seen.update(h=out)),
            reader.register_forward_pre_hook(lambda _m, args, seen=seen: seen.update(read=args[0])),
        ]
        network(x, t, y)
        for handle in handles:
            handle.remove()
        shift, scale = network.modulation_after(i, c)
        h = torch.nn.functional.layer_norm(seen["h"], (16,), eps=1e-6)
        torch.testing.assert_close(h * (1 + scale[:, None]) + shift[:, None], seen["read"])


# Sizes

SIZES = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}


def on_paper(size, patch_size, input_size=32):
    hidden_size, depth, num_heads = SIZES[size]
    fields = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
    with torch.device("meta"):
        return DiT(DiTConfig(input_size=input_size, patch_size=patch_size, **fields))


@pytest.mark.parametrize(
    ("size", "patch", "parameters", "billions"),
    [
        ("XL", 2, 675_129_632, 118.621),
        ("XL", 8, 675_683_072, 7.392),
        ("L", 4, 458_053_760, 19.696),
        ("B", 2, 130_512_416, 23.005),
        ("B", 4, 130_475_648, 5.565),
        ("S", 2, 32_963_360, 6.056),
        ("S", 8, 33_148_160, 0.358),
    ],
)
def test_parameters_and_multiply_adds_of_the_published_sizes(size, patch, parameters, billions):
    network = on_paper(size, patch)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == 12 + 10 * SIZES[size][1]
    run = counting.on_meta(network, torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.int64))
    assert counting.multiply_adds(run) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_512_pixels():
    network = on_paper("XL", 2, 64)
    assert sum(p.numel() for p in network.parameters()) == 676_014_368 and len(network.state_dict()) == 292
    run = counting.on_meta(network, torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64))
    assert counting.multiply_adds(run) / 1e9 == pytest.approx(524.538, abs=6e-4)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"input_size": 33}, "input_size 33 is not divisible by patch_size 2"),
        ({"num_heads": 7}, "hidden_size 1152 is not divisible by num_heads 7"),
        ({"hidden_size": 18, "num_heads": 2}, "hidden_size 18 is not divisible by 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, told):
    with pytest.raises(ValidationError, match=told):
        DiTConfig(**wrong)
