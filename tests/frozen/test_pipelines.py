"""Whole diffusers pipelines as generators, tiny and with random weights: pytest tests/frozen/test_pipelines.py"""

import json
import shutil
import string

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffrep import _torchvision_compat, api
from diffrep.errors import UserError
from diffrep.files import ROOT_VARIABLE
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig
from diffrep.frozen.pipelines import LatentGenerator, TextGenerator, load_generator
from diffrep.launch.jobs import ShardJob
from diffrep.randomness import stream

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ["a cat", "a dog"]


def walk(steps="3", **options):
    return SamplingConfig(num_sampling_steps=steps, **options)


def autoencoder(diffusers):
    """Eight-pixel images and 4x4 latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks)


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    """A DiT of two blocks, three classes and learned variance, as diffusers saves it."""
    _torchvision_compat.install()
    import diffusers

    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformer = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=3, **sizes)
        vae = autoencoder(diffusers)
    first, *others = (block.norm1.emb for block in transformer.transformer_blocks)
    for other in others:  # official weights have one embedder, of which diffusers keeps a copy in each block
        other.load_state_dict(first.state_dict())
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(dit_folder):
    return load_generator(str(dit_folder))


@pytest.fixture
def copied(dit_folder, tmp_path):
    """The DiT's folder, to be changed."""
    shutil.copytree(dit_folder, tmp_path / "dit")
    return tmp_path / "dit"


# DiT


def test_a_dit_folder_is_a_latent_generator(dit):
    assert isinstance(dit, LatentGenerator) and (dit.num_classes, dit.noise_shape) == (3, (4, 4, 4))
    images = dit.sample(torch.tensor([0, 1, 2]), [4, 5, 6], walk())
    assert images.shape == (3, 3, 8, 8) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert float((images[0] - images[1]).abs().max()) > 0.01


def test_the_null_class_is_the_one_after_the_last(dit):
    x, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    assert torch.equal(dit.network.predict(x, t), dit.network.module(x, t, class_labels=torch.tensor([3])))
    assert not torch.equal(dit.network.predict(x, t), dit.network.predict(x, t, torch.tensor([2])))


def test_three_of_four_channels_are_guided_and_no_variance(dit):
    """uncond + s (cond - uncond) on the first three; the fourth and the variance are the conditional ones."""
    x, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([700, 700])
    labels, scales = torch.tensor([0, 2]), torch.tensor([2.0, 4.0])
    with torch.no_grad():
        found = dit._guided(labels, walk(guidance_scale=2.0, guided_channels=3), scales)(x, t)
    cond, null = dit.network.predict(x, t, labels), dit.network.predict(x, t)
    s = scales.view(-1, 1, 1, 1)
    torch.testing.assert_close(found[:, :3], (null + s * (cond - null))[:, :3])
    assert torch.equal(found[:, 3:], cond[:, 3:]) and found.shape == (2, 8, 4, 4)
    assert float((found[:, :3] - cond[:, :3]).abs().max()) > 0.01


@pytest.fixture
def calls(dit):
    """The labels of every call of the DiT."""
    seen = []
    hook = dit.network.module.register_forward_pre_hook(
        lambda _, args, keywords: seen.append(keywords["class_labels"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_scale_one_is_no_guidance_and_asks_for_no_unconditional_half(dit, calls, sampler):
    labels, seeds = torch.tensor([1, 2]), [4, 5]
    plain = dit.sample(labels, seeds, walk(sampler=sampler))
    assert torch.equal(dit.sample(labels, seeds, walk(sampler=sampler, guidance_scale=1.0, guided_channels=3)), plain)
    assert calls == [[1, 2]] * 6
    guided = dit.sample(labels, seeds, walk(sampler=sampler, guidance_scale=4.0, guided_channels=3))
    assert calls[6:] == [[1, 2], [3, 3]] * 3 and not torch.equal(guided, plain)
    interval = walk(sampler=sampler, guidance_scale=4.0, guidance_interval=(200.0, 300.0))  # sigma ends at 157
    assert torch.equal(dit.sample(labels, seeds, interval), plain)
    assert dit.calls(interval) == dit.calls(walk(sampler=sampler)) == (3, 0)
    assert dit.calls(walk(guidance_scale=4.0)) == (3, 3)


def test_the_decoder_is_the_vae_at_its_own_scale(dit):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2)) * 0.2
    with torch.no_grad():
        pixels = dit.vae.module.decode(latents / 0.18215).sample
        found = dit.decode(latents)
    torch.testing.assert_close(found, ((pixels + 1) / 2).clamp(0, 1))


def test_cost_counts_the_walk_and_the_decoder(dit):
    each, decoder = dit.network.multiply_adds(), dit.decoder_multiply_adds()
    assert each > 0 and decoder > 0
    assert dit.multiply_adds(walk("5")) == 5 * each + decoder
    assert dit.multiply_adds(walk("5", guidance_scale=2.0)) == 10 * each + decoder


def test_the_hash_is_of_both_networks(copied, dit):
    assert load_generator(str(copied)).sha256 == dit.sha256
    for part in ("vae", "transformer"):
        weights = load_file(copied / part / WEIGHTS)
        name = sorted(weights)[0]
        save_file(weights | {name: weights[name] + 1}, copied / part / WEIGHTS)
        assert load_generator(str(copied)).sha256 != dit.sha256
        save_file(weights, copied / part / WEIGHTS)


def test_a_set_of_a_dit_below_the_data_folder_is_made_again(dit_folder, tmp_path, monkeypatch):
    """Shipped recipes name weights by a path below $DIFFREP_DATA."""
    shutil.copytree(dit_folder, tmp_path / "root/weights/dit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "root"))
    sampling = {"fidelity": "low", "num_sampling_steps": "4"}
    found = api.synthesize("weights/dit", {"images": 3, "block_size": 2, "sampling": sampling}, "set")
    assert found["counts"] == {"0": 1, "1": 1, "2": 1} and found["network_calls"] == 4 * 8
    assert api.regenerate("set", "again")["equal"]
    job = ShardJob("weights/dit", "{}", 0, "set").anywhere()  # what a worker in another folder is told
    assert job.generator == str(tmp_path / "root/weights/dit")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "transformer" / WEIGHTS).write_bytes(b"\x08" + bytes(20)), "is corrupt or truncated"),
        (lambda d: shutil.rmtree(d / "vae"), "draws latents: name its VAE, dit?vae=FOLDER"),
        (lambda d: (d / "transformer/config.json").write_text("{"), "is not readable JSON"),
        (lambda d: (d / "scheduler/scheduler_config.json").write_text("{"), "is not readable JSON"),
        (lambda d: (d / "transformer/config.json").unlink(), "is no diffusers folder"),
        (lambda d: (d / "model_index.json").write_text("{"), "model_index.json is not readable JSON"),
        (lambda d: (d / "model_index.json").write_text("{}"), "model_index.json names no pipeline"),
    ],
)
def test_a_corrupt_folder_is_named_in_one_line(copied, damage, told):
    damage(copied)
    with pytest.raises(UserError) as refused:
        load_generator(str(copied))
    assert told in str(refused.value) and "dit" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_lack_a_tensor_are_refused(copied, part):
    weights = load_file(copied / part / WEIGHTS)
    weights.pop(name := sorted(weights)[-1])
    save_file(weights, copied / part / WEIGHTS)
    with pytest.raises(UserError, match=name):
        load_generator(str(copied))


def test_a_prompt_is_for_pipelines_that_read_one(dit_folder, pipeline):
    for folder in (dit_folder, pipeline()):
        with pytest.raises(UserError, match="is no text-to-image pipeline: it reads no prompt"):
            load_generator(str(folder), PROMPTS)
    assert type(load_generator(str(pipeline()))) is DiffusionGenerator


# Text to image


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A text-to-image pipeline that knows the letters a to z."""
    _torchvision_compat.install()
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    import diffusers

    folder = tmp_path_factory.mktemp("pipelines") / "text"
    tokens = [
        *string.ascii_lowercase,
        *(f"{c}</w>" for c in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=16
    )
    ids = {"vocab_size": len(tokens), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(max_position_embeddings=16, **ids, **sizes))
        unet = diffusers.UNet2DConditionModel(
            sample_size=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
            attention_head_dim=2, mid_block_type="UNetMidBlock2DCrossAttn", **blocks,
        )  # fmt: skip
        vae = autoencoder(diffusers)
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear", steps_offset=1)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    made = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    made.save_pretrained(folder)
    # As published pipelines are saved. The checker's own files are not here: it must not be asked for.
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def text(text_folder):
    return load_generator(str(text_folder), PROMPTS)


def test_a_prompt_per_class_is_drawn(text):
    assert isinstance(text, TextGenerator) and text.num_classes == 2 and text.labels_seen == {}
    images = text.sample(torch.tensor([0, 1]), [7, 7], walk(guidance_scale=3.0))
    assert images.shape == (2, 3, 8, 8) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert not torch.equal(images[0], images[1])  # one noise, two prompts


def test_an_image_is_of_its_seed_and_not_of_its_batch_or_of_the_sampler_before(text):
    together = text.sample(torch.tensor([0, 1]), [7, 8], walk(sampler="ddpm"))
    text.sample(torch.tensor([0]), [7], walk("2", sampler="heun"))
    for k in (0, 1):
        alone = text.sample(torch.tensor([k]), [7 + k], walk(sampler="ddpm"))
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-4)


def test_the_walk_is_the_pipelines_own_and_does_not_clip_latents(text, text_folder):
    import diffusers

    made = diffusers.StableDiffusionPipeline.from_pretrained(text_folder, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config, clip_sample=False)

    rngs = [stream(seed, f"noise of {text.sha256}") for seed in (1, 2)]
    expected = made(PROMPTS, num_inference_steps=4, guidance_scale=3.0, generator=rngs, output_type="pt").images
    found = text.sample(torch.tensor([0, 1]), [1, 2], walk("4", sampler="ddim", guidance_scale=3.0))
    torch.testing.assert_close(found, expected)


def test_its_calls_are_counted_as_they_happen(text):
    seen = []
    hook = text.pipeline.unet.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    for sampling in (walk("4", sampler=s, guidance_scale=g) for s in ("ddim", "heun", "unipc") for g in (1.0, 2.0)):
        seen.clear()
        text.sample(torch.tensor([1]), [1], sampling)
        assert sum(seen) == sum(text.calls(sampling)), sampling
    hook.remove()
    one, two, five = (text.multiply_adds(walk(steps)) for steps in ("1", "2", "5"))
    assert five - one == 4 * (two - one) > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"guided_channels": 3}, "guided_channels: .* guides in its own way"),
        ({"guidance_interval": (0.1, 1.0)}, "guidance_interval: .* guides in its own way"),
        ({"guidance_scale": (1.0, 3.0)}, "takes one scale for all images of a call, not a range"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5: .* guides above 1 only; 1 is off"),
        ({"steps": "ddim5"}, "'ddim5': sampler ddim takes one number of steps"),
        ({"steps": "1001"}, "'1001': the noise schedule has 1000 timesteps"),
    ],
)
def test_what_its_own_walk_cannot_do_is_refused(text, options, told):
    with pytest.raises(UserError, match=told):
        text.check(torch.tensor([0]), walk(**options))


def test_a_text_pipeline_needs_prompts_and_draws_their_classes(text, text_folder):
    with pytest.raises(UserError, match=r"is a StableDiffusionPipeline: give prompt .* and class_names"):
        load_generator(str(text_folder))
    with pytest.raises(UserError, match=r"class 2 is outside 0..1, the classes with a prompt"):
        text.sample(torch.tensor([2]), [0], walk())
    with pytest.raises(UserError, match="draws classes only, and cannot be steered"):
        text.sample(torch.tensor([0]), [0], walk(), judge=lambda images, labels: labels)


def test_a_scheduler_without_betas_is_refused(text_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "text")
    index = json.loads((tmp_path / "text/model_index.json").read_text())
    kind = "FlowMatchEulerDiscreteScheduler"
    (tmp_path / "text/model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    (tmp_path / "text/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=f"its {kind} is no noise schedule of betas"):
        load_generator(str(tmp_path / "text"), PROMPTS)


def test_a_set_of_prompts_is_made_again(text_folder, tmp_path):
    asked = {"images": 4, "prompt": "a {}", "class_names": ["cat", "dog"], "block_size": 2, "shard_size": 2}
    sampling = {"num_sampling_steps": "3", "guidance_scale": 2.0}
    found = api.synthesize(str(text_folder), asked | {"sampling": sampling}, tmp_path / "set")
    assert found["counts"] == {"0": 2, "1": 2} and found["labels_behind"] == {}
    assert json.loads((tmp_path / "set/manifest.json").read_text())["classes"] == ["cat", "dog"]
    assert api.regenerate(tmp_path / "set", tmp_path / "again")["equal"]
