"""A mix of taps and timesteps: the weights find what tells the class, and the run is a teacher: test_mixing.py"""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from diffrep import api
from diffrep import assemble as assembly
from diffrep.assemble import assemble
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, label_subset, load_data
from diffrep.errors import Interrupted, UserError
from diffrep.evaluation.classify import load_student
from diffrep.evaluation.levels import block_taps
from diffrep.files import write_json
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.generator import DiffusionGenerator
from diffrep.frozen.teachers import load_teacher
from diffrep.methods.mixing import Mixing, MixingConfig
from diffrep.models.mixing import on_grid
from diffrep.randomness import Rows, stream
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe
from diffrep.recipes.loading import load
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

SMALL = {"taps": ("stem", "mid"), "timesteps": (0, 900), "width": 8, "grid": 4}


def built(teacher, classes=4, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixing(MixingConfig(**{"teacher": str(teacher)} | SMALL | changes), classes, 8, allow_code=True)


def batch(labels=(0, 1, 2, 3, -1, -1), seed=0):
    images = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.tensor(labels), torch.arange(len(labels)))


def rows(count=6):
    return Rows(stream(0, "step", 0), count)


def unequal(method):
    """Weights that differ, as after training."""
    with torch.no_grad():
        method.mix.logits.copy_(torch.linspace(-1, 1, method.mix.logits.numel()).view_as(method.mix.logits))
    return method


@pytest.fixture
def tiny(factory, tiny_denoiser):
    """A reference to a tiny denoiser with always the same weights."""
    return factory(tiny_denoiser)


# What is learned


class Planted(nn.Module):
    """Three taps of noise; at one timestep one of them tells which quarter is bright. ``passes`` counts calls."""

    def __init__(self, informative, timestep):
        super().__init__()
        self.informative, self.timestep, self.passes = informative, timestep, 0
        self.image_size, self.in_channels = 8, 3
        self.taps = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x, timestep):
        self.passes += 1
        noises = [3 * (x[:, k, 0, :4] - x[:, k, 1, :4]) for k in range(3)]  # of one quarter: the class cancels
        quarters = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)  # (B, 4)
        tells = (timestep == self.timestep)[:, None]
        noises[self.informative] = torch.where(tells, quarters, noises[self.informative])
        return [tap(noise[:, :, None, None]) for tap, noise in zip(self.taps, noises, strict=True)][-1]


def quarters(count, rng):
    """Images in which the class is the bright quarter."""
    labels = torch.randint(0, 4, (count,), generator=rng)
    images = 0.4 + 0.1 * torch.randn(count, 3, 8, 8, generator=rng)
    for k, label in enumerate(labels.tolist()):
        top, left = label // 2 * 4, label % 2 * 4
        images[k, :, top : top + 4, left : left + 4] += 0.4
    return Batch(images.clamp(0, 1), labels, torch.arange(count))


@pytest.mark.parametrize(
    ("timesteps", "informative", "timestep"), [((50,), 0, 50), ((50,), 2, 50), ((0, 50, 900), 1, 50)]
)
def test_one_informative_tap_among_noise_gets_the_weight(factory, timesteps, informative, timestep):
    """The published idea's acceptance; each step shows new images, so that noise cannot be learned by heart."""
    reference = factory(partial(Planted, informative, timestep))
    method = built(reference, taps=("taps.0", "taps.1", "taps.2"), timesteps=timesteps, grid=1).train()
    method.prepare([quarters(256, torch.Generator().manual_seed(1))])
    start = {row["weight"] for row in method.report()}
    assert len(start) == 1 and start.pop() == pytest.approx(1 / (3 * len(timesteps)), abs=1e-6)
    rates = {"projections": 1e-2, "weights": 5e-2, "head": 1e-2}
    groups = method.parameter_groups()
    optimizer = torch.optim.Adam([{"params": groups[name], "lr": lr} for name, lr in rates.items()])
    for step in range(200):
        optimizer.zero_grad()
        parts = method(quarters(64, torch.Generator().manual_seed(100 + step)), rows(64), 0.0)
        parts["loss"].backward()
        optimizer.step()
    best = max(method.report(), key=lambda row: row["weight"])
    assert (best["tap"], best["timestep"]) == (f"taps.{informative}", timestep) and best["weight"] > 0.8
    assert float(parts["train_top1"]) > 0.95


def test_weights_are_shares_and_are_reported(tiny):
    method = unequal(built(tiny))
    logged, report = method(batch(), rows(), 0.0)["mix_weights"], method.report()
    torch.testing.assert_close(logged.sum(), torch.tensor(1.0))
    assert [(row["tap"], row["timestep"]) for row in report] == [("stem", 0), ("mid", 0), ("stem", 900), ("mid", 900)]
    assert [row["weight"] for row in report] == pytest.approx(logged.tolist(), abs=1e-6)
    expected = torch.linspace(-1, 1, 4).exp()
    torch.testing.assert_close(logged, expected / expected.sum())


def by_hand(method, images):
    """The descriptor, one map, one convolution after the other."""
    mix, total = method.mix, 0
    for t, step in enumerate(SMALL["timesteps"]):
        found = method.teacher.features(images, step, SMALL["taps"])
        for number, tap in enumerate(SMALL["taps"]):
            unit = mix.projections[number]
            x = (on_grid(found[tap], method.config.grid) - unit.mean[t]) / unit.std[t]
            inner = torch.einsum("dc,bchw->bdhw", unit.squeeze.weight[:, :, 0, 0], x)
            centred = inner - inner.mean((1, 2, 3), keepdim=True)
            inner = (centred / centred.square().mean((1, 2, 3), keepdim=True).add(1e-5).sqrt()).relu()
            y = torch.einsum("dc,bchw->bdhw", unit.expand.weight[:, :, 0, 0], inner)
            y = y + torch.einsum("dc,bchw->bdhw", unit.shortcut.weight[:, :, 0, 0], x)
            y = (y - y.mean((1, 2, 3), keepdim=True)) / y.var((1, 2, 3), unbiased=False, keepdim=True).add(1e-5).sqrt()
            total = total + mix.logits.flatten().softmax(0).view(2, 2)[t, number] * y
    return total


@pytest.mark.parametrize("grid", [1, 4, 8])
def test_the_descriptor_is_the_weighted_sum_of_projections(tiny, grid):
    method = unequal(built(tiny, grid=grid))
    method.prepare([batch(seed=3)])
    images = batch().images
    descriptor = method.mix(method.reader.maps(images))
    assert descriptor.shape == (6, 8, grid, grid)
    torch.testing.assert_close(descriptor, by_hand(method, images), rtol=1e-4, atol=1e-5)
    logits = descriptor.mean((2, 3)) @ method.head.weight.T + method.head.bias
    cost = F.cross_entropy(logits[:4], torch.arange(4), reduction="sum") / 6  # of the four labelled rows
    torch.testing.assert_close(method(batch(), rows(), 0.0)["loss"], cost)


def test_maps_come_on_one_grid():
    fine, coarse = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert on_grid(fine, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(coarse, 4)[0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]  # bilinear, between cell centres


def test_one_pass_per_timestep_gives_all_taps(factory):
    network = Planted(0, 0)
    method = built(factory(lambda: network), taps=("taps.0", "taps.2"), timesteps=(0, 7, 900), grid=1)
    network.passes = 0
    method(batch(), rows(), 0.0)
    assert network.passes == 3


def test_statistics_are_of_each_channel_and_need_no_label(tiny):
    method = built(tiny)
    shown = batch((-1,) * 64)
    blocks = [Batch(part, None, torch.arange(len(part))) for part in shown.images.split(40)]
    method.prepare(blocks)
    seen = torch.cat([block.images[::4] for block in blocks])
    for t, step in enumerate(SMALL["timesteps"]):
        for tap, unit in zip(SMALL["taps"], method.mix.projections, strict=True):
            found = on_grid(method.teacher.features(seen, step, [tap])[tap], 4)
            torch.testing.assert_close(unit.mean[t, 0, :, 0, 0], found.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
            expected = found.std((0, 2, 3), unbiased=False)
            torch.testing.assert_close(unit.std[t, 0, :, 0, 0], expected, rtol=1e-4, atol=1e-6)


# What training touches


def test_gradients_reach_the_mix_and_the_head_and_leave_the_teacher(tiny):
    method = built(tiny).train()
    network = method.teacher.module
    assert method.teacher.kept == SMALL["taps"]  # nothing behind them is held
    before = DiffusionTeacher(network, "before", 8).sha256
    optimizer = torch.optim.Adam(method.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        method(batch(), rows(), 0.0)["loss"].backward()
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in method.parameters())
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())
    assert DiffusionTeacher(network, "after", 8).sha256 == before
    assert {name.split(".")[0] for name in method.state_dict()} == {"mix", "head"}
    grouped = [p for group in method.parameter_groups().values() for p in group]
    assert {id(p) for p in grouped} == {id(p) for p in method.parameters()} and len(grouped) == len({*map(id, grouped)})


def test_hidden_rows_reach_no_parameter(tiny):
    method, found = built(tiny), []
    for seed in (1, 2):
        shown = batch()
        shown.images[4:] = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        found.append(torch.autograd.grad(method(shown, rows(), 0.0)["loss"], list(method.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def recipe(teacher, labels=20):
    return Recipe(
        name="few",
        data=DataConfig(source="digits", augment="shift:1", labels=labels, labelled_share=0.5),
        method=MixingConfig(teacher=teacher, **SMALL),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(steps=3, batch_size=16),
    )


def trained(task, tmp_path):
    parts = assemble(task, allow_code=True)
    run = RunDir(tmp_path / "none", writes=False)
    trainer = Trainer(parts.method, parts.feed, task.optim, task.train, task.seed, run)
    parts.method.train()
    for step in range(3):
        trainer.step(step)
    return {n: v.clone() for n, v in parts.method.state_dict().items()}


def test_the_true_values_of_hidden_labels_change_nothing(tiny, tmp_path, monkeypatch):
    """Three steps with the truth, and with lies, under every hidden label; and with fewer labels shown."""
    truth = load_data(DataConfig(source="digits"), "train").labels
    drawn = label_subset(truth, 20, 0)
    monkeypatch.setattr(assembly, "label_subset", lambda labels, count, seed: drawn[:count])
    honest = trained(recipe(tiny), tmp_path)

    def lying(config, split, **named):
        images = load_data(config, split, **named)
        if split == "train":
            images.labels = (truth + 1) % 10
            images.labels[drawn] = truth[drawn]
        return images

    monkeypatch.setattr(assembly, "load_data", lying)
    lied = trained(recipe(tiny), tmp_path)
    assert honest.keys() == lied.keys() and all(torch.equal(honest[n], lied[n]) for n in honest)
    fewer = trained(recipe(tiny, 10), tmp_path)
    assert any(not torch.equal(honest[n], fewer[n]) for n in honest)


# The run as a teacher


@pytest.fixture
def kept(pipeline, tmp_path):
    """kept(**changes) -> (a method that learned, the run folder it left)."""

    def make(**changes):
        taps = {"taps": ("down_blocks.1", "mid_block", "up_blocks.1")}
        teacher = pipeline(in_channels=3)
        method = unequal(built(teacher, **taps | changes))
        method.prepare([batch(seed=3)])
        folder = tmp_path / "mixed"
        said = {"name": "mixed", "labels_seen": {"mixing": 20}, "labels_behind": {"teacher: x": 5}}
        write_json(folder / "result.json", method.export(folder) | said)
        return method, folder

    return make


def test_the_run_opens_as_a_teacher_with_the_methods_descriptor(kept):
    method, folder = kept()
    teacher = load_teacher(str(folder))
    images = batch().images
    with torch.no_grad():
        expected = method.mix(method.reader.maps(images))
    early, late = (teacher.features(images, t, ["descriptor"])["descriptor"] for t in (0, torch.arange(6)))
    assert torch.equal(early, expected) and torch.equal(late, expected) and not early.requires_grad
    (tap,) = teacher.taps()
    assert (tap.name, tap.shape, tap.stride) == ("descriptor", early.shape[1:], 2)
    assert block_taps(teacher) == ("descriptor",)
    assert teacher.labels_seen == {"mixing": 20, "teacher: x": 5} and teacher.name == "mixed"
    assert teacher.licence == method.teacher.licence and teacher.image_size == 8
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert teacher.multiply_adds("descriptor") > method.frozen_multiply_adds() > 0
    whole = teacher.sha256
    teacher.keep_only(["descriptor"])
    assert teacher.teacher.kept == method.config.taps
    assert torch.equal(teacher.features(images, 0, ["descriptor"])["descriptor"], expected)
    assert teacher.sha256 == whole != load_teacher(f"random:{folder}").sha256


def test_the_precision_of_passes_reaches_both_parts(kept):
    _, folder = kept()
    images = batch().images
    exact, rounded = load_teacher(str(folder)), load_teacher(str(folder))
    rounded.run_as(exact.passes.model_copy(update={"precision": "bf16", "memory_mb": 1}))
    assert rounded.teacher.passes == rounded.passes
    a, b = (teacher.features(images, 0, ["descriptor"])["descriptor"] for teacher in (exact, rounded))
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_an_untrained_twin_has_equal_weights(kept):
    _, folder = kept()
    twin = load_teacher(f"random:{folder}")
    torch.testing.assert_close(twin.mix.weights, torch.full((2, 3), 1 / 6))
    assert all(bool((p.mean == 0).all() and (p.std == 1).all()) for p in twin.mix.projections)
    assert twin.features(batch().images, 0, ["descriptor"])["descriptor"].isfinite().all()


def test_a_mix_of_a_mix(kept, tmp_path):
    method, folder = kept()
    outer = built(folder, taps=("descriptor",), timesteps=(0,))
    assert outer.labels_behind == {"teacher: mixing": 20, "teacher: teacher: x": 5}
    torch.testing.assert_close(outer.reader.maps(batch().images)[0][0], method.mix(method.reader.maps(batch().images)))


# By recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs/denoiser_debug and what `mixing_debug` makes of it."""
    folder = tmp_path_factory.mktemp("runs")
    api.run("denoiser_debug", out=folder / "runs" / "denoiser_debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        api.run("mixing_debug", out=folder / "runs" / "mixed")
    return folder


class AfterOneStep:
    """In the place of wish_to_stop: a wish that is there from the beginning."""

    def __enter__(self):
        return lambda: True

    def __exit__(self, *_):
        return None


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "cpu_seconds"} for line in found]


def test_a_resumed_run_ends_in_the_same_mix(runs, monkeypatch):
    whole, broken = runs / "runs" / "mixed", runs / "runs" / "broken"
    monkeypatch.chdir(runs)
    with monkeypatch.context() as patch:
        patch.setattr(api, "wish_to_stop", AfterOneStep)
        with pytest.raises(Interrupted, match="stopped at step 1 of 2"):
            api.run("mixing_debug", out=broken)
    with pytest.raises(UserError, match="has not finished"):
        load_teacher(str(broken))
    api.run("mixing_debug", out=broken)
    assert lines(broken) == lines(whole)
    assert all(len(line["mix_weights"]) == 12 for line in lines(whole))
    file = "mix/weights.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_the_result_says_weights_and_labels(runs):
    result = json.loads((runs / "runs" / "mixed" / "result.json").read_text())
    assert result["labels_seen"] == {"mixing": 50} and result["descriptor"] == [64, 4, 4]
    assert sum(row["weight"] for row in result["mix_weights"]) == pytest.approx(1, abs=1e-5)
    method = RECIPES["mixing_debug"]().method
    pairs = [(tap, t) for t in method.timesteps for tap in method.taps]
    assert [(row["tap"], row["timestep"]) for row in result["mix_weights"]] == pairs
    state = load_file(runs / "runs" / "mixed" / "mix" / "weights.safetensors")
    assert {name.split(".")[0] for name in state} == {"logits", "projections"}  # neither teacher nor head


def test_a_student_learns_from_it_and_says_whose_labels_stand_behind(runs, monkeypatch):
    monkeypatch.chdir(runs)
    changes = ["method.teacher=runs/mixed", "method.tap=descriptor"]
    result = api.run("repfusion_debug", changes, out=runs / "runs" / "student")
    assert result["labels_behind"] == {"teacher: mixing": 50} and result["steps"] == 2
    assert result["tap"] == "descriptor"


# Bad input


def told(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"taps": ("stem", "midd")}, "tap 'midd' does not exist in TinyDenoiser; did you mean 'mid'"),
        ({"taps": ("time",)}, "taps: 'time' of python:diffrep_test_factories:make returns (8,), not a map"),
        ({"timesteps": (0, 1000)}, "timestep 1000 is outside 0..999"),
    ],
)
def test_a_teacher_that_does_not_have_it(tiny, changes, words):
    assert words in told(lambda: built(tiny, **changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("method.taps=[]", "method.taps = []: Tuple should have at least 1 item"),
        ("method.taps=[mid_block,mid_block]", "one is named twice"),
        ("method.timesteps=[5,5]", "one is named twice"),
        ("method.timesteps=[-1]", "greater than or equal to 0"),
        ("method.grid=0", "method.grid = 0"),
        ("method.widht=3", "did you mean 'width'"),
        ("data.augment=mixup:4", "mixes images"),
    ],
)
def test_settings_that_cannot_be(change, words):
    assert words in told(lambda: load("mixing_debug", [change]))


def test_images_of_another_size(tiny):
    assert "set data.image_size=8" in told(lambda: Mixing(MixingConfig(teacher=tiny, **SMALL), 4, 16, allow_code=True))


def test_what_a_mix_cannot_be_asked(kept):
    _, folder = kept()
    teacher, shown = load_teacher(str(folder)), batch()
    ask = partial(teacher.features, shown.images)
    assert "tap 'mid_block' does not exist in mixed, a mix; valid: descriptor" in told(lambda: ask(0, ["mid_block"]))
    noised = told(lambda: ask(0, ["descriptor"], noise="forward", rng=rows()))
    assert "trained to read clean images: noise 'forward' is not for it; valid: null" in noised
    assert "leave out labels" in told(lambda: ask(0, ["descriptor"], labels=shown.labels))
    assert "timestep 1000 is outside" in told(lambda: ask(1000, ["descriptor"]))
    assert "predicts 'descriptor'; valid: epsilon" in told(lambda: DiffusionGenerator(teacher))
    assert "predicts nothing" in told(lambda: teacher.predict(shown.images, torch.zeros(6, dtype=torch.int64)))
    assert "a mix, takes no option 'label'; valid behind its '?': none" in told(
        lambda: load_teacher(f"{folder}?label=3")
    )
    assert "holds no student" in told(lambda: load_student(str(folder)))


def edited(folder, **changes):
    file = folder / "mix" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_teacher_that_is_gone_or_another(kept, pipeline):
    _, folder = kept()
    gone = str(folder.parent / "gone")
    before = json.loads((folder / "mix" / "config.json").read_text())["teacher"]
    edited(folder, teacher=gone)
    said = told(lambda: load_teacher(str(folder)))
    assert f"{folder} mixes features of {gone}, which cannot be opened: " in said
    edited(folder, teacher=f"random:{before}")
    assert "has other weights now" in told(lambda: load_teacher(str(folder)))
    edited(folder, teacher=before, timesteps="soon")
    assert "config.json: timesteps = 'soon'" in told(lambda: load_teacher(str(folder)))


def test_weights_that_do_not_fit(kept):
    _, folder = kept()
    file = folder / "mix" / "weights.safetensors"
    state = load_file(file)
    save_file({n: v for n, v in state.items() if n != "logits"}, file)
    assert "does not fit its mix: 1 missing (logits)" in told(lambda: load_teacher(str(folder)))
    file.write_bytes(file.read_bytes()[:-9])
    assert "corrupt or truncated" in told(lambda: load_teacher(str(folder)))
