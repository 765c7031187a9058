"""The first road: routing of gradients, the policy, hidden labels, the store: pytest tests/methods/test_repfusion.py"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from diffrep import assemble as assembly
from diffrep.assemble import assemble, label_seed, labels_seen
from diffrep.data.batch import Batch
from diffrep.data.datasets import DataConfig, label_subset, load_data
from diffrep.data.feed import Feed
from diffrep.errors import UserError
from diffrep.evaluation import classify
from diffrep.evaluation.classify import EvaluateConfig
from diffrep.files import write_json
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.features import FeatureConfig, write_features
from diffrep.losses import FEATURE_LOSSES
from diffrep.methods.repfusion import PairConfig, RepFusion, RepFusionConfig, TimestepConfig, policy_network
from diffrep.models import rewards
from diffrep.models.students import StudentConfig
from diffrep.randomness import Rows, stream
from diffrep.recipes import RECIPES
from diffrep.recipes.base import Recipe
from diffrep.training.config import TrainConfig
from diffrep.training.optim import OptimConfig
from diffrep.training.run import RunDir
from diffrep.training.trainer import Trainer

CONV = StudentConfig(name="conv_small", options={"in_chans": 1})
MLP = StudentConfig(name="mlp_small", options={"in_chans": 1, "img_size": 8})
CHOICES = (0, 100, 900)


def policy(values=CHOICES, **settings_):
    return TimestepConfig(select="policy", values=values, **settings_)


def config(teacher, timestep=None, **changes):
    return RepFusionConfig(
        **{"teacher": teacher, "tap": "mid", "student": CONV, "timestep": timestep or policy()} | changes
    )


def built(teacher, timestep=None, classes=4, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RepFusion(config(teacher, timestep, **changes), classes, 8, allow_code=True)


def batch(labels=(0, 1, 2, 3, -1, -1), seed=0):
    images = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.tensor(labels), torch.arange(len(labels)), torch.zeros(len(labels), dtype=torch.int64))


def rows(count=6, step=0):
    return Rows(stream(0, "step", step), count)


@pytest.fixture
def tiny(factory, tiny_denoiser):
    """A reference to a tiny denoiser with always the same weights."""
    return factory(tiny_denoiser)


def parts_of(method):
    """{parameter name: which of the four parts it belongs to}"""
    return {n: n.split(".")[0] for n, _ in method.named_parameters()}


def projection(method):
    return method.comparisons[0].projector.weight, method.comparisons[0].projector.bias


def reached(method, loss):
    """The parts whose parameters get a gradient from ``loss`` that is not zero everywhere."""
    names, parameters = zip(*method.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = zip(names, grads, strict=True)
    return {PARTS.get(n.split(".")[0], n.split(".")[0]) for n, g in found if g is not None and float(g.abs().max()) > 0}


PARTS = {"comparisons": "projector"}  # what is trained of a comparison


# One step


@pytest.mark.parametrize("network", ["small", "conv"])
def test_each_loss_reaches_its_own_part_and_no_other(factory, tiny_denoiser, network):
    size = 8 if network == "small" else 32
    reference = factory(lambda: tiny_denoiser(image_size=size))
    method = RepFusion(config(reference, policy(policy=network)), 4, size, allow_code=True)
    labels = torch.tensor([0, 1, 2, 3, -1, -1])
    shown = Batch(torch.rand(6, 3, size, size), labels, torch.arange(6))
    parts = method(shown, rows(), 0.0)
    assert reached(method, parts["kd_loss"]) == {"student", "projector"}
    assert reached(method, parts["task_loss"]) == {"task_head"}
    assert reached(method, parts["policy_loss"]) == {"policy"}
    only_entropy = {"kd_weight": 0, "task_weight": 0, "policy_weight": 0}
    method.config = config(reference, policy(policy=network, entropy_weight=1.0), **only_entropy)
    nn.init.normal_(list(method.policy.parameters())[-1])  # a uniform policy has no entropy to gain
    assert reached(method, method(shown, rows(), 0.0)["loss"]) == {"policy"}


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(tiny):
    method = built(tiny)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    for step in range(2):  # the small policy's last layer starts at zero, so the ones below move from step 2 on
        optimizer.zero_grad()
        method(batch(), rows(step=step), 0.0)["loss"].backward()
        assert all(p.grad is not None for p in method.parameters())
        optimizer.step()
    assert all(float(p.grad.abs().max()) > 0 for p in method.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.network.module.parameters())


def test_the_loss_is_the_weighted_sum_of_its_parts(tiny):
    weights = {"kd_weight": 3.0, "task_weight": 0.5, "policy_weight": 2.0}
    method = built(tiny, policy(entropy_weight=0.2, entropy_until=0.5), **weights)
    parts = method(batch(), rows(), 0.25)
    expected = 3 * parts["kd_loss"] + 0.5 * parts["task_loss"] + 2 * parts["policy_loss"]
    torch.testing.assert_close(parts["loss"], expected - 0.1 * parts["policy_entropy"])
    torch.testing.assert_close(parts["policy_entropy"], torch.tensor(math.log(3)))  # the first proposal is uniform
    torch.testing.assert_close(parts["policy_probs"], torch.full((3,), 1 / 3))


def test_the_reward_is_that_of_the_head_on_the_pooled_code(tiny):
    """Recomputed by hand from the teacher's feature: -CE, chance as the first baseline, REINFORCE."""
    method = built(tiny)
    nn.init.normal_(method.policy.fc.weight)
    shown = batch()
    parts = method(shown, rows(), 0.0)
    logits = method.policy(shown.images)
    choice = rows().categorical(logits.softmax(1))
    code = method.teacher.network.features(shown.images, torch.tensor(CHOICES)[choice], ["mid"])["mid"].mean((2, 3))
    cost = F.cross_entropy(method.task_head(code)[:4], shown.labels[:4], reduction="none")
    torch.testing.assert_close(parts["task_loss"], cost.sum() / 6)
    log_prob = logits.log_softmax(1).gather(1, choice[:, None])[:4, 0]
    torch.testing.assert_close(parts["policy_loss"], (log_prob * (cost - math.log(4))).sum() / 6)
    student = F.conv2d(method.student.feature_map(shown.images), *projection(method))
    torch.testing.assert_close(parts["kd_loss"], F.mse_loss(student.mean((2, 3)), code), rtol=1e-4, atol=1e-6)


def test_the_baseline_is_the_running_mean_of_the_steps_before(tiny):
    method = built(tiny, policy(baseline_decay=0.75)).train()
    chance = -math.log(4)
    assert float(method.running_reward) == pytest.approx(chance)  # before anything is learnt
    method.rewards = [torch.tensor([-4.0, 2.0]), torch.tensor([-2.0, 1.0])]  # two micro-batches: sums and counts
    assert float(method.running_reward) == pytest.approx(chance)  # not before the step has ended
    method.after_step()
    assert float(method.running_reward) == pytest.approx(0.75 * chance + 0.25 * -2)
    before = method.running_reward.clone()
    method.rewards = [torch.tensor([0.0, 0.0])]  # a step without a labelled image
    method.after_step()
    assert torch.equal(method.running_reward, before) and "running_reward" in method.state_dict()
    official = built(tiny, policy(baseline="none")).train()
    official.rewards = [torch.tensor([-4.0, 2.0])]
    official.after_step()
    assert official.baseline(batch(), torch.zeros(6, 3), rows(), None) == 0 > float(official.running_reward)


def test_micro_batches_and_one_batch_give_the_same_baseline(tiny):
    whole, shared = built(tiny), built(tiny)
    whole(batch(), rows(), 0.0)
    shown = batch()
    for part in ([0, 1, 2, 3], [4, 5]):  # the second share has no label
        piece = Batch(shown.images[part], shown.labels[part], shown.index[part], None)
        shared(piece, Rows(stream(0, "step", 0), 6, part), 0.0)
    totals = [torch.stack(m.rewards).sum(0) for m in (whole, shared)]
    torch.testing.assert_close(*totals)
    assert totals[0][1] == 4 and len(shared.rewards) == 2


def test_the_entropy_weight_falls_to_nothing(tiny):
    method = built(tiny, policy(entropy_weight=0.4, entropy_until=0.5))
    assert [method.entropy_weight(p) for p in (0, 0.25, 0.5, 0.9)] == pytest.approx([0.4, 0.2, 0, 0])


@pytest.mark.parametrize(
    "timestep, allowed",
    [
        (TimestepConfig(select="fixed", values=(7,)), {7}),
        (TimestepConfig(select="range", values=(5, 9)), {5, 6, 7, 8}),
        (TimestepConfig(select="list", values=(900, 3)), {3, 900}),
        (policy((8, 1, 3)), {8, 1, 3}),
    ],
)
def test_each_rule_chooses_from_its_own_timesteps(tiny, timestep, allowed):
    method = built(tiny, timestep)
    shown = torch.rand(200, 3, 8, 8)
    choice, logits = method.choose(shown, rows(200), 0.0, [0])
    assert set(method.timesteps[choice].tolist()) == allowed
    assert (logits is None) == (timestep.select != "policy")
    assert ("policy" in method.parameter_groups()) == (timestep.select == "policy")
    asked = []
    method.teacher.network.module.register_forward_pre_hook(lambda _m, args: asked.append(args[1]))
    method(batch(), rows(), 0.0)
    assert set(asked[0].tolist()) <= allowed


def test_a_rule_without_policy_needs_no_labels(tiny):
    method = built(tiny, TimestepConfig(select="list", values=CHOICES))
    unlabelled = Batch(batch().images, None, torch.arange(6))
    parts = method(unlabelled, rows(), 0.0)
    assert parts.keys() == {"loss", "kd_loss", "mean_timestep", "chosen_timesteps"}
    assert config(tiny, TimestepConfig(select="fixed", values=(1,))).label_readers() == ()
    assert config(tiny).label_readers() == ("task head", "policy (through its reward)")


# The teacher stays what it is


def test_training_leaves_the_teacher_as_it_was(tiny):
    method = built(tiny).train()
    network = method.teacher.network
    before = DiffusionTeacher(network.module, "what is kept of it", 8).sha256
    optimizer = torch.optim.Adam(method.parameters(), 0.1)
    for step in range(3):
        method.train()
        method(batch(), rows(step=step), 0.0)["loss"].backward()
        optimizer.step()
    assert not any(m.training for m in network.module.modules()) and method.training
    assert DiffusionTeacher(network.module, "again", 8).sha256 == before
    names = [*method.state_dict(), *dict(method.named_parameters()), *dict(method.named_modules())]
    assert {n.split(".")[0] for n in names if n} == {
        "student", "comparisons", "policy", "task_head", "running_reward", "timesteps",
    }  # fmt: skip
    trained = {id(p) for p in method.parameters()}
    assert not any(id(p) in trained for p in network.module.parameters())
    grouped = [p for group in method.parameter_groups().values() for p in group]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trained)


def test_the_code_does_not_depend_on_the_label(factory, tiny_denoiser):
    """Also of a class-conditional teacher: it is asked with its null class."""
    network = tiny_denoiser(num_classes=4)
    teacher = DiffusionTeacher(network, "conditional", 8, num_classes=4)
    method = built(factory(lambda: teacher))
    seen = []
    network.classes.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    codes = [
        method.teacher.hints(batch(labels), torch.full((6,), 50), ["mid"])["mid"]
        for labels in ((0,) * 6, (3, 2, 1, 0, -1, 2), (-1,) * 6)
    ]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    assert all(label.tolist() == [4] * 6 for label in seen)


# Hidden labels


def test_hidden_rows_reach_neither_head_nor_policy(tiny):
    """Other pixels in the rows without a label: the gradients of reward, head and policy stay the same."""
    method = built(tiny).eval()
    nn.init.normal_(method.policy.fc.weight)
    wanted = [*method.task_head.parameters(), *method.policy.parameters()]
    found = []
    for seed in (1, 2):
        shown = batch()
        shown.images[4:] = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        parts = method(shown, rows(), 0.0)
        found.append(torch.autograd.grad(parts["task_loss"] + parts["policy_loss"], wanted))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(float(a.abs().max()) > 0 for a in found[0])


def recipe(method, labels=20, seed=0, **data):
    return Recipe(
        name="few",
        seed=seed,
        data=DataConfig(source="digits", augment="shift:1", labels=labels, **data),
        method=method,
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(steps=3, batch_size=16),
        evaluate=EvaluateConfig(probe_labels=(labels,)),
    )


def trained(recipe_, tmp_path):
    """All state after three steps, and the scores."""
    parts = assemble(recipe_, allow_code=True)
    run = RunDir(tmp_path / "none", writes=False)
    trainer = Trainer(parts.method, parts.feed, recipe_.optim, recipe_.train, recipe_.seed, run)
    parts.method.train()
    for step in range(3):
        trainer.step(step)
    state = {n: v.clone() for n, v in parts.method.state_dict().items()}
    return state, assembly.scores(recipe_, parts, Path(), torch.device("cpu"))


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(source="digits"), "train")


def few_label_methods(reference):
    finetune = RECIPES["finetune_debug"]().method
    denoiser = RECIPES["denoiser_debug"]().method.model_copy(update={"conditional": True})
    return {"policy": config(reference), "finetune": finetune, "conditional denoiser": denoiser}


@pytest.mark.parametrize("name", ["policy", "finetune", "conditional denoiser"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_the_true_values_of_hidden_labels_change_nothing(tiny, digits, tmp_path, monkeypatch, name, share):
    """A run of three steps and its scores, once with the truth and once with lies under every hidden label."""
    task = recipe(few_label_methods(tiny)[name], labelled_share=share)
    drawn = label_subset(digits.labels, 20, 0)
    for module in (assembly, classify):  # which labels are drawn depends on the classes; here it is given
        monkeypatch.setattr(module, "label_subset", lambda labels, count, seed: drawn[:count])
    honest, scores = trained(task, tmp_path)

    def lying(config_, split, **named):
        images = load_data(config_, split, **named)
        if split == "train":
            truth = images.labels.clone()
            images.labels = (truth + 1 + torch.arange(len(truth)) % 9) % 10
            assert bool((images.labels != truth).all())
            images.labels[drawn] = truth[drawn]
        return images

    monkeypatch.setattr(assembly, "load_data", lying)
    lied, lied_scores = trained(task, tmp_path)
    assert honest.keys() == lied.keys() and all(torch.equal(honest[n], lied[n]) for n in honest)
    assert scores == lied_scores and (name == "conditional denoiser" or scores["test_images"] == 539)
    monkeypatch.setattr(assembly, "label_subset", lambda labels, count, seed: drawn.flip(0)[:5])
    fewer, _ = trained(task, tmp_path)
    assert any(not torch.equal(honest[n], fewer[n]) for n in honest)  # and the labels that are shown do matter


@given(st.integers(10, 300), st.integers(0, 3), st.sampled_from([None, 0.25, 1.0]), st.sampled_from([None, 5]))
@settings(max_examples=8, deadline=None)
def test_everything_that_uses_labels_sees_the_same_few(digits, count, seed, share, own_seed):
    """Feed, result and probe: one draw, of the recipe's label seed, and part of every larger one."""
    method = RECIPES["finetune_debug"]().method
    task = recipe(method, labels=count, seed=seed, labelled_share=share, label_seed=own_seed)
    parts = assemble(task)
    draw = label_subset(digits.labels, count, label_seed(task))
    assert label_seed(task) == (seed if own_seed is None else own_seed)
    assert torch.equal(parts.labelled, draw) and torch.equal(parts.train.labels, digits.labels)
    shown = parts.feed.images.labels
    assert sorted((shown >= 0).nonzero()[:, 0].tolist()) == sorted(draw.tolist())
    assert torch.equal(shown[draw], digits.labels[draw])
    assert labels_seen(task, parts) == {"student": count}
    larger = label_subset(digits.labels, count + 37, label_seed(task))
    assert set(draw.tolist()) <= set(larger.tolist())
    for step in range(3):
        fed = parts.feed.batch(step, list(range(16)), torch.device("cpu"))
        known = fed.labels >= 0
        assert set(fed.index[known].tolist()) <= set(draw.tolist())
        assert set(fed.index[~known].tolist()).isdisjoint(draw.tolist())
        assert torch.equal(fed.labels[known], digits.labels[fed.index[known]])
        assert int(known.sum()) >= round((share or 0) * 16)


@pytest.mark.parametrize("own_seed", [None, 8])
def test_the_probe_is_fitted_on_the_draw_that_training_saw(monkeypatch, own_seed):
    asked = []

    def spy(seen, labels, held_out, test_labels, draws, num_classes):
        asked.extend(draws)
        return [0.0] * len(draws)

    monkeypatch.setattr(classify.probe, "probe_scores", spy)
    task = recipe(RECIPES["finetune_debug"]().method, labels=20, seed=3, label_seed=own_seed)
    task = task.model_copy(update={"evaluate": EvaluateConfig(probe_labels=(20, 50))})
    parts = assemble(task)
    assembly.scores(task, parts, Path(), torch.device("cpu"))
    assert torch.equal(asked[0], parts.labelled) and torch.equal(asked[1][:20], asked[0]) and len(asked[1]) == 50


def test_a_policy_may_not_see_more_labels_than_its_probe(tiny):
    with pytest.raises(ValidationError, match="training reads 20 labels"):
        Recipe(**recipe(config(tiny)).model_dump() | {"evaluate": {"probe_labels": (10,)}})


# A policy finds what is there to find


class Planted(nn.Module):
    """A teacher whose code tells the class (which quarter is bright) at one timestep and pixel noise at all others."""

    image_size, in_channels = 8, 3

    def __init__(self, informative):
        super().__init__()
        self.informative, self.mid = informative, nn.Identity()

    def forward(self, x, timestep):
        quarters = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)  # (B, 4)
        noise = 3 * (x[:, 0, 0, :4] - x[:, 0, 1, :4])  # neighbours of one quarter: the class cancels
        return self.mid(torch.where((timestep == self.informative)[:, None], quarters, noise)[:, :, None, None])


def quarters(count, rng):
    """Images in which the class is the bright quarter, and their labels."""
    labels = torch.randint(0, 4, (count,), generator=rng)
    images = 0.4 + 0.1 * torch.randn(count, 3, 8, 8, generator=rng)
    for k in range(count):
        top, left = int(labels[k]) // 2 * 4, int(labels[k]) % 2 * 4
        images[k, :, top : top + 4, left : left + 4] += 0.4
    return images.clamp(0, 1), labels


def share_of_choices(factory, planted, steps, hide=None):
    """Train and return where the policy's mass is on fresh images."""
    timesteps = (0, 50, 200, 500, 900)
    reference = factory(lambda: Planted(planted))
    method = built(reference, policy(timesteps, entropy_weight=0.05), student=MLP).train()
    groups = method.parameter_groups()
    rates = {"student": 1e-3, "task_head": 1e-2, "policy": 2e-2}
    optimizer = torch.optim.Adam([{"params": groups[n], "lr": lr} for n, lr in rates.items()])
    images, labels = quarters(512, torch.Generator().manual_seed(0))
    if hide:
        labels[torch.arange(512) % hide != 0] = -1
    for step in range(steps):
        index = torch.randint(0, 512, (64,), generator=stream(0, "order", step))
        parts = method(Batch(images[index], labels[index], index), rows(64, step), step / steps)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    fresh, _ = quarters(200, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return dict(zip(timesteps, method.policy(fresh).softmax(1).mean(0).tolist(), strict=True)), parts


@pytest.mark.parametrize("planted", [50, 900])
def test_a_planted_informative_timestep_is_found(factory, planted):
    mass, parts = share_of_choices(factory, planted, steps=200)
    assert mass[planted] > 0.9, mass
    assert float(parts["task_loss"].detach()) < 0.5  # far below ln 4 = 1.39


def test_a_planted_timestep_is_found_from_a_quarter_of_the_labels(factory):
    mass, _ = share_of_choices(factory, 200, steps=300, hide=4)
    assert mass[200] > 0.9, mass


def test_where_nothing_informs_the_policy_stays_undecided(factory):
    """The control: no timestep carries the class, so none may win by the machinery itself."""
    mass, parts = share_of_choices(factory, planted=-5, steps=120)
    assert max(mass.values()) < 0.6, mass
    assert float(parts["task_loss"].detach()) > 1.0


# Standardising, online and from a store


@pytest.fixture
def feed(digits):
    return Feed(digits, DataConfig(source="digits"), 32, 0, None)


@pytest.fixture
def store(tmp_path, tiny_denoiser, digits, feed):
    """Float32 features of all training digits at the choices, in the blocks in which they are read below."""
    teacher = DiffusionTeacher(tiny_denoiser(), "tiny", 8, licence="CC0")
    kept = FeatureConfig(taps=("mid",), timesteps=CHOICES, pool=2, dtype="float32", block_size=256)
    source = {"name": "digits", "split": "train", "fingerprint": digits.fingerprint, "augment": "none"}

    def view_of(view, index):
        return feed.gather(index, torch.full_like(index, view), torch.device("cpu")).images

    write_features(tmp_path / "store", teacher, kept, view_of, len(digits), 1, source)
    return str(tmp_path / "store")


@pytest.mark.parametrize("standardise", ["joint", "per_timestep"])
@pytest.mark.parametrize("source", ["online", "store"])
def test_standardised_hints_have_mean_zero_and_deviation_one(tiny, store, feed, standardise, source):
    changes = {"features": store} if source == "store" else {}
    method = built(tiny, classes=10, hint_grid=2, standardise=standardise, **changes)
    method.prepare(feed.sweep(256, torch.device("cpu")))
    codes = {}
    for choice, t in enumerate(CHOICES):
        found = []
        for shown in feed.sweep(256, torch.device("cpu")):
            chosen = torch.full_like(shown.index, choice)
            found.append(method.codes(shown, chosen, None, [0])[0])
        codes[t] = torch.cat(found).double()
    groups = codes.values() if standardise == "per_timestep" else [torch.cat(list(codes.values()))]
    for group in groups:
        torch.testing.assert_close(group.mean((0, 2, 3)), torch.zeros(8).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(group.std((0, 2, 3), correction=0), torch.ones(8).double(), rtol=1e-4, atol=0)
    if standardise == "joint":  # jointly, single timesteps keep what sets them apart
        assert max(float(c.mean((0, 2, 3)).abs().max()) for c in codes.values()) > 0.05


@pytest.mark.parametrize("standardise", ["none", "joint", "per_timestep"])
def test_a_store_and_the_teacher_itself_teach_the_same(tiny, store, feed, standardise):
    parts, means = [], []
    for changes in ({}, {"features": store}):
        method = built(tiny, classes=10, hint_grid=2, standardise=standardise, **changes)
        method.prepare(feed.sweep(256, torch.device("cpu")))
        means.append((method.comparisons[0].mean, method.comparisons[0].std))
        shown = feed.batch(3, list(range(32)), torch.device("cpu"))
        parts.append(method(shown, rows(32), 0.0))
        assert method.frozen_multiply_adds() == (0 if changes else method.teacher.network.multiply_adds("mid"))
    for a, b in zip(*means, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert parts[0].keys() == parts[1].keys()
    for name in parts[0]:
        torch.testing.assert_close(parts[0][name], parts[1][name], rtol=1e-4, atol=1e-5)


def test_the_same_blocks_give_the_same_bits(tiny, store, feed):
    online, replayed = built(tiny, classes=10, hint_grid=2), built(tiny, classes=10, hint_grid=2, features=store)
    for shown in feed.sweep(256, torch.device("cpu")):
        for t in CHOICES:
            at = torch.full_like(shown.index, t)
            assert torch.equal(*(m.teacher.hints(shown, at, ["mid"])["mid"] for m in (online, replayed)))


def test_a_store_of_something_else_is_refused(tiny, store, digits):
    method = built(tiny, classes=10, hint_grid=2, features=store)
    method.check_data(digits.fingerprint, "none", len(digits))
    for data, words in (((digits.fingerprint, "flip"), "other augment"), (("f00", "none"), "other images")):
        with pytest.raises(UserError, match=words):
            method.check_data(*data, len(digits))
    for wrong in ({"hint_grid": 1}, {"timestep": policy((0, 7))}):
        with pytest.raises(UserError, match=r"not on a 1x1 grid|has no timestep 7"):
            built(tiny, classes=10, features=store, **{"hint_grid": 2, **wrong})


def test_many_timesteps_are_standardised_from_a_few(tiny, feed):
    method = built(tiny, policy(tuple(range(1000))), classes=10, standardise="joint")
    asked = set()
    method.teacher.network.module.register_forward_pre_hook(lambda _m, args: asked.update(args[1].tolist()))
    method.prepare(feed.sweep(256, torch.device("cpu"), 64))
    assert len(asked) == 16 and {0, 999} <= asked


# Policies


OFFICIAL = ("PolicyNet", "PolicyNet_Cov", "PolicyNet_Cov64")


@pytest.mark.golden(of=lambda case: str(case.meta.get("module", "")).startswith("PolicyNet"))
def test_golden_policy_networks(golden_case):
    """The official networks' weights load strictly; ours works on logits and takes images in [0, 1]."""
    module = golden_case.meta["module"]
    if module not in OFFICIAL:
        pytest.skip(f"policy network {module} is not in this release")
    x = golden_case.get("inputs/x").float()
    kind = "mlp" if module == "PolicyNet" else "conv"
    network = policy_network(kind, golden_case.meta["config"]["action_num"], x.shape[-1])
    network.load_state_dict({n: w.float() for n, w in golden_case.under("weights/").items()})
    with torch.no_grad():
        found = network(x / 2 + 0.5).softmax(1)
    torch.testing.assert_close(found, golden_case.get("outputs/probs"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, size", [("small", 8), ("small", 37), ("mlp", 8), ("conv", 32), ("conv", 64)])
def test_policies_give_a_logit_for_every_choice(kind, size):
    network = policy_network(kind, 7, size)
    logits = network(torch.rand(3, 3, size, size))
    assert logits.shape == (3, 7)
    if kind == "small":
        assert float(logits.detach().abs().max()) == 0  # the first proposal is uniform


def test_the_official_policy_refuses_other_sizes():
    with pytest.raises(UserError, match="made for 32 or 64 pixels, not 8; use 'small'"):
        policy_network("conv", 3, 8)


# Settings, and what is left behind


@pytest.mark.parametrize(
    "settings_, words",
    [
        ({"select": "fixed", "values": (1, 2)}, "takes one value, not 2"),
        ({"select": "range", "values": (9, 5)}, "low < high"),
        ({"select": "list", "values": ()}, "needs the timesteps"),
        ({"select": "policy", "values": (3, 3)}, "named twice"),
        ({"select": "policy", "values": (3, -1)}, "timesteps are in 0..99999"),
        ({"select": "best", "values": (3,)}, "'list', 'policy' or 'probed'"),
        ({"values": (3,), "entropy_until": 0}, "greater than 0"),
    ],
)
def test_timestep_settings_that_cannot_work_are_refused(settings_, words):
    with pytest.raises(ValidationError, match=words):
        TimestepConfig(**settings_)


def test_settings_that_contradict_each_other_are_refused(tiny):
    with pytest.raises(ValidationError, match="takes at most 64 timesteps; use 'joint'"):
        config(tiny, policy(tuple(range(65))), standardise="per_timestep")
    with pytest.raises(ValidationError, match="holds clean-image hints"):
        config(tiny, features="somewhere", noise="forward")
    with pytest.raises(UserError, match=r"method.timestep: 1000 is outside 0..999"):
        built(tiny, policy((0, 1000)))


def test_forward_noise_shows_the_teacher_a_noised_image(tiny):
    clean, noised = built(tiny), built(tiny, noise="forward")
    seen = []
    for method in (clean, noised):
        method.teacher.network.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        method(batch(), rows(), 0.0)
    torch.testing.assert_close(seen[0], batch().images * 2 - 1)
    assert float((seen[1] - seen[0]).abs().max()) > 0.1


def test_what_is_kept_is_the_student_and_where_it_comes_from(factory, tiny_denoiser, tmp_path):
    teacher = DiffusionTeacher(tiny_denoiser(), "my teacher", 8, licence="CC-BY-NC-4.0")
    method = built(factory(lambda: teacher))
    assert method.licence == "Apache-2.0 (weights trained here); distilled from my teacher (CC-BY-NC-4.0)"
    assert method.export(tmp_path) == {"teacher": "my teacher", "tap": "mid", "timesteps": list(CHOICES)}
    kept = load_file(tmp_path / "weights.safetensors")
    assert kept.keys() == method.student.backbone.state_dict().keys()


def test_a_dry_step_reaches_everything_that_is_trained(tiny):
    method = built(tiny)
    method.dry_step(torch.rand(2, 3, 8, 8))
    assert all(p.grad is not None for p in method.parameters())


def test_labels_that_the_teacher_has_seen_travel_with_the_student(tiny, tiny_denoiser, factory):
    def taught():
        return DiffusionTeacher(tiny_denoiser(), "conditional", 8, labels_seen={"diffusion model": 1078})

    method = built(factory(taught, "taught"))
    assert method.labels_behind == {"teacher: diffusion model": 1078} and built(tiny).labels_behind == {}


# Other choices, other rewards


def test_the_end_of_a_range_falls_to_where_it_is_told():
    """The official hook: 1000 at the beginning, 50 at epoch 100 of 200, linear, whole numbers."""
    falling = TimestepConfig(select="range", values=(0, 1000), decay_to=50, decay_until=0.5)
    ends = {progress: falling.open_choices(progress) for progress in (0.0, 0.25, 0.5, 1.0)}
    assert ends == {0.0: 1000, 0.25: 525, 0.5: 50, 1.0: 50}
    with pytest.raises(ValueError, match=r"decay_to 1000 is not between 0 and 1000"):
        TimestepConfig(select="range", values=(0, 1000), decay_to=1000)
    with pytest.raises(ValueError, match="select 'list' has none"):
        TimestepConfig(select="list", values=(0, 10), decay_to=5)


def test_a_falling_range_is_drawn_from(tiny):
    method = built(tiny, TimestepConfig(select="range", values=(5, 105), decay_to=8, decay_until=0.5))
    many = torch.zeros(500, 3, 8, 8)
    early, late = (method.timesteps[method.choose(many, rows(500), p, [0])[0]] for p in (0.0, 1.0))
    assert set(late.tolist()) == {5, 6, 7} and int(early.max()) > 90


def left_out(code, goal, penalty):
    """By definition: for each image a ridge fit with intercept on all others."""
    found = []
    for i in range(len(code)):
        rest = torch.arange(len(code)) != i
        z, y = code[rest].double(), goal[rest].double()
        mz, my = z.mean(0), y.mean(0)
        weights = torch.linalg.solve(
            (z - mz).T @ (z - mz) + penalty * torch.eye(z.shape[1]).double(), (z - mz).T @ (y - my)
        )
        found.append((goal[i].double() - (code[i].double() - mz) @ weights - my).square().mean())
    return -torch.stack(found)


def test_least_squares_leaves_each_image_out():
    """The closed form is exact."""
    g = torch.Generator().manual_seed(0)
    code, goal = (torch.randn(40, d, generator=g, dtype=torch.float64) for d in (6, 3))
    centred = code - code.mean(0)
    penalty = float(rewards.RIDGE * (centred @ centred.T).diagonal().mean())
    torch.testing.assert_close(rewards.least_squares(code, goal), left_out(code, goal, penalty), rtol=1e-7, atol=1e-9)


def test_a_code_that_tells_the_goal_is_worth_more():
    g = torch.Generator().manual_seed(1)
    goal = F.one_hot(torch.arange(24) % 3, 3).float()
    telling, noise = goal @ torch.randn(3, 8, generator=g), torch.randn(24, 8, generator=g)
    assert float(rewards.least_squares(telling, goal).min()) > float(rewards.least_squares(noise, goal).mean())
    assert rewards.least_squares(telling[:2], goal[:2]).tolist() == [0, 0]
    same, other = rewards.common(telling + noise, telling + noise), rewards.common(noise, noise.roll(1, 0))
    assert float(same.mean()) > float(other.mean()) and float(same.max()) <= 0


@pytest.mark.parametrize("reward", ["task", "least_squares", "student", "common"])
@pytest.mark.parametrize("baseline", ["running_mean", "none", "self_critical"])
def test_every_reward_moves_the_policy_and_nothing_else(tiny, reward, baseline):
    method = built(tiny, policy(reward=reward, baseline=baseline))
    nn.init.normal_(method.policy.fc.weight)
    parts = method(batch(), rows(), 0.0)
    assert reached(method, parts["policy_loss"]) == {"policy"}
    assert reached(method, parts["kd_loss"]) == {"student", "projector"}
    assert ("task_loss" in parts) == ("task_head" in method.parameter_groups()) == (reward == "task")
    readers = {"task": 2, "least_squares": 1}.get(reward, 0)
    assert len(method.config.label_readers()) == readers
    method.after_step()
    assert torch.isfinite(method.running_reward)


@pytest.mark.parametrize("reward", ["least_squares", "student", "common"])
def test_rewards_without_labels_do_not_look_at_them(tiny, reward):
    method = built(tiny, policy(reward=reward))
    nn.init.normal_(method.policy.fc.weight)
    losses_ = [
        method(batch(labels), rows(), 0.0)["policy_loss"] for labels in ((0, 0, 1, 1, -1, -1), (0, 1, 0, 1, -1, -1))
    ]
    assert torch.equal(*losses_) == (reward != "least_squares")


def test_self_critical_is_the_reward_of_the_best_choice(tiny):
    """An image whose draw is the policy's favourite learns nothing from it."""
    method = built(tiny, policy(baseline="self_critical"))
    method.policy.fc.bias.data = torch.tensor([0.0, 60.0, 0.0])  # it always draws its favourite
    parts = method(batch(), rows(), 0.0)
    assert float(parts["policy_loss"].detach().abs()) < 1e-6


def test_the_common_reward_needs_the_teacher_itself(tiny):
    with pytest.raises(ValueError, match="features does not hold them"):
        config(tiny, policy(reward="common"), features="somewhere")


# Other comparisons


@pytest.mark.parametrize("grid", [1, 2, None])
@pytest.mark.parametrize("loss", ["l2", "l1", "l2_norm", "cosine", "at", "rkd", "info_nce"])
def test_every_loss_reaches_student_and_projector(tiny, loss, grid):
    if loss == "at" and grid is not None:
        with pytest.raises(ValueError, match="compares whole maps as they are: hint_grid null"):
            config(tiny, loss=loss, hint_grid=grid)
        return
    method = built(tiny, loss=loss, hint_grid=grid)
    parts = method(batch(), rows(), 0.0)
    with_projector = {"student", "projector"} if FEATURE_LOSSES[loss].needs_projector else {"student"}
    assert reached(method, parts["kd_loss"]) == with_projector
    named = {PARTS.get(n.split(".")[0], n.split(".")[0]) for n, _ in method.named_parameters()}
    assert named == with_projector | {"policy", "task_head"}


@pytest.mark.parametrize(("loss", "distance"), [("l2", F.mse_loss), ("l1", F.l1_loss)])
def test_the_dense_hint_is_on_the_teachers_own_grid(tiny, loss, distance):
    """By hand: 1x1 projection, then bilinear onto the teacher's map where the sizes differ."""
    method = built(tiny, TimestepConfig(select="fixed", values=(7,)), loss=loss, hint_grid=None)
    shown = batch()
    code = method.teacher.network.features(shown.images, 7, ["mid"])["mid"]
    student = F.conv2d(method.student.feature_map(shown.images), *projection(method))
    expected = distance(F.interpolate(student, code.shape[-2:], mode="bilinear", align_corners=False), code)
    torch.testing.assert_close(method(shown, rows(), 0.0)["kd_loss"], expected)


def test_a_projector_that_sees_neighbours(tiny):
    method = built(tiny, hint_grid=None, projector="conv")
    projector = method.comparisons[0].projector
    assert projector[0].weight.shape[-2:] == (3, 3)
    assert reached(method, method(batch(), rows(), 0.0)["kd_loss"]) == {"student", "projector"}
    places = projector(method.student.feature_map(batch().images)).flatten(2)  # every map: mean 0, deviation 1
    torch.testing.assert_close(places.mean(2), torch.zeros(6, 8), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs whole maps, hint_grid null"):
        config(tiny, projector="conv")


def test_relations_need_three_images(tiny):
    with pytest.raises(UserError, match="compares images in threes"):
        built(tiny, loss="rkd")(batch((0, 1)), rows(2), 0.0)


def test_whole_maps_are_counted_and_standardised(tiny):
    method = built(tiny, TimestepConfig(select="list", values=CHOICES), hint_grid=None, standardise="per_timestep")
    method.prepare([batch(), batch(seed=1)])
    codes = [method.codes(batch(seed=s), torch.full((6,), 1), rows(), [0])[0] for s in (0, 1)]
    flat = torch.cat(codes).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(len(flat)), rtol=1e-4, atol=1e-4)
    method.dry_step(torch.rand(2, 3, 8, 8))


# Several pairs of taps

OUTER = PairConfig(tap="down", student_tap="layer1", weight=3.0)


def test_several_pairs_are_their_weighted_mean_from_one_pass(tiny):
    fixed = TimestepConfig(select="fixed", values=(7,))
    method = built(tiny, fixed, more_pairs=(OUTER,), hint_grid=2)
    calls = []
    method.teacher.network.module.register_forward_pre_hook(lambda *_: calls.append(1))
    total = method(batch(), rows(), 0.0)["kd_loss"]
    assert len(calls) == 1
    each = []
    for pair, comparison in zip(method.pairs, method.comparisons, strict=True):
        code = method.teacher.network.features(batch().images, 7, [pair.tap])[pair.tap]
        student = method.student.feature_maps(batch().images, [pair.student_tap])[0]
        mapped = F.conv2d(student, comparison.projector.weight, comparison.projector.bias)
        each.append(F.mse_loss(*(F.adaptive_avg_pool2d(x, 2) for x in (mapped, code))))
    torch.testing.assert_close(total, (each[0] + 3 * each[1]) / 4, rtol=1e-4, atol=1e-6)
    assert method.uses_all_parameters
    assert reached(method, total) == {"student", "projector"}


def test_several_pairs_are_standardised_each_by_itself(tiny):
    method = built(tiny, TimestepConfig(select="list", values=CHOICES), more_pairs=(OUTER,), hint_grid=2,
                   standardise="per_timestep")  # fmt: skip
    method.prepare([batch(), batch(seed=1)])
    for k in (0, 1):
        code = torch.cat([method.codes(batch(seed=s), torch.full((6,), 1), rows(), [0, 1])[k] for s in (0, 1)])
        torch.testing.assert_close(code.mean((0, 2, 3)), torch.zeros(code.shape[1]), rtol=0, atol=1e-4)


def test_ranges_are_bound_to_pairs(tiny):
    """Each step draws one pair; its timesteps lie in its own range, and only its projector is trained."""
    ranges = TimestepConfig(select="ranges", values=(0, 10, 1000))
    with pytest.raises(ValueError, match="leave the weights"):
        config(tiny, ranges, more_pairs=(OUTER,))
    method = built(tiny, ranges, more_pairs=(OUTER.model_copy(update={"weight": 1.0}),))
    seen = set()
    for step in range(12):
        pair = method.active_pairs(rows(step=step))[0]
        parts = method(batch(), rows(step=step), 0.0)
        low, high = ((0, 10), (10, 1000))[pair]
        assert low <= float(parts["mean_timestep"]) < high
        method.zero_grad()
        parts["loss"].backward()
        trained = [c.projector.weight.grad is not None for c in method.comparisons]
        assert trained == [pair == 0, pair == 1]
        seen.add(pair)
    assert seen == {0, 1} and not method.uses_all_parameters
    with pytest.raises(ValueError, match="bound 2 ranges, and there are 1 tap pairs"):
        config(tiny, ranges)
    with pytest.raises(ValueError, match="rising bounds"):
        TimestepConfig(select="ranges", values=(0, 50, 20))


def test_an_unknown_tap_of_a_further_pair_is_refused(tiny):
    for pair, words in (({"tap": "dwon"}, "tap 'dwon'.*down"), ({"tap": "down", "student_tap": "layer9"}, "layer9")):
        with pytest.raises(UserError, match=words):
            built(tiny, more_pairs=(PairConfig(**pair),))


# Contrast with a memory


def test_crd_pulls_partners_together_and_remembers(tiny):
    fixed = TimestepConfig(select="fixed", values=(7,))
    method = built(tiny, fixed, loss="crd", negatives=5)
    method.check_data("", "none", 30)
    memory = method.comparisons[0].memory
    before = memory.memory_s.clone()
    assert {"comparisons"} < {n.split(".")[0] for n, _ in method.named_parameters()}
    first = method(batch(), rows(), 0.0)["kd_loss"].item()
    method.after_step()
    moved = (memory.memory_s != before).any(1)
    assert moved.tolist() == [k in batch().index.tolist() for k in range(30)]
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    for step in range(1, 40):
        optimizer.zero_grad()
        method(batch(), rows(step=step), 0.0)["loss"].backward()
        optimizer.step()
        method.after_step()
    assert method(batch(), rows(step=99), 0.0)["kd_loss"].item() < first - 1
    with pytest.raises(ValueError, match="remembers a vector"):
        config(tiny, loss="crd", hint_grid=None)


# A timestep that a probe found


def test_the_timestep_of_a_probe_is_taken(tiny, tmp_path):
    timestep = TimestepConfig(select="probed", probe=str(tmp_path))
    with pytest.raises(UserError, match="no finished probe"):
        built(tiny, timestep)
    own = built(tiny, policy()).teacher.sha256
    found = {"kind": "probe", "best": {"tap": "mid", "timestep": 700}, "labels_seen": {"probe": 30}, "noise": None}
    write_json(tmp_path / "result.json", found | {"teacher_sha256": own})
    method = built(tiny, timestep)
    assert method.timesteps.tolist() == [700] and method.config.timestep.select == "fixed"
    assert method.labels_behind == {"probe": 30}  # they chose, so they count
    with pytest.raises(UserError, match="found 'mid', and"):
        built(tiny, timestep, tap="down")
    with pytest.raises(UserError, match="looked with noise none"):
        built(tiny, timestep, noise="forward")
    write_json(tmp_path / "result.json", found | {"teacher_sha256": "f00"})
    with pytest.raises(UserError, match="another network"):
        built(tiny, timestep)
    for wrong in ({"select": "probed"}, {"select": "fixed", "values": (1,), "probe": "x"}):
        with pytest.raises(ValueError, match="takes probe"):
            TimestepConfig(**wrong)


def test_a_student_that_begins_with_whitening_sees_the_images(factory, tiny_denoiser):
    reference = factory(lambda: tiny_denoiser(image_size=32))
    student = StudentConfig(name="fast_cnn", options={"widths": [8, 8, 8]})
    once = TimestepConfig(select="fixed", values=(7,))
    method = RepFusion(config(reference, once, student=student), 4, 32, allow_code=True)
    before = [p.clone() for p in method.student.parameters()]
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method.prepare([Batch(images, None, torch.arange(64), None)])
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))
