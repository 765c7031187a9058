"""Networks of (x, sigma) as teachers, against what is known of a Gaussian: pytest tests/frozen/test_edm.py"""

import math

import pytest
import torch
from torch import nn

from diffrep.diffusion.sampling import named_sampler
from diffrep.diffusion.schedules import NoiseSchedule
from diffrep.errors import UserError
from diffrep.frozen.edm import Preconditioned, PreconditionedTeacher, edm_teacher, is_preconditioned
from diffrep.frozen.generator import DiffusionGenerator, SamplingConfig
from diffrep.frozen.teachers import load_teacher
from diffrep.randomness import Rows, stream

MEAN, SPREAD = 0.3, 0.4


class Gaussian(nn.Module):
    """The best denoiser of pixels drawn from N(mean, spread^2): D = (spread^2 x + sigma^2 mean) / (spread^2 + sigma^2).

    As official networks are: preconditioned, the inner network being told log(sigma) / 4.
    """

    def __init__(self, classes=0, size=4, spread=SPREAD):
        super().__init__()
        self.spread = spread
        self.img_resolution, self.img_channels, self.label_dim = size, 3, classes
        self.sigma_min, self.sigma_max = 0.0, math.inf
        self.means = nn.Parameter(torch.linspace(-0.5, 0.5, classes) if classes else torch.tensor([MEAN]))
        self.model = nn.Identity()  # where a tap can be
        self.told = []

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        assert x.dtype == sigma.dtype == torch.float32
        sigma = sigma.reshape(-1, 1, 1, 1)
        mean = MEAN if class_labels is None else (class_labels @ self.means).view(-1, 1, 1, 1)
        self.told.append((x, sigma.flatten(), class_labels))
        return self.model((self.spread**2 * x + sigma**2 * mean) / (self.spread**2 + sigma**2))


def images(count=2, seed=0, size=4):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def epsilon(x, alpha_bar, mean=MEAN):
    """E[noise | x_t] of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise with Gaussian x_0 (by hand)."""
    return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * mean) / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_epsilon_is_the_analytic_one_at_every_timestep(name):
    schedule = NoiseSchedule.named(name)
    steps = torch.arange(0, 999, 37)
    x = torch.randn(len(steps), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    teacher = edm_teacher(Gaussian(), schedule=schedule)
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod)[steps].view(-1, 1, 1, 1)
    expected = epsilon(x.double(), alpha_bar)
    torch.testing.assert_close(teacher.predict(x, steps).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_network_is_told_the_sigma_of_its_timestep():
    """Linear betas of 1,000 steps: sigma^2 = 1 / alpha_bar - 1; about 0.01 at the first step and 157 at the last."""
    teacher = edm_teacher(Gaussian())
    teacher.predict(torch.zeros(3, 3, 4, 4), torch.tensor([0, 500, 999]))
    sigma = teacher.module.net.told[-1][1].tolist()
    assert sigma == pytest.approx([teacher.schedule.sigma_at(t) for t in (0, 500, 999)], rel=1e-6)
    assert sigma[0] == pytest.approx(0.01, rel=1e-3) and sigma[2] == pytest.approx(157.4, rel=1e-3)


def test_ddim_ends_where_the_gaussians_own_flow_ends():
    """The flow of a Gaussian is linear: x_0 = mean + spread (x_T - sqrt(alpha_bar) mean) / deviation of x_T."""
    teacher = edm_teacher(Gaussian())
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    walk = named_sampler("ddim", "1000")
    ended = walk(lambda x, t: teacher.predict(x, t), noise, teacher.schedule, Rows(stream(0, "none"), 4))
    alpha_bar = teacher.schedule.alpha_bar_at(999)
    expected = MEAN + SPREAD * (noise - alpha_bar**0.5 * MEAN) / (alpha_bar * SPREAD**2 + 1 - alpha_bar) ** 0.5
    torch.testing.assert_close(ended, expected, rtol=0, atol=0.01)
    assert float((ended - MEAN).std()) == pytest.approx(SPREAD, rel=0.15)


def test_without_spread_ddim_ends_at_the_mean():
    generator = DiffusionGenerator(edm_teacher(Gaussian(spread=0.0)))
    made = generator.sample(None, [5, 6], SamplingConfig(num_sampling_steps="7"))
    torch.testing.assert_close(made, torch.full((2, 3, 4, 4), (MEAN + 1) / 2), rtol=0, atol=1e-5)


# Features


def fed(teacher, **options):
    """What the network itself was given."""
    teacher.taps()
    teacher.module.net.told.clear()
    teacher.features(images(), torch.tensor([0, 700]), ["net.model"], **options)
    return teacher.module.net.told[0]


def test_a_clean_image_is_fed_at_its_own_scale_and_sigma_is_the_only_message():
    teacher = edm_teacher(Gaussian())
    x, sigma, _ = fed(teacher)
    assert torch.equal(x, images() * 2 - 1)
    assert sigma.tolist() == pytest.approx([teacher.schedule.sigma_at(t) for t in (0, 700)], rel=1e-6)


def test_a_noised_image_is_clean_plus_sigma_noise():
    """x_t / sqrt(alpha_bar) = x_0 + sigma noise, which is what such networks were trained with."""
    teacher = edm_teacher(Gaussian())
    x, sigma, _ = fed(teacher, noise="forward", rng=Rows(stream(0, "x"), 2))
    noise = Rows(stream(0, "x"), 2).normal(3, 4, 4)
    torch.testing.assert_close(x, images() * 2 - 1 + sigma.view(-1, 1, 1, 1) * noise, rtol=1e-4, atol=1e-4)


def test_features_leave_the_walk_as_it_was():
    teacher = edm_teacher(Gaussian())
    x, t = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([700])
    before = teacher.predict(x, t)
    teacher.features(images(), 700, ["net.model"])
    with pytest.raises(UserError):
        teacher.features(images(), 1000, ["net.model"])
    assert torch.equal(teacher.predict(x, t), before)
    assert not torch.equal(before, (x - teacher.module.net(x, teacher.module.sigma[t])) / teacher.module.sigma[t])


def test_nothing_behind_the_tap_is_computed():
    teacher = edm_teacher(Deep())
    shallow, whole = teacher.multiply_adds("net.first"), teacher.multiply_adds()
    assert 0 < shallow < whole and [tap.name for tap in teacher.taps()] == ["net.first", "net.second", "net"]
    nn.init.constant_(teacher.module.net.second.weight, float("nan"))
    assert torch.isfinite(teacher.features(images(), 5, ["net.first"])["net.first"]).all()
    assert not torch.isfinite(teacher.predict(images(), torch.tensor([5, 5]))).any()


class Deep(Gaussian):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)
        del self.model

    def forward(self, x, sigma, class_labels=None):
        return self.second(self.first(x))


# Classes


def test_classes_are_rows_of_one_and_the_null_class_is_all_zero():
    teacher = edm_teacher(Gaussian(classes=3))
    assert teacher.num_classes == 3
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([500, 500])
    teacher.predict(x, t, torch.tensor([2, 0]))
    assert teacher.module.net.told[-1][2].tolist() == [[0, 0, 1], [1, 0, 0]]
    teacher.predict(x, t)
    assert teacher.module.net.told[-1][2].tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("label, mean", [(0, -0.5), (2, 0.5)])
def test_a_class_is_drawn_at_its_mean(label, mean):
    """Guidance 1, pixels held in [-1, 1]: images of a class scatter around it."""
    generator = DiffusionGenerator(edm_teacher(Gaussian(classes=3)))
    made = generator.sample(torch.full((8,), label), list(range(8)), SamplingConfig(num_sampling_steps="40"))
    assert float(made.mean()) * 2 - 1 == pytest.approx(mean, abs=0.12)


# How it is recognised and described


def test_official_networks_are_recognised_by_what_they_say_of_themselves():
    assert is_preconditioned(Gaussian())
    for missing in ("sigma_min", "sigma_max", "img_resolution"):
        network = Gaussian()
        delattr(network, missing)
        assert not is_preconditioned(network)


def test_a_factory_may_return_one(factory):
    teacher = load_teacher(factory(Gaussian), allow_code=True)
    x, t = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([300])
    assert isinstance(teacher, PreconditionedTeacher) and teacher.image_size == 4
    expected = epsilon(x, teacher.schedule.alpha_bar_at(300))
    torch.testing.assert_close(teacher.predict(x, t), expected, rtol=1e-4, atol=1e-4)


def test_what_the_network_says_of_itself_and_what_is_said_of_it():
    own = edm_teacher(Gaussian(size=8))
    assert (own.image_size, own.in_channels, own.num_classes, own.num_train_timesteps) == (8, 3, None, 1000)
    walk = NoiseSchedule.named("cosine", 50)
    said = edm_teacher(nn.Conv2d(1, 1, 1), 16, "mine", 1, 4, walk, "CC0")
    assert (said.image_size, said.in_channels, said.num_classes, said.schedule) == (16, 1, 4, walk)
    assert (said.name, said.licence) == ("mine", "CC0")
    with pytest.raises(UserError, match="mine: the network has no img_resolution; give image_size"):
        edm_teacher(nn.Conv2d(1, 1, 1), name="mine")


def test_its_hash_is_of_the_weights_and_not_of_the_walk():
    walks = [NoiseSchedule.named("linear"), NoiseSchedule.named("cosine", 10)]
    hashes = [edm_teacher(Gaussian(classes=3), schedule=walk).sha256 for walk in walks]
    assert hashes[0] == hashes[1] != edm_teacher(Gaussian()).sha256
    assert not Preconditioned(nn.Identity(), walks[0]).state_dict()
