"""Text-to-image U-Nets as teachers, tiny and with random weights: pytest tests/frozen/test_text_unet.py"""

import json
import shutil
import string
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep import _torchvision_compat
from diffrep.errors import UserError
from diffrep.frozen.files import opened
from diffrep.frozen.passes import PassConfig
from diffrep.frozen.references import SourceOptions
from diffrep.frozen.teachers import load_teacher
from diffrep.frozen.text_unet import TextUNetTeacher, load_folder, prompt_embedding
from diffrep.randomness import Rows, stream

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_text_unet(place, prompt=""):
    return load_folder(opened(place), SourceOptions(prompt=prompt))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen-pixel images, 8x8 latents, two levels, a prompt of the letters a to z; as diffusers saves a pipeline."""
    _torchvision_compat.install()
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    import diffusers

    place = tmp_path_factory.mktemp("text") / "stable"
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    tokens = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=tokens, merges=[], model_max_length=16)
    ids = {"vocab_size": len(tokens), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(max_position_embeddings=16, **ids, **sizes))
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **vae_blocks)
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear", beta_start=0.00085)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    made = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    made.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def library(folder):
    """The same files as diffusers itself loads them."""
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def teacher(folder):
    return load_text_unet(str(folder))


@pytest.fixture
def copied(folder, tmp_path):
    """The folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "stable")


def images(count=2, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def refused(place, **options):
    with pytest.raises(UserError) as caught:
        load_text_unet(str(place), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The same as diffusers computes


def latents_of(library, given):
    with torch.no_grad():
        return library.vae.encode(given * 2 - 1).latent_dist.mode() * library.vae.config.scaling_factor


def told(library, prompt):
    with torch.no_grad():
        return library.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]


@pytest.mark.parametrize("prompt", ["", "a dog"])
def test_features_are_those_of_the_library_on_latents_and_prompt(folder, library, prompt):
    teacher, steps, whole = load_text_unet(str(folder), prompt), torch.tensor([3, 900]), {}
    names = ["conv_in", "down_blocks.0", "mid_block", "up_blocks.0", "up_blocks.1"]
    modules = dict(library.unet.named_modules())
    handles = [
        modules[n].register_forward_hook(
            lambda _m, _i, out, n=n: whole.__setitem__(n, out[0] if isinstance(out, tuple) else out)
        )
        for n in names
    ]
    with torch.no_grad():
        embedding = told(library, prompt).expand(2, -1, -1)
        library.unet(latents_of(library, images()), steps, encoder_hidden_states=embedding)
    for handle in handles:
        handle.remove()
    found = teacher.features(images(), steps, names)
    for name in names:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=2e-5)
        assert found[name].shape[1:] == teacher.tap(name).shape and not found[name].requires_grad


def test_the_prediction_is_the_librarys(teacher, library):
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 990])
    with torch.no_grad():
        expected = library.unet(x, t, encoder_hidden_states=told(library, "").expand(2, -1, -1)).sample
    torch.testing.assert_close(teacher.predict(x, t), expected, rtol=1e-5, atol=1e-6)


def test_images_become_the_mode_of_the_posterior_at_the_vaes_scale(teacher, library):
    found = teacher.normalise(images())
    assert found.shape == (2, 4, 8, 8) and (teacher.image_size, teacher.latent_size, teacher.in_channels) == (16, 8, 4)
    torch.testing.assert_close(found, latents_of(library, images()), rtol=1e-5, atol=1e-6)
    assert torch.equal(teacher.normalise(images()), found)  # nothing is drawn


def test_forward_noise_is_laid_on_the_latents(teacher, library):
    seen = []
    teacher.taps()
    teacher.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    steps = torch.tensor([10, 900])
    teacher.features(images(), steps, ["conv_in"], noise="forward", rng=Rows(stream(0, "x"), 2))
    noise = Rows(stream(0, "x"), 2).normal(4, 8, 8)
    alpha_bar = library.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    expected = alpha_bar.sqrt() * latents_of(library, images()) + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_the_noise_schedule_is_the_folders(teacher, library):
    expected = library.scheduler.alphas_cumprod.double().numpy()
    assert teacher.num_train_timesteps == 1000 and abs(teacher.schedule.alphas_cumprod - expected).max() < 1e-6


# What a teacher promises


def test_nothing_behind_the_tap_is_computed(folder, teacher):
    poisoned = load_text_unet(str(folder))
    for name, parameter in poisoned.module.named_parameters():
        if name.startswith(("up_blocks", "conv_norm_out", "conv_out")):
            nn.init.constant_(parameter, float("nan"))
    expected = teacher.features(images(), 7, ["mid_block"])["mid_block"]
    assert torch.equal(poisoned.features(images(), 7, ["mid_block"])["mid_block"], expected)
    assert not torch.isfinite(poisoned.predict(torch.zeros(1, 4, 8, 8), torch.tensor([7]))).any()
    assert 0 < teacher.multiply_adds("mid_block") < teacher.multiply_adds()
    assert teacher.encoder_multiply_adds > 0


def test_taps_have_the_stride_in_pixels(teacher):
    strides = {tap.name: tap.stride for tap in teacher.taps()}
    assert (strides["conv_in"], strides["mid_block"], strides["up_blocks.1"]) == (2, 4, 2)


def test_the_prompt_moves_features_and_hash_and_the_image_does_too(folder, teacher):
    other = load_text_unet(str(folder), "a cat")
    a, b = (t.features(images(), 500, ["mid_block"])["mid_block"] for t in (teacher, other))
    assert float((a - b).abs().max()) > 1e-4 and not torch.equal(a[0], a[1])
    assert teacher.sha256 == load_text_unet(str(folder), "").sha256 != other.sha256


def test_the_door_knows_it_and_its_prompt(folder, teacher):
    plain, cat = load_teacher(str(folder)), load_teacher(f"{folder}?prompt=a cat")
    assert isinstance(plain, TextUNetTeacher) and plain.sha256 == teacher.sha256
    assert cat.sha256 == load_text_unet(str(folder), "a cat").sha256


def test_the_hash_is_of_the_vae_too(copied, teacher):
    weights = load_file(copied / "vae" / WEIGHTS)
    name = "encoder.conv_in.weight"
    save_file(weights | {name: weights[name] + 1}, copied / "vae" / WEIGHTS, metadata={"format": "pt"})
    assert load_text_unet(str(copied)).sha256 != teacher.sha256


def test_a_batch_is_split_to_fit_memory(folder, teacher):
    """One megabyte holds a few of these images."""
    small = load_text_unet(str(folder))
    small.run_as(PassConfig(memory_mb=1))
    each, seen = small.encoder.peak_bytes, []
    small.vae.module.encoder.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    found = small.features(images(40), 9, ["mid_block"])["mid_block"]
    assert sum(seen) == 40 and max(seen) < 40 and max(seen) * each <= 1_000_000
    expected = teacher.features(images(40), 9, ["mid_block"])["mid_block"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_refused(teacher):
    with pytest.raises(UserError, match="reads 16-pixel images, not 8x8"):
        teacher.features(torch.zeros(1, 3, 8, 8), 0, ["mid_block"])


def test_it_is_frozen(teacher):
    for module in (teacher.module, teacher.vae.module):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert not teacher.embedding.requires_grad and teacher.embedding.shape == (1, 16, 8)


# What is wrong with a folder


def test_without_transformers_the_way_to_get_it_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs transformers: pip install 'diffrep[text]'" in refused(folder)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("vae", "vae"),
        ("text_encoder", "text_encoder/config.json does not exist"),
        ("tokenizer", "its tokenizer cannot be loaded"),
    ],
)
def test_a_part_that_is_not_there_is_named(copied, part, told):
    shutil.rmtree(copied / part)
    assert told in refused(copied)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(copied, part):
    (file,) = (copied / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(name := sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})
    assert name in refused(copied) or "do not belong together" in refused(copied)


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"addition_embed_type": "text_time"}, r"reads more than a prompt \(addition_embed_type\)"),
        ({"num_class_embeds": 1000}, r"reads more than a prompt \(num_class_embeds\)"),
        ({"sample_size": [8, 8]}, r"sample_size \[8, 8\], not one number"),
        ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel; valid: UNet2DConditionModel"),
    ],
)
def test_another_kind_of_network_is_refused(copied, config, told):
    changed(copied / "unet/config.json", **config)
    with pytest.raises(UserError, match=told):
        load_text_unet(str(copied))


def test_another_text_encoder_is_refused(copied):
    changed(copied / "text_encoder/config.json", architectures=["T5EncoderModel"])
    assert "its text encoder is a T5EncoderModel; valid: CLIPTextModel" in refused(copied)


def test_a_network_that_also_reads_a_mask_is_refused(teacher):
    """Nine channels: latents, masked latents and a mask."""
    import diffusers

    config = dict(teacher.module.config) | {"in_channels": 9}
    unet = diffusers.UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match="inpainting reads 9 channels, its VAE makes 4"):
        TextUNetTeacher(unet, "inpainting", teacher.vae, teacher.embedding)


def test_a_prompt_that_would_be_cut_is_refused(folder):
    assert "has 18 tokens; stable reads 16 at most" in refused(folder, prompt=" ".join("abcdefghijklmnop"))
    assert prompt_embedding(folder, " ".join("abcdefghijklmn")).shape == (1, 16, 8)


def test_the_embedding_is_kept_and_the_encoder_let_go(teacher):
    held = [v for v in vars(teacher).values() if isinstance(v, nn.Module)]
    assert held == [teacher.module]
