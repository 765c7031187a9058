"""A frozen diffusion model asked for images: pytest tests/frozen/test_generator.py"""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.diffusion import DiffusionTeacher, load_teacher
from diffrep.frozen.generator import DiffusionGenerator, grid_png


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_label_gets_its_image_in_zero_to_one(prediction, channels):
    generator, network = of_classes(prediction=prediction, channels=channels)
    found = generator.sample(torch.tensor([0, 3, 1]), [5, 6, 7], "10")
    assert found.shape == (3, 3, 4, 4) and found.dtype == torch.float32
    for image, brightness in zip(found, (0.2, 0.8, 0.4), strict=True):
        torch.testing.assert_close(image, torch.full_like(image, brightness), rtol=0, atol=1e-3)
    assert network.calls == [[0, 3, 1]] * 10  # without guidance the unconditional half is not computed


def test_guidance_asks_the_null_class_too():
    generator, network = of_classes()
    found = generator.sample(torch.tensor([1, 2]), [0, 1], "3", guidance_scale=2.0)
    assert network.calls == [[1, 2], [4, 4]] * 3
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.tensor([0.3, 0.7]), rtol=0, atol=1e-3)  # away from grey
    assert float(generator.sample(torch.tensor([0]), [0], "3", guidance_scale=9.0).max()) == 0  # held in range


@pytest.fixture(scope="module")
def trained(pipeline):
    return DiffusionGenerator(load_teacher(str(pipeline())))


@given(st.permutations(range(6)), st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(trained, order, size):
    alone = {seed: trained.sample(None, [seed], "3")[0] for seed in range(6)}
    for start in range(0, 6, size):
        seeds = list(order[start : start + size])
        for seed, image in zip(seeds, trained.sample(None, seeds, "3"), strict=True):
            torch.testing.assert_close(image, alone[seed], rtol=0, atol=1e-3)
    assert float((alone[0] - alone[1]).abs().max()) > 0.1


def test_the_noise_belongs_to_the_weights(pipeline, trained):
    other = DiffusionGenerator(load_teacher(f"random:{pipeline()}"))
    assert not torch.equal(trained._noise(3), other._noise(3))
    assert torch.equal(trained._noise(3), DiffusionGenerator(load_teacher(str(pipeline())))._noise(3))


def test_what_cannot_be_drawn_is_refused(trained):
    generator, _ = of_classes()
    for labels in ([0, 4], [-1, 0]):
        with pytest.raises(UserError, match=r"class -?\d is outside 0..3 of flat"):
            generator.sample(torch.tensor(labels), [0, 1], "2")
    for asked in ({"labels": torch.tensor([0])}, {"labels": None, "guidance_scale": 2.0}):
        with pytest.raises(UserError, match="knows no classes"):
            trained.sample(asked.pop("labels"), [0], "2", **asked)
    with pytest.raises(UserError, match="num_sampling_steps"):
        trained.sample(None, [0], "ddim999")
    generator.network.prediction = "sample"
    with pytest.raises(UserError, match="predicts 'sample'; valid: epsilon, v_prediction"):
        generator.sample(torch.tensor([0]), [0], "2")


def test_the_grid_is_one_png_with_white_lines_between():
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = Image.open(io.BytesIO(grid_png(images, columns=3)))
    assert sheet.size == (14, 9) and sheet.mode == "RGB"
    pixels = [[sheet.getpixel((column * 5, row * 5))[0] for column in range(3)] for row in range(2)]
    assert pixels == [[0, 64, 128], [191, 255, 255]]  # the sixth place stays white
    assert sheet.getpixel((4, 0)) == sheet.getpixel((0, 4)) == (255, 255, 255)
