"""A frozen DiT read for features: pytest tests/frozen/test_dit.py"""

import pytest
import torch
import torch.nn.functional as F
from golden_dit import dit_of, is_dit, noise, tiny
from walks import off

from diffrep import _torchvision_compat
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.base import FrozenModule
from diffrep.frozen.dit import DiTTeacher, as_read, load_vae, massive_channels
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.models.dit_files import to_diffusers
from diffrep.models.weights import read_weights, write_weights
from diffrep.randomness import Rows, stream


def images(count=3, size=8, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pixel_teacher(**changes):
    return DiTTeacher(tiny(in_channels=3, **changes), "tiny")


def in_block(network, x, t, y, name):
    """What the module ``name`` returned in a whole pass."""
    seen = []
    handle = network.get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        network(x, t, y)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def vae():
    """Eight-pixel images and 4x4 latents of four channels."""
    _torchvision_compat.install()
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks)
    return FrozenModule(made, "tiny vae", "MIT")


@pytest.fixture
def latent_teacher(vae):
    return DiTTeacher(tiny(input_size=4), "latent", vae)


# What is read


@pytest.mark.golden(of=lambda case: is_dit(case) and case.meta["in_channels"] == 3)
def test_golden_blocks_come_as_maps(golden_case):
    """The file's inputs belong to no range; as images they are what the door makes these inputs of."""
    network, side = dit_of(golden_case), golden_case.meta["input_size"] // golden_case.meta["patch_size"]
    x, t, y = (golden_case.get(f"inputs/{k}") for k in "xty")
    found = DiTTeacher(network, "golden").features((x + 1) / 2, t, ["blocks.0@raw"], labels=y)["blocks.0@raw"]
    expected = golden_case.get("outputs/block0")
    assert found.shape == (len(x), golden_case.meta["hidden_size"], side, side)
    assert off(found.flatten(2).transpose(1, 2), expected) < 2e-5


def test_every_tap_is_listed_as_it_is_read():
    teacher, t = pixel_teacher(), torch.tensor([0, 500, 999])
    listed = teacher.taps()
    names = [tap.name for tap in listed]
    assert {f"blocks.{i}{kind}" for i in range(3) for kind in ("", "@raw")} <= set(names)
    assert {"x_embedder", "blocks.1.attn.qkv", "t_embedder", "y_embedder", "final_layer"} <= set(names)
    assert names.index("blocks.0") < names.index("blocks.1.norm1") < names.index("blocks.1@raw")
    found = teacher.features(images(), t, names)
    for tap in listed:
        assert found[tap.name].shape == (3, *tap.shape), tap.name
        assert found[tap.name].dtype == torch.float32 and tap.stride == (2 if len(tap.shape) == 3 else None)
    assert not any(name.startswith("t_embedder.") for name in names)  # not one row per image


def test_a_raw_block_is_the_modules_own_output_as_a_map():
    teacher, t, y = pixel_teacher(), torch.tensor([3, 3, 800]), torch.tensor([0, 4, 5])
    x = images() * 2 - 1
    for name in ("blocks.1", "x_embedder", "blocks.2.attn", "final_layer"):
        shown = f"{name}@raw" if name == "blocks.1" else name
        found = teacher.features(images(), t, [shown], labels=y)[shown]
        tokens = in_block(teacher.module, x, t, y, name)  # row by row
        assert torch.equal(found[:, :, 2, 1], tokens[:, 2 * 4 + 1])
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens)
    condition = teacher.features(images(), t, ["y_embedder"], labels=y)["y_embedder"]
    assert torch.equal(condition, teacher.module.y_embedder(y))


def test_a_block_is_what_the_next_layer_reads():
    teacher, t = pixel_teacher(), torch.tensor([3, 3, 800])
    x, null = images() * 2 - 1, torch.full((3,), 5)
    for i, reader in ((0, "blocks.1.attn"), (1, "blocks.2.attn"), (2, "final_layer.linear")):
        seen = []
        handle = teacher.module.get_submodule(reader).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            teacher.module(x, t, null)
        handle.remove()
        name = f"blocks.{i}"
        found = teacher.features(images(), t, [name])[name]
        assert teacher.massive[name] == []
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1@raw", "blocks.2", "x_embedder", "blocks.0.mlp.fc1"])
def test_nothing_behind_a_tap_is_touched(name):
    """But the reader's modulation, which a block is shown with."""
    clean, poisoned = pixel_teacher(), pixel_teacher()
    later = {"blocks.1": 2, "blocks.1@raw": 2, "blocks.2": 3, "x_embedder": 0, "blocks.0.mlp.fc1": 1}[name]
    kept = {"blocks.1": "blocks.2.adaLN", "blocks.2": "final_layer.adaLN"}.get(name, "none")
    behind = (*(f"blocks.{i}" for i in range(later, 3)), "final_layer")
    with torch.no_grad():
        for parameter, value in poisoned.module.named_parameters():
            if parameter.startswith(behind) and not parameter.startswith(kept):
                value.fill_(float("nan"))
    found = [teacher.features(images(), 40, [name])[name] for teacher in (clean, poisoned)]
    assert torch.equal(*found) and torch.isfinite(found[1]).all()
    assert torch.isnan(poisoned.predict(images() * 2 - 1, torch.full((3,), 40))).all()


def test_images_and_labels_go_in_as_they_should():
    teacher, t = pixel_teacher(), torch.tensor([0, 10, 999])
    null, class_five = (teacher.features(images(), t, ["blocks.2"], labels=y) for y in (None, torch.full((3,), 5)))
    assert torch.equal(null["blocks.2"], class_five["blocks.2"])
    other = teacher.features(images(), t, ["blocks.2"], labels=torch.tensor([1, 1, 1]))["blocks.2"]
    assert not torch.equal(other, null["blocks.2"])
    noisy = teacher.features(images(), t, ["blocks.0@raw"], noise="forward", rng=Rows(stream(0, "x"), 3))
    drawn = Rows(stream(0, "x"), 3).normal(3, 8, 8)
    x = NoiseSchedule.named("linear").noised(images() * 2 - 1, drawn, t)
    expected = in_block(teacher.module, x, t, torch.full((3,), 5), "blocks.0")
    torch.testing.assert_close(noisy["blocks.0@raw"].flatten(2).transpose(1, 2), expected)
    with pytest.raises(UserError, match=r"class 6 is outside 0..4 of tiny, null class 5"):
        teacher.features(images(), t, ["blocks.2"], labels=torch.tensor([0, 6, 0]))
    with pytest.raises(UserError, match="tiny reads 8-pixel images, not 4x4"):
        teacher.features(images(size=4), t, ["blocks.2"])
    with pytest.raises(UserError, match=r"tap 'blocks.3' does not exist"):
        teacher.features(images(), t, ["blocks.3"])


def test_without_a_null_class_labels_are_needed():
    teacher = pixel_teacher(has_null_class=False)
    assert teacher.taps() and teacher.multiply_adds() > 0
    with pytest.raises(UserError, match="without a null class"):
        teacher.features(images(), 0, ["blocks.0"])
    assert teacher.features(images(), 0, ["blocks.0"], labels=torch.tensor([0, 1, 4]))["blocks.0"].isfinite().all()


# Massive channels


def mean_cosine(feature):
    """Between different patches of one image, over all pairs and images."""
    patches = F.normalize(feature.flatten(2), dim=1)  # (B, C, N)
    cosine = patches.transpose(1, 2) @ patches
    count = cosine.shape[1]
    return float((cosine.sum((1, 2)) - count).mean() / (count * (count - 1)))


def with_outlier(network, index, channel, size):
    """Block ``index`` adds ``size`` to one channel of every patch, through its gate; no other channel notices."""
    block, width = network.blocks[index], network.config.hidden_size
    with torch.no_grad():
        block.mlp.fc2.bias[channel] += size
        gate = block.adaLN_modulation[1]
        gate.weight[5 * width + channel], gate.bias[5 * width + channel] = 0, 1
    return network


@pytest.mark.parametrize("size", [300.0, -3e4])
def test_an_outlier_channel_changes_no_other(size):
    sizes = {"in_channels": 3, "hidden_size": 256, "num_heads": 4, "std": 0.05, "input_size": 16}
    plain = DiTTeacher(with_outlier(tiny(**sizes), 1, 77, 0.0), "plain")
    hit = DiTTeacher(with_outlier(tiny(**sizes), 1, 77, size), "hit")
    taps, given = ["blocks.1", "blocks.1@raw"], (images(4, 16), 300)
    expected, found = (teacher.features(*given, taps) for teacher in (plain, hit))
    assert (plain.massive, hit.massive) == ({"blocks.1": []}, {"blocks.1": [77]})
    without = mean_cosine(expected["blocks.1"])
    assert mean_cosine(found["blocks.1@raw"]) > 0.99 and without < 0.9
    assert abs(mean_cosine(found["blocks.1"]) - without) <= 0.01
    assert not found["blocks.1"][:, 77].any()
    others = [k for k in range(256) if k != 77]
    assert off(found["blocks.1"][:, others], expected["blocks.1"][:, others]) < 0.1
    # Dropped after the norm, as DiTF writes it, the channel would still have taken all contrast.
    teacher, t = hit.module, torch.full((4,), 300)
    late = as_read(
        found["blocks.1@raw"].flatten(2).transpose(1, 2), *teacher.modulation_after(1, teacher.condition(t)), []
    )
    assert mean_cosine(late[..., others].transpose(1, 2)) > without + 0.03


def test_massive_channels_are_the_networks_own():
    network = with_outlier(tiny(in_channels=3, hidden_size=64, std=0.1), 0, 9, 1e4)
    first, second = DiTTeacher(network, "a"), DiTTeacher(network, "b")
    alone = torch.cat([first.features(images()[k : k + 1], 5, ["blocks.0"])["blocks.0"] for k in range(3)])
    second.features(images(seed=8) * 0, 900, ["blocks.2", "blocks.0"])
    assert first.massive["blocks.0"] == second.massive["blocks.0"] == [9]
    torch.testing.assert_close(second.features(images(), 5, ["blocks.0"])["blocks.0"], alone)
    seen = []
    network.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    first.features(images(), 5, ["blocks.0"])
    assert seen == [3]  # found once


def test_the_rule_takes_four_channels_above_twenty_times_the_median():
    size = torch.ones(64)
    assert massive_channels(size) == []
    size[[5, 60]] = torch.tensor([20.0, 20.1])
    assert massive_channels(size) == [60]
    size[[1, 2, 3, 4, 5]] = torch.tensor([21.0, 99.0, 22.0, 23.0, 24.0])
    assert massive_channels(size) == [2, 3, 4, 5]
    assert massive_channels(torch.tensor([1.0, 1.0, 50.0])) == [2]


def test_a_feature_by_hand():
    """Four channels, the last massive: mean 2 and variance 2/3 of (1, 2, 3)."""
    tokens, ones = torch.tensor([[[1.0, 2.0, 3.0, 1000.0]]]), torch.ones(1, 4)
    found = as_read(tokens, ones * 10, ones, [3])
    end = 2 * 1.5**0.5
    torch.testing.assert_close(found, torch.tensor([[[10 - end, 10, 10 + end, 0]]]), rtol=1e-5, atol=1e-5)


# Behind a VAE


def test_images_become_the_mode_of_their_latents(latent_teacher, vae):
    given = images()
    with torch.no_grad():
        moments = vae.module.quant_conv(vae.module.encoder(given * 2 - 1))
        found = latent_teacher.normalise(given)
    torch.testing.assert_close(found, moments[:, :4] * 0.18215)  # the rest is the variance
    assert (latent_teacher.latent_size, latent_teacher.image_size) == (4, 8)
    raw = latent_teacher.features(given, 7, ["blocks.1@raw"])["blocks.1@raw"]
    expected = in_block(latent_teacher.module, found, torch.full((3,), 7), None, "blocks.1")
    torch.testing.assert_close(raw.flatten(2).transpose(1, 2), expected)
    with pytest.raises(UserError, match="latent reads 8-pixel images, not 4x4"):
        latent_teacher.normalise(images(size=4))


def test_latents_need_a_vae_that_makes_them(vae):
    teacher = DiTTeacher(tiny(input_size=4), "mine.pt")
    assert teacher.taps() and teacher.predict(noise(1, 4, 4, 4), torch.tensor([1])).shape == (1, 8, 4, 4)
    for size in (4, 8):
        with pytest.raises(UserError, match=r"mine.pt reads latents: name its VAE, mine.pt\?vae="):
            teacher.features(images(size=size), 0, ["blocks.0"])
    with pytest.raises(UserError, match="tiny vae makes latents of 4 channels, and three reads 3"):
        DiTTeacher(tiny(in_channels=3), "three", vae)


def test_taps_and_costs_are_known_without_running_the_vae(latent_teacher, vae, monkeypatch):
    bare = DiTTeacher(tiny(input_size=4), "bare")
    monkeypatch.setattr(vae.module, "encode", None)
    strides = {tap.name: tap.stride for tap in latent_teacher.taps()}
    assert strides["blocks.0"] == 4 and strides["x_embedder.proj"] == 4 and strides["t_embedder"] is None
    encoder = latent_teacher.encoder_multiply_adds  # from an image to a tap the VAE comes first
    assert latent_teacher.multiply_adds() == bare.multiply_adds()
    for tap in ("blocks.1", "blocks.1@raw", "x_embedder"):
        assert latent_teacher.multiply_adds(tap) == bare.multiply_adds(tap) + encoder
    # Linear and convolution, by hand: 9 cells of a kernel, 3 -> 8 at 8x8 pixels is the first layer alone.
    assert latent_teacher.encoder_multiply_adds > 64 * 9 * 3 * 8 and bare.encoder_multiply_adds == 0
    assert latent_teacher.peak_bytes(["blocks.1"]) > bare.peak_bytes(["blocks.1"]) > 0


def test_the_hash_is_of_both_networks(vae):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = FrozenModule(type(vae.module)(**dict(vae.module.config)), "other")
    makes = [DiTTeacher(tiny(input_size=4), "n", v) for v in (None, vae, vae, other)]
    makes.append(DiTTeacher(tiny(input_size=4, seed=1), "n", vae))
    bare, one, again, another, changed = (teacher.sha256 for teacher in makes)
    assert one == again and len({bare, one, another, changed}) == 4
    assert bare == FrozenModule(tiny(input_size=4), "n").sha256


# What a pass costs, and how it is run


def test_half_of_the_blocks_is_half_of_the_cost_in_the_released_size():
    from diffrep.models.dit import DiT, DiTConfig

    with torch.device("meta"):
        teacher = DiTTeacher(DiT(DiTConfig()), "XL/2")
    assert teacher.num_parameters == 675_129_632
    full, middle = teacher.multiply_adds(), teacher.multiply_adds("blocks.13@raw")
    assert full / 1e9 == pytest.approx(118.621, abs=6e-4) and middle / full == pytest.approx(0.5, abs=1e-3)
    assert teacher.multiply_adds("blocks.13") - middle == 2 * 1152 * 1152  # the reader's shift and scale


def test_a_batch_that_is_split_gives_the_same(latent_teacher):
    taps = ["blocks.0", "blocks.2@raw", "x_embedder"]
    expected = latent_teacher.features(images(5), 100, taps)
    latent_teacher.passes = PassConfig(memory_mb=1)
    assert latent_teacher.split_size(taps, 10**6) < 10**6
    latent_teacher._peaks.clear()
    latent_teacher.peak_bytes = lambda taps: 400_000  # two at once
    seen = []
    latent_teacher.module.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    found = latent_teacher.features(images(5), 100, taps)
    assert seen == [2, 2, 1]
    for name in taps:
        assert off(found[name], expected[name]) < 1e-5


def test_the_vae_is_shown_few_images_at_once_where_memory_is_short(latent_teacher, vae):
    expected = latent_teacher.normalise(images(5))
    latent_teacher.passes = PassConfig(memory_mb=1)
    latent_teacher.encoder.peak_bytes = 400_000
    seen = []
    handle = vae.module.encoder.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    torch.testing.assert_close(latent_teacher.normalise(images(5)), expected)
    handle.remove()
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("tap", ["blocks.0", "blocks.2", "blocks.1@raw"])
def test_what_nobody_reads_can_be_let_go(tap):
    teacher, whole = pixel_teacher(), pixel_teacher()
    expected, size = whole.features(images(), 9, [tap])[tap], teacher.num_parameters
    teacher.keep_only([tap])
    assert torch.equal(teacher.features(images(), 9, [tap])[tap], expected)
    assert teacher.num_parameters < size and teacher.sha256 == whole.sha256 and teacher.kept == (tap,)


def test_in_half_precision_it_is_nearly_the_same():
    teacher = pixel_teacher(std=0.1)
    full = teacher.features(images(), 9, ["blocks.2"])["blocks.2"]
    teacher.run_as(PassConfig(precision="bf16"))
    half = teacher.features(images(), 9, ["blocks.2"])["blocks.2"]
    assert half.dtype == torch.float32 and not torch.equal(half, full) and off(half, full) < 0.2


# From files


def saved(folder, network, vae=None):
    """A folder as a ``DiTPipeline`` is saved."""
    _torchvision_compat.install()
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config, weights = to_diffusers(network.config, network.state_dict())
    transformer = DiTTransformer2DModel(**config)
    transformer.load_state_dict(weights)
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(num_train_timesteps=500).save_pretrained(folder / "scheduler")
    if vae is not None:
        vae.module.save_pretrained(folder / "vae")
    return folder


def same_as(teacher, network):
    x, t = noise(2, 4, 4, 4), torch.tensor([3, 400])
    return torch.equal(teacher.predict(x, t, torch.tensor([0, 5])), network(x, t, torch.tensor([0, 5])))


@torch.no_grad()
def test_a_folder_of_diffusers_is_read_with_its_vae(tmp_path, vae):
    network = tiny(input_size=4)
    teacher = load_teacher(str(saved(tmp_path / "dit", network, vae)))
    assert isinstance(teacher, DiTTeacher) and same_as(teacher, network)
    assert teacher.num_train_timesteps == 500 and teacher.image_size == 8
    assert teacher.sha256 == DiTTeacher(network, "same", vae).sha256
    trained_there = load_teacher(f"{tmp_path / 'dit'}?sinusoid=diffusers")
    assert not same_as(trained_there, network)
    alone = load_teacher(str(saved(tmp_path / "bare", network)))
    assert alone.vae is None and alone.image_size == 4
    weights = next((tmp_path / "bare/transformer").glob("*.safetensors"))
    state = dict(read_weights(weights))
    del state["proj_out_2.bias"]
    write_weights(weights, state)
    with pytest.raises(UserError, match=r"bare/transformer lacks proj_out_2.bias"):
        load_teacher(str(tmp_path / "bare"))


@torch.no_grad()
def test_an_official_file_is_read_and_its_average_taken(tmp_path, vae):
    network = tiny(input_size=4)
    write_weights(tmp_path / "mine.safetensors", network.state_dict())
    torch.save({"model": tiny(input_size=4, seed=1).state_dict(), "ema": network.state_dict()}, tmp_path / "0400000.pt")
    vae.module.save_pretrained(tmp_path / "vae")
    for name in ("mine.safetensors", "0400000.pt"):
        teacher = load_teacher(f"{tmp_path / name}?num_heads=2&vae={tmp_path / 'vae'}")
        assert same_as(teacher, network) and teacher.name == name and teacher.image_size == 8
    with pytest.raises(UserError, match="has width 16, and heads cannot be seen in a file: say num_heads"):
        load_teacher(str(tmp_path / "mine.safetensors"))
    with pytest.raises(UserError, match="takes no option 'prompt'"):
        load_teacher(f"{tmp_path / 'mine.safetensors'}?prompt=a dog")


def test_a_vae_is_a_folder_of_one(tmp_path, vae):
    vae.module.save_pretrained(tmp_path / "alone")
    assert load_vae(str(tmp_path / "alone")).sha256 == vae.sha256
    saved(tmp_path / "dit", tiny(input_size=4), vae)
    assert load_vae(str(tmp_path / "dit")).sha256 == vae.sha256
    with pytest.raises(UserError, match="holds a DiTTransformer2DModel; valid: AutoencoderKL"):
        load_vae(str(tmp_path / "dit/transformer"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; a VAE is a diffusers folder or a Hub id"):
        load_vae(str(tmp_path / "file"))


def test_the_embedders_can_be_read_and_nothing_else_is_kept(latent_teacher):
    expected = latent_teacher.features(images(2), 5, ["t_embedder"])["t_embedder"]
    latent_teacher.keep_only(["t_embedder"])
    assert torch.equal(latent_teacher.features(images(2), 5, ["t_embedder"])["t_embedder"], expected)
    assert not any(name.startswith("blocks.") for name, _ in latent_teacher.module.named_parameters())
