"""Training a diffusion model, and what it leaves behind: pytest tests/methods/test_denoiser.py"""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from diffrep import _torchvision_compat
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.denoiser import Denoiser, DenoiserConfig
from diffrep.randomness import Rows, stream

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def built(num_classes=3, size=8, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(DenoiserConfig(**{**SMALL, **settings}), num_classes, size)


def batch(count=4, labels=(0, 1, 2, -1), size=8):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(images, None if labels is None else torch.tensor(labels), torch.arange(count))


def rows(count=4, seed=0):
    return Rows(stream(seed, "step", 0), count)


def entering(method):
    seen = []
    method.network.register_forward_pre_hook(lambda _m, args, kw: seen.append((*args, kw)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_that_of_the_paper(prediction, channels):
    """Recomputed from the same draws: x_t, the target, and their mean squared difference."""
    method = built(prediction=prediction, in_channels=channels)
    seen = entering(method)
    loss = method(batch(), rows(), 0.0)["loss"]
    rng = rows()
    step, noise = rng.integers(0, 1000), rng.normal(channels, 8, 8)
    x = batch().images * 2 - 1
    x = x.mean(1, keepdim=True) if channels == 1 else x
    a = torch.from_numpy(method.schedule.alphas_cumprod)[step].float().view(-1, 1, 1, 1)
    noised = a.sqrt() * x + (1 - a).sqrt() * noise
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
    torch.testing.assert_close(seen[0][0], noised)
    assert torch.equal(seen[0][1], step)
    predicted = method.network(noised, step, return_dict=False)[0]
    torch.testing.assert_close(loss, F.mse_loss(predicted, target))


def test_labels_are_dropped_at_their_rate_and_hidden_ones_always():
    method = built(conditional=True, label_dropout=0.3)
    labels = torch.arange(5000) % 3
    labels[::5] = -1
    found = method.dropped(labels, rows(5000))
    assert bool((found[::5] == 3).all()) and bool(((found == labels) | (found == 3)).all())
    assert float((found[labels >= 0] == 3).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert bool((built(conditional=True, label_dropout=1.0).dropped(labels, rows(5000)) == 3).all())
    kept = built(conditional=True, label_dropout=0.0).dropped(labels, rows(5000))
    assert torch.equal(kept[labels >= 0], labels[labels >= 0])


def test_a_hidden_label_is_the_null_class_for_the_network():
    method = built(conditional=True, label_dropout=0.0)
    seen = entering(method)
    method(batch(), rows(), 0.0)
    assert seen[0][2]["class_labels"].tolist() == [0, 1, 2, 3]


def test_an_unconditional_model_reads_no_label():
    method = built()
    seen = entering(method)
    a, b = (method(batch(labels=labels), rows(), 0.0)["loss"] for labels in ((0, 1, 2, -1), None))
    assert torch.equal(a, b) and all(call[2]["class_labels"] is None for call in seen)
    assert DenoiserConfig().label_readers() == () and DenoiserConfig(conditional=True).label_readers()


def test_the_loss_falls():
    method = built()
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    images = torch.full((16, 3, 8, 8), 0.8)
    shown = Batch(images, None, torch.arange(16))
    losses = []
    for step in range(60):
        loss = method(shown, Rows(stream(0, "step", step), 16), 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_plain_diffusers_loads_and_samples_what_is_exported(tmp_path):
    _torchvision_compat.install()
    from diffusers import DDPMPipeline

    method = built(noise_schedule="cosine")
    assert method.export(tmp_path) == {"pipeline": "pipeline", "conditional": False}
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(batch_size=3, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    assert drawn.images.shape == (3, 8, 8, 3) and 0 <= drawn.images.min() <= drawn.images.max() <= 1
    for name, value in method.network.state_dict().items():
        assert torch.equal(value, pipe.unet.state_dict()[name])


def test_diffusers_loads_a_conditional_model_and_ours_samples_it_with_guidance(tmp_path):
    _torchvision_compat.install()
    from diffusers import DDPMScheduler, UNet2DModel

    method = built(conditional=True, prediction="v_prediction")
    method.export(tmp_path)
    unet = UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet")
    theirs = DDPMScheduler.from_pretrained(tmp_path / "pipeline" / "scheduler")
    assert unet.config.num_class_embeds == 4 and theirs.config.prediction_type == "v_prediction"
    teacher = load_teacher(str(tmp_path / "pipeline"))
    assert teacher.num_classes == 3
    images = torch.rand(2, 3, 8, 8)
    step, labels = torch.tensor([3, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = unet(images, step, class_labels=labels, return_dict=False)[0]
    assert torch.equal(teacher.predict(images, step, labels), expected)
    generator = DiffusionGenerator(teacher)
    walks = (SamplingConfig(num_sampling_steps="2", guidance_scale=s) for s in (1.0, 4.0))
    plain, strong = (generator.sample(labels, [0, 1], walk) for walk in walks)
    assert plain.shape == (2, 3, 8, 8) and torch.isfinite(strong).all() and not torch.equal(plain, strong)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise_schedule": "cosine"},
        {"num_train_timesteps": 50},
        {"num_train_timesteps": 5, "noise_schedule": "cosine"},
    ],
)
def test_the_exported_scheduler_is_the_one_trained_with(tmp_path, settings):
    method = built(**settings)
    method.export(tmp_path)
    read = load_teacher(str(tmp_path / "pipeline")).schedule
    assert len(read) == len(method.schedule)
    assert abs(read.alphas_cumprod - method.schedule.alphas_cumprod).max() < 1e-9
    config = json.loads((tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "epsilon"


@pytest.mark.parametrize("conditional", [False, True])
def test_pictures_are_drawn_from_what_was_saved(tmp_path, conditional):
    method = built(conditional=conditional)
    method.export(tmp_path)
    method.illustrate(tmp_path, 0, "2", seed=0)
    assert not (tmp_path / "samples").exists()
    method.illustrate(tmp_path, 4, "2", seed=0)
    first = (tmp_path / "samples" / "grid.png").read_bytes()
    assert Image.open(tmp_path / "samples" / "grid.png").size == (35, 8)
    method.illustrate(tmp_path, 4, "2", seed=0)
    assert (tmp_path / "samples" / "grid.png").read_bytes() == first
    method.illustrate(tmp_path, 4, "2", seed=1)
    assert (tmp_path / "samples" / "grid.png").read_bytes() != first


def test_attention_and_levels_are_built_as_asked():
    method = built(attention_levels=(1,), mid_attention=True, attention_head_dim=4, size=16)
    assert type(method.network.down_blocks[1]).__name__ == "AttnDownBlock2D"
    assert type(method.network.up_blocks[0]).__name__ == "AttnUpBlock2D"
    assert type(method.network.down_blocks[0]).__name__ == "DownBlock2D"
    assert len(method.network.mid_block.attentions) == 1
    with pytest.raises(UserError, match="9-pixel images cannot be halved 1 times"):
        built(size=9)


def test_the_default_is_the_network_that_is_claimed():
    method = Denoiser(DenoiserConfig(in_channels=1), 10, 8)
    assert sum(p.numel() for p in method.parameters()) / 1e6 == pytest.approx(0.63, abs=0.005)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"block_out_channels": (8, 15)}, "15 is not divisible by norm_num_groups 4"),
        ({"attention_levels": (2,)}, r"positions are 0\.\.1"),
        ({"label_dropout": 1.5}, "less than or equal to 1"),
        ({"prediction": "sample"}, "v_prediction"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        DenoiserConfig(**{**SMALL, **settings})


def test_a_dry_step_is_forward_and_backward():
    method = built(conditional=True)
    method.dry_step(torch.rand(2, 3, 8, 8))
    assert all(p.grad is not None for p in method.parameters())
