"""The clean-input extractor: what it learns, starts from and leaves: pytest tests/methods/test_clean_input.py"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from official_files import guided_unet, saved, tiny_dit
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from diffrep import api
from diffrep.assemble import multiply_adds_per_image
from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.clean import CARD, is_extractor
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.clean_input import CleanInput, CleanInputConfig, bounds
from diffrep.randomness import Rows, stream
from diffrep.recipes import RECIPES

SMALL = {"time_width": 8, "mapping_hidden": 16, "taps": ("mid", "up")}


def built(teacher, size=8, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CleanInput(CleanInputConfig(**{"teacher": teacher, **SMALL, **settings}), 4, size, True).train()


@pytest.fixture
def tiny(factory, tiny_denoiser):
    """The reference of a class-conditional network that says what it is."""
    seen = {"labels_seen": {"denoiser": 7}, "licence": "CC BY-NC 4.0"}
    return factory(lambda: DiffusionTeacher(tiny_denoiser(num_classes=4), "tiny", 8, num_classes=4, **seen))


def batch(count=4, seed=0, size=8):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Batch(images, None, torch.arange(count))


def rows(step=0, count=4):
    return Rows(stream(0, "step", step), count)


def trained(method, steps, rate, groups=("network", "time", "heads"), count=32):
    """The mean loss of the last ten of ``steps`` updates on fresh images."""
    parameters = [p for name in groups for p in method.parameter_groups()[name]]
    optimizer, losses = torch.optim.Adam(parameters, rate), []
    for step in range(steps):
        loss = method(batch(count, step), rows(step, count), step / steps)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def opened(folder):
    return load_teacher(str(folder), allow_code=True)


# What is learnt


class LinearTeacher(nn.Module):
    """``seen`` = W x_t + drift(t) v for each 2x2 patch, with W a random rotation."""

    image_size, in_channels = 8, 3

    def __init__(self, drift=0.0):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.patches = nn.Conv2d(3, 12, 2, 2, bias=False)
        rotation = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q
        self.patches.weight.data = rotation.view(12, 3, 2, 2)
        self.time = nn.Linear(1, 12, bias=False)
        self.time.weight.data = drift * torch.randn(12, 1, generator=rng)
        self.seen = nn.Identity()

    def forward(self, x, timestep):
        drift = self.time((timestep.float() / 300).cos()[:, None])
        return self.seen(self.patches(x) + drift[:, :, None, None])


def test_what_noise_hides_of_a_linear_teacher_is_recovered(factory):
    """Of W x_t the clean image tells sqrt(alpha_bar) W x_0, and around it the noise points nowhere: W is a rotation.

    So W x_0 is the direction of the largest mean cosine. The copy begins with weights that know nothing of W.
    """
    method = built(factory(LinearTeacher), taps=("seen",))
    with torch.no_grad():
        method.network.patches.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(9))
    shown = batch(64, seed=10_000).images * 2 - 1

    def agreement():
        with torch.no_grad():
            wanted = method.teacher.module.patches(shown)
            return float(F.cosine_similarity(method.network(shown, method.time.expand(64)), wanted).mean())

    assert abs(agreement()) < 0.5
    trained(method, 120, 1e-2, groups=("network", "time"))
    assert agreement() > 0.98


def test_the_heads_take_up_what_changes_with_t_alone(factory):
    """Where the original drifts with t, a constant cannot follow; a head that is told t can."""
    without, with_heads = (
        trained(built(factory(lambda: LinearTeacher(drift=1.0)), taps=("seen",)), 80, 1e-2, groups)
        for groups in (("network", "time"), ("network", "time", "heads"))
    )
    assert with_heads < without - 0.1


def test_the_loss_is_minus_the_sum_over_taps_of_the_mean_cosine(tiny):
    """Recomputed from the same draws: three t per image, one in each third of [1, T - 1]; heads begin as identities."""
    method, rng, x = built(tiny), rows(), batch().images * 2 - 1
    found = method(batch(), rows(), 0.0)
    teacher, clean, expected = method.teacher, batch().images, {"mid": 0.0, "up": 0.0}
    mine = teacher.features(clean, 50, ["mid", "up"])
    for low, high in ((1, 334), (334, 667), (667, 1000)):
        step, noise = rng.integers(low, high), rng.normal(3, 8, 8)
        a = torch.from_numpy(teacher.schedule.alphas_cumprod)[step].float().view(-1, 1, 1, 1)
        noised = (a.sqrt() * x + (1 - a).sqrt() * noise + 1) / 2
        theirs = teacher.features(noised, step, ["mid", "up"])
        for tap in expected:
            expected[tap] += float(F.cosine_similarity(mine[tap], theirs[tap], dim=1).mean()) / 3
    assert float(found["loss"].detach()) == pytest.approx(-sum(expected.values()), abs=1e-5)
    for tap, value in expected.items():
        assert float(found[f"cosine_{tap}"].detach()) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("steps", [4, 50, 999, 1000])
def test_the_thirds_are_all_timesteps_but_the_first(steps):
    parts = [range(*bounds(third, steps)) for third in range(3)]
    assert [t for part in parts for t in part] == list(range(1, steps))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# What it starts from, and what is trained


def test_it_starts_at_the_originals_features(tiny, tmp_path):
    method = built(tiny, start_timestep=120)
    method.export(tmp_path)
    images = batch().images
    expected = load_teacher(tiny, True).features(images, 120, ["mid", "up"])
    found = opened(tmp_path).features(images, 0, ["mid", "up"])
    assert all(torch.equal(found[tap], expected[tap]) for tap in expected)
    assert not torch.equal(found["mid"], load_teacher(tiny, True).features(images, 0, ["mid"])["mid"])


def test_a_gradient_reaches_the_copy_the_timestep_and_the_heads_alone(tiny):
    method = built(tiny, taps=("mid",))
    before = copy.deepcopy(method.teacher.module.state_dict())
    trained(method, 2, 1e-2)
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.module.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in method.teacher.module.parameters())
    assert not set(map(id, method.teacher.module.parameters())) & set(map(id, method.parameters()))
    assert float(method.time.grad) != 0 and float(method.time.detach()) != 50
    reached = {n.partition(".")[0] for n, p in method.network.named_parameters() if p.grad is not None}
    assert reached == {"stem", "time", "classes", "down", "mid"}  # `up` and `out` lie behind the tap
    heads = [*method.mapping.parameters(), *method.heads.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in heads)
    groups = method.parameter_groups()
    assert sorted(groups) == ["heads", "network", "time"]
    assert sum(map(len, groups.values())) == len([*method.parameters()])


def test_the_copy_is_trained_without_dropout(tiny):
    """`down` of the tiny network ends in a dropout of one half."""
    method = built(tiny)
    assert method.training and not any(m.training for m in method.network.modules())
    assert torch.equal(method(batch(), rows(), 0.0)["loss"], method(batch(), rows(), 0.0)["loss"])


def test_micro_batches_add_up_to_the_batch(tiny):
    method, whole = built(tiny), batch()
    expected = float(method(whole, rows(), 0.0)["loss"].detach())
    halves = []
    for part in ([0, 2], [1, 3]):
        shown = Batch(whole.images[part], None, whole.index[part])
        halves.append(float(method(shown, Rows(stream(0, "step", 0), 4, part), 0.0)["loss"].detach()))
    assert sum(halves) / 2 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("passes", [{"precision": "bf16"}, {"channels_last": True}, {"attention": "plain"}])
def test_options_of_a_pass_hold_for_original_and_copy(pipeline, passes):
    """They change nothing but the rounding."""
    taps = ("mid_block", "up_blocks.1")
    losses = [built(str(pipeline()), taps=taps, passes=p)(batch(), rows(), 0.0)["loss"] for p in ({}, passes)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), abs=2e-2)
    losses[1].backward()


def test_diffusers_networks_learn_their_timestep(pipeline):
    method = built(str(pipeline()), taps=("mid_block", "up_blocks.1"))
    method(batch(), rows(), 0.0)["loss"].backward()
    assert float(method.time.grad) != 0


@pytest.mark.parametrize(
    "make, said, taps",
    [
        (guided_unet, "image_size=8&head_width=16&attention_order=new&noise_schedule=cosine", ("middle_block",)),
        (tiny_dit, "num_heads=2", ("blocks.0", "blocks.1@raw")),
    ],
)
def test_official_networks_learn_their_timestep(make, said, taps, tmp_path):
    """And with equal weights the extractor gives what the original gives: of a DiT also its massive channels."""
    reference = f"{saved(make(), tmp_path / 'official.pt')}?{said}"
    method = built(reference, taps=taps)
    method.export(tmp_path)
    images = batch().images
    found, expected = (load_teacher(r).features(images, 50, taps) for r in (str(tmp_path), reference))
    assert all(torch.equal(found[tap], expected[tap]) for tap in taps)
    method(batch(), rows(), 0.0)["loss"].backward()
    assert method.time.grad is not None and method.time.grad != 0
    assert multiply_adds_per_image(method, 8) > method.frozen_multiply_adds() > 0


# What it leaves


def test_neither_timestep_nor_noise_nor_neighbours_change_a_feature(tiny, tmp_path):
    method = built(tiny)
    trained(method, 3, 1e-2)
    method.export(tmp_path)
    teacher, images = opened(tmp_path), batch().images
    taps = ["stem", "mid", "up"]
    first = teacher.features(images, 0, taps)
    for told in (1, 500, 999, torch.tensor([3, 1, 4, 1])):
        for rng in (None, rows(7)):
            found = teacher.features(images, told, taps, rng=rng)
            assert all(torch.equal(found[tap], first[tap]) for tap in taps)
    with torch.no_grad():
        seen = method.network.stem(images * 2 - 1)
    assert torch.equal(first["stem"], seen)
    assert not torch.equal(first["mid"], load_teacher(tiny, True).features(images, 50, ["mid"])["mid"])


def test_the_extractor_is_a_teacher_like_any_other(tiny, tmp_path):
    method = built(tiny)
    trained(method, 2, 1e-2)
    said = method.export(tmp_path)
    teacher, original = opened(tmp_path), load_teacher(tiny, True)
    assert said == {"teacher": "tiny", "taps": ["mid", "up"], "timestep": float(method.time.detach())}
    assert teacher.taps() == original.taps() and teacher.name == tmp_path.name
    assert teacher.multiply_adds("mid") == original.multiply_adds("mid")
    assert 0 <= teacher.peak_bytes(["mid"]) - original.peak_bytes(["mid"]) < 8  # the constant itself
    assert teacher.labels_seen == {"denoiser": 7} and method.labels_behind == {"teacher: denoiser": 7}
    assert teacher.licence == method.licence and teacher.licence.startswith("CC BY-NC 4.0: that of tiny")
    hashes = {original.sha256, teacher.sha256, opened(tmp_path).sha256}
    assert len(hashes) == 2
    images = batch().images
    whole = teacher.features(images, 0, ["mid"])["mid"]
    teacher.keep_only(["mid"])
    assert teacher.kept == ("mid",) and torch.equal(teacher.features(images, 0, ["mid"])["mid"], whole)
    assert teacher.sha256 in hashes


def test_the_weights_are_the_copys_under_the_originals_names(pipeline, tmp_path):
    method = built(str(pipeline()), taps=("mid_block",))
    trained(method, 2, 1e-2)
    method.export(tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == load_teacher(str(pipeline())).module.state_dict().keys()
    assert all(torch.equal(value, method.network.state_dict()[name]) for name, value in stored.items())
    card = json.loads((tmp_path / CARD).read_text())
    assert (card["original"], card["taps"]) == (str(pipeline()), ["mid_block"])
    assert torch.tensor(card["timestep"]) == method.time.detach()  # every bit of it


def test_a_run_folder_is_an_extractor_and_says_what_stands_behind_it(tiny, tmp_path):
    settings = [f"method.teacher={tiny}", "method.taps=[mid]", "seed=3"]
    result = api.run("clean_input_debug", settings, out=tmp_path / "run", allow_code=True)
    assert is_extractor(str(tmp_path / "run")) and not is_extractor(str(tmp_path))
    assert result["labels_behind"] == {"teacher: denoiser": 7} and result["labels_seen"] == {}
    assert result["timestep"] != 50 and result["scores"] == {}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "cosine_mid", "time"} <= line.keys() for line in lines)


def test_a_step_is_counted(tiny):
    """Forward and backward of copy and heads, three passes of the original."""
    method = built(tiny)
    forward = method.teacher.multiply_adds("up")
    assert method.frozen_multiply_adds() == 3 * forward
    counted = multiply_adds_per_image(method, 8) - 3 * forward
    assert 3 * forward < counted + forward and counted > 2 * forward
    assert all(p.device.type == "cpu" for p in [*method.parameters(), *method.teacher.module.parameters()])


# What is refused, in one line


class Deaf(LinearTeacher):
    def forward(self, x, timestep):
        return self.seen(self.patches(x))


class WholeNumbers(LinearTeacher):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 12)

    def forward(self, x, timestep):
        return self.seen(self.patches(x) + self.table(timestep)[:, :, None, None])


class Rounding(LinearTeacher):
    def forward(self, x, timestep):
        return super().forward(x, timestep.long())


@pytest.mark.parametrize("network", [Deaf, WholeNumbers, Rounding])
def test_a_network_without_a_timestep_to_learn_is_refused(factory, network):
    with pytest.raises(UserError, match="must read fractions and pass on their gradient; ") as caught:
        built(factory(network), taps=("seen",))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"taps": ("mdi",)}, "tap 'mdi' does not exist in TinyDenoiser; did you mean 'mid'"),
        ({"start_timestep": 1000}, r"start_timestep 1000 is outside 0\.\.999 of tiny"),
        ({"size": 9}, "tiny reads 8-pixel images, not 9x9"),
    ],
)
def test_what_does_not_fit_the_original_is_refused(tiny, settings, words):
    with pytest.raises(UserError, match=words):
        built(tiny, **settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"taps": ()}, "at least 1 item"),
        ({"taps": ("mid", "mid")}, "named twice"),
        ({"start_timestep": -1}, "greater than or equal to 0"),
        ({"passes": {"memory_mb": 5}}, "train.micro_batch_size saves memory"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        CleanInputConfig(**{"teacher": "x", **SMALL, **settings})


def test_too_few_timesteps_for_thirds_are_refused(pipeline):
    with pytest.raises(UserError, match=r"has 3 timesteps; thirds of 1\.\.T-1 need 4"):
        built(str(pipeline(num_train_timesteps=3)), taps=("mid_block",), start_timestep=1)


def test_the_extractor_refuses_what_it_was_not_trained_for(tiny, tmp_path):
    built(tiny).export(tmp_path)
    teacher, images = opened(tmp_path), batch().images
    with pytest.raises(UserError, match="trained to read clean images: noise 'forward' is not for it; valid: null"):
        teacher.features(images, 5, ["mid"], noise="forward", rng=rows())
    with pytest.raises(UserError, match=r"timestep 1000 is outside 0\.\.999"):
        teacher.features(images, 1000, ["mid"])
    with pytest.raises(UserError, match=r"gives features of clean images and draws none; python:.* draws"):
        teacher.predict(images, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="takes no option 'label'; valid behind its"):
        load_teacher(f"{tmp_path}?label=1", allow_code=True)
    with pytest.raises(UserError, match=r"is an extractor; valid: its original, python:"):
        built(str(tmp_path))


def test_an_extractor_whose_original_went_or_changed_is_refused(tiny, factory, tiny_denoiser, tmp_path):
    built(tiny).export(tmp_path)
    factory(lambda: tiny_denoiser(width=4))
    with pytest.raises(UserError, match="whose weights are others now"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"is a trained copy of python:.*, which has to be there: .*--allow-code"):
        load_teacher(str(tmp_path))


def test_a_damaged_extractor_is_refused(tiny, tmp_path):
    built(tiny).export(tmp_path)
    card, weights = (tmp_path / CARD).read_text(), (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(weights[:-9])
    with pytest.raises(UserError, match="corrupt or truncated"):
        opened(tmp_path)
    (tmp_path / CARD).write_text(card.replace('"timestep"', '"timestpe"'))
    with pytest.raises(UserError, match="unknown key 'timestpe'; did you mean 'timestep'"):
        opened(tmp_path)


def test_an_untrained_twin_keeps_the_constant(tiny, tmp_path):
    built(tiny).export(tmp_path)
    twin, images = load_teacher(f"random:{tmp_path}", allow_code=True), batch().images
    first, other = (twin.features(images, told, ["mid"])["mid"] for told in (0, 900))
    assert torch.equal(first, other) and twin.sha256 != opened(tmp_path).sha256


# Recipes


def test_the_recipes_read_taps_that_are_there(shared):
    network = load_teacher(str(shared / "weights" / "ddpm_cifar10_small"))
    taps = RECIPES["clean_input_cifar10_small"]().method.taps
    assert all(len(network.tap(tap).shape) == 3 for tap in taps)
