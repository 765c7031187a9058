"""A frozen diffusion model asked for images: pytest tests/frozen/test_generator.py"""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from toys import gaussians

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig, grid_png, guidance_scales
from diffrep.frozen.teachers import load_teacher


class OnePerClass(nn.Module):
    """The exact denoiser of data where class k is one flat image of brightness (k + 1) / 5, and the null class grey."""

    def __init__(self, prediction="epsilon", channels=3):
        super().__init__()
        self.schedule, self.prediction, self.channels = NoiseSchedule.named("cosine"), prediction, channels
        self.calls = []

    def forward(self, x, timestep, class_labels):
        self.calls.append(class_labels.tolist())
        clean = torch.where(class_labels == 4, 0.0, (class_labels + 1) / 5 * 2 - 1).view(-1, 1, 1, 1)
        a = self.schedule.alpha_bar(timestep, x)
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        return noise if self.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean


def of_classes(**options):
    prediction = options.get("prediction", "epsilon")
    network = OnePerClass(prediction, options.get("channels", 3))
    teacher = DiffusionTeacher(
        network, "flat", 4, options.get("channels", 3), network.schedule, num_classes=4, prediction=prediction
    )
    return DiffusionGenerator(teacher), network


def walk(steps="3", **options):
    return SamplingConfig(num_sampling_steps=steps, **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_label_gets_its_image_in_zero_to_one(prediction, channels):
    generator, network = of_classes(prediction=prediction, channels=channels)
    found = generator.sample(torch.tensor([0, 3, 1]), [5, 6, 7], walk("10"))
    assert found.shape == (3, 3, 4, 4) and found.dtype == torch.float32
    for image, brightness in zip(found, (0.2, 0.8, 0.4), strict=True):
        torch.testing.assert_close(image, torch.full_like(image, brightness), rtol=0, atol=1e-3)
    assert network.calls == [[0, 3, 1]] * 10  # without guidance the unconditional half is not computed


def test_guidance_asks_the_null_class_too():
    generator, network = of_classes()
    found = generator.sample(torch.tensor([1, 2]), [0, 1], walk(guidance_scale=2.0))
    assert network.calls == [[1, 2], [4, 4]] * 3
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.tensor([0.3, 0.7]), rtol=0, atol=1e-3)  # away from grey
    assert float(generator.sample(torch.tensor([0]), [0], walk(guidance_scale=9.0)).max()) < 1e-5  # held in range


def test_three_of_four_channels_are_guided_and_the_fourth_is_as_without():
    generator, _ = of_classes(channels=4)
    generator.decode = lambda x: x
    plain, three, all_four = (
        generator.sample(torch.tensor([1]), [0], walk(**options))
        for options in ({}, {"guidance_scale": 1.5, "guided_channels": 3}, {"guidance_scale": 1.5})
    )
    assert torch.equal(three[:, 3], plain[:, 3]) and torch.equal(three[:, :3], all_four[:, :3])
    assert float((all_four - plain).abs().min()) > 0.05


@given(st.floats(0, 30), st.floats(0, 30), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_the_unconditional_half_is_asked_inside_the_interval_alone(low, width, steps):
    generator, network = of_classes()
    asked = walk(str(steps), guidance_scale=2.0, guidance_interval=(low, low + width + 0.1))
    generator.sample(torch.tensor([1]), [0], asked)
    schedule = network.schedule.respaced(str(steps))
    inside = sum(low < schedule.sigma_at(t) <= low + width + 0.1 for t in range(steps))
    assert (network.calls.count([1]), network.calls.count([4])) == (steps, inside) == generator.calls(asked)


def test_a_range_of_scales_gives_each_image_its_own():
    generator, _ = of_classes()
    labels, seeds = torch.tensor([2] * 40), list(range(40))
    found = generator.sample(labels, seeds, walk(guidance_scale=(1.0, 2.0))).mean((1, 2, 3))
    expected = 0.5 + 0.1 * guidance_scales(walk(guidance_scale=(1.0, 2.0)), seeds)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert 0.6 <= float(found.min()) < 0.62 and 0.68 < float(found.max()) <= 0.7


def test_steering_goes_where_the_judge_is_pleased():
    generator = DiffusionGenerator(gaussians())

    def mean(judge):
        return float(generator.sample(torch.tensor([1]), [0], walk("10"), judge=judge).mean())

    plain = mean(None)
    assert mean(lambda images, labels: 0 * images.sum((1, 2, 3))) == plain
    assert mean(lambda images, labels: images.sum((1, 2, 3))) > plain + 0.02
    assert mean(lambda images, labels: -images.sum((1, 2, 3))) < plain - 0.02


@pytest.fixture(scope="module")
def trained(pipeline):
    return DiffusionGenerator(load_teacher(str(pipeline())))


@given(st.permutations(range(6)), st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(trained, order, size):
    alone = {seed: trained.sample(None, [seed], walk())[0] for seed in range(6)}
    for start in range(0, 6, size):
        seeds = list(order[start : start + size])
        for seed, image in zip(seeds, trained.sample(None, seeds, walk()), strict=True):
            torch.testing.assert_close(image, alone[seed], rtol=0, atol=1e-3)
    assert float((alone[0] - alone[1]).abs().max()) > 0.1


def test_the_noise_belongs_to_the_weights():
    """Networks that differ in a weight without effect differ in their noise alone."""
    images = []
    for unused in (0.0, 1.0, 0.0):
        generator, network = of_classes()
        generator.decode = lambda x: x
        network.unused = nn.Parameter(torch.tensor(unused))
        network.forward = lambda x, timestep, class_labels: torch.zeros_like(x)
        images.append(generator.sample(torch.tensor([1]), [3], walk(sampler="ddpm")))
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (None, {"guidance_scale": 2.0}, "knows no classes"),
        ([0], {}, "knows no classes"),
        (None, {"steps": "1001"}, "1001"),
    ],
)
def test_what_an_unconditional_network_cannot_draw_is_refused(trained, labels, options, message):
    with pytest.raises(UserError, match=message):
        trained.sample(None if labels is None else torch.tensor(labels), [0], walk(**options))


def test_classes_and_channels_beyond_the_network_are_refused():
    generator, network = of_classes()
    for labels in ([0, 4], [-1, 0]):
        with pytest.raises(UserError, match=r"class -?\d is outside 0..3 of flat"):
            generator.sample(torch.tensor(labels), [0, 1], walk("2"))
    with pytest.raises(UserError, match="guided_channels 4: flat has 3 channels"):
        generator.sample(torch.tensor([0]), [0], walk(guidance_scale=2.0, guided_channels=4))
    assert network.calls == []


def test_the_grid_is_one_png_with_white_lines_between():
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = Image.open(io.BytesIO(grid_png(images, columns=3)))
    assert sheet.size == (14, 9) and sheet.mode == "RGB"
    pixels = [[sheet.getpixel((column * 5, row * 5))[0] for column in range(3)] for row in range(2)]
    assert pixels == [[0, 64, 128], [191, 255, 255]]  # the sixth place stays white
    assert sheet.getpixel((4, 0)) == sheet.getpixel((0, 4)) == (255, 255, 255)
