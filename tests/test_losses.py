"""Losses against numbers of the official code and against enumeration: pytest tests/test_losses.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrep import losses

POLICY, CRD = "policy gradient and entropy terms", "CRD with memory bank"


def hint(case, student, teacher):
    """The sum of weighted distances that a golden hint names."""
    terms = case.meta["config"]["distill_fn"]
    return sum(w * losses.FEATURE_LOSSES[name].function(student, teacher).mean() for name, w in terms)


def dense_hint(case, x):
    return hint(case, losses.resized(F.conv2d(x["s"], x["w"], x["b"]), x["t"]), x["t"])


def pooled_hint(case, x):
    """Ours pools before the projector, the official code after it: the same loss and the same gradients."""
    return hint(case, F.conv2d(losses.pooled(x["s"], 1), x["w"], x["b"]), losses.pooled(x["t"], 1))


# How "loss" begins in a case's metadata -> the loss of (case, inputs). The first that fits counts.
GOLDEN = {
    "pooled hint": pooled_hint,
    "dense hint": dense_hint,
    "hint as in kd.py": lambda case, x: losses.feature_mse(F.linear(x["t"], x["w"], x["b"]), x["s"]).mean(),
    "attention transfer": lambda case, x: losses.attention_transfer(x["s"], x["t"], case.meta["config"]["p"]).mean(),
    "normalised L2": lambda case, x: losses.feature_mse_of_units(x["s"], x["t"]).mean(),
    "cosine": lambda case, x: losses.feature_cosine(x["s"], x["t"]).mean(),
    "RKD distance": lambda case, x: losses.rkd_distance(x["s"], x["t"]),
    "RKD angle": lambda case, x: losses.rkd_angle(x["s"], x["t"]),
    "RKD ": lambda case, x: losses.rkd(x["s"], x["t"], *(case.meta["config"][k] for k in ("w_dist", "w_angle"))),
    "InfoNCE": lambda case, x: losses.info_nce(x["q"], x["k"], case.meta["config"]["temperature"]).mean(),
    "soft-target KL": lambda case, x: losses.kd_kl(x["s"], x["t"], case.meta["config"]["temperature"]).mean(),
    "logit L2": lambda case, x: losses.logit_mse(x["s"], x["t"]).mean(),
}


def golden_loss(case):
    """The function of GOLDEN for a case, or None."""
    name = str(case.meta.get("loss", ""))
    return next((function for start, function in GOLDEN.items() if name.startswith(start)), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.golden(of=golden_loss)
def test_golden_value_and_gradient(golden_case, dtype):
    """Also where the official float32 code is wrong (cosine's sign, RKD's offsets and equal rows): exact_* is right."""
    x = {name: value.to(dtype) for name, value in golden_case.under("inputs/").items()}
    expected = golden_case.under("outputs/exact_grad/")
    assert expected
    for name in expected:
        x[name].requires_grad_()
    loss = golden_loss(golden_case)(golden_case, x)
    loss.backward()
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(float(golden_case.get("outputs/exact_loss")), rel=rtol, abs=1e-12)
    for name, grad in expected.items():
        largest = float(grad.abs().max())
        torch.testing.assert_close(x[name].grad.double(), grad, rtol=rtol, atol=rtol * largest + 1e-15)


@pytest.mark.golden(of=lambda case: case.meta.get("loss") == POLICY)
def test_golden_reinforce_of_the_official_single_sample(golden_case):
    x, weight = golden_case.under("inputs/"), golden_case.meta["config"]["entropy_reg"]
    logits = x["logits"].clone().requires_grad_()
    cost = x["cross_entropy_table"].gather(1, x["actions"][:, None])[:, 0]
    policy_loss = losses.reinforce(logits, x["actions"], -cost).mean()
    entropy_loss = -weight * losses.entropy(logits).mean()
    for loss, kind in ((policy_loss, "policy"), (entropy_loss, "entropy")):
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(
            loss.detach(), golden_case.get(f"outputs/official_loss_{kind}"), rtol=1e-5, atol=1e-6
        )
        official = golden_case.get(f"outputs/official_grad_{kind}_logits")
        torch.testing.assert_close(grad, official, rtol=1e-5, atol=1e-6)


def single_sample_gradients(logits, cost, baseline):
    """Gradient of the estimator for every action of every image, (A, B, A), and its probability, (A, B)."""
    grads = []
    for a in range(logits.shape[1]):
        leaf = logits.clone().requires_grad_()
        action = torch.full((len(logits),), a)
        losses.reinforce(leaf, action, -cost[:, a] - baseline).sum().backward()
        grads.append(leaf.grad)
    return torch.stack(grads), logits.softmax(1).T


def expected_gradient(logits, cost, baseline):
    grads, probs = single_sample_gradients(logits, cost, baseline)
    return (probs[..., None] * grads).sum(0)


@pytest.mark.golden(of=lambda case: case.meta.get("loss") == POLICY)
def test_golden_reinforce_expectation_by_enumeration(golden_case):
    """What the estimator gives on average over all actions is the exact gradient, with any constant baseline."""
    x = golden_case.under("inputs/")
    logits, cost = x["logits"].double(), x["cross_entropy_table"].double()
    batch = len(logits)
    exact = golden_case.get("outputs/exact_grad_objective_logits")
    listed = golden_case.get("outputs/exact_expected_estimator_grad_logits")
    objective = (logits.softmax(1) * cost).sum() / batch
    assert float(objective) == pytest.approx(float(golden_case.get("outputs/exact_objective")), rel=1e-9)
    for baseline in (0.0, -3.0, 1e3):
        found = expected_gradient(logits, cost, baseline) / batch
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found, listed, rtol=1e-9, atol=1e-11)


@pytest.mark.golden(of=lambda case: case.meta.get("loss") == POLICY)
def test_golden_reinforce_variance(golden_case):
    """A baseline of the mean reward makes the estimate quieter by exactly as much as the golden file says."""
    x = golden_case.under("inputs/")
    logits, cost = x["logits"].double(), x["cross_entropy_table"].double()
    mean_reward = -(logits.softmax(1) * cost).sum(1)
    found = {}
    for name, baseline in (("no_baseline", 0.0), ("mean_baseline", mean_reward)):
        grads, probs = single_sample_gradients(logits, cost, baseline)
        mean = (probs[..., None] * grads).sum(0)
        variance = (probs[..., None] * (grads - mean).square()).sum((0, 2)).mean()
        found[name] = float(variance)
        assert found[name] == pytest.approx(float(golden_case.get(f"outputs/exact_variance_{name}")), rel=1e-9)
    assert found["mean_baseline"] < found["no_baseline"]


def _read_elsewhere(case):
    meta = case.meta
    classifiers = ("arch" in meta and "fill_seed" in meta) or {"outputs/normal", "outputs/uniform"} <= case.keys
    distilled = "temps" in meta or {"teacher", "student", "T"} <= meta.keys()
    tables = case.outputs_named("timestep_map") or case.outputs_named("pmv_mean")
    policies = meta.get("loss") == POLICY or str(meta.get("module", "")).startswith("PolicyNet")
    loss = golden_loss(case) or meta.get("loss") == CRD  # CRD: tests/test_feature_losses.py
    return loss or policies or classifiers or distilled or tables


@pytest.mark.golden(of=lambda case: not _read_elsewhere(case))
def test_golden_models_of_later_releases(golden_case):
    """Keeps count of the rest of the golden folder, so that nothing in it is passed over without a word."""
    meta = golden_case.meta
    kind = next((str(meta[k]) for k in ("module", "kind", "arch", "call") if k in meta), f"settings {sorted(meta)[:4]}")
    pytest.skip(f"{golden_case.file.name}: '{kind[:60]}' is not in this release")


# Without golden files


def test_reinforce_is_exact_on_average_without_golden_files():
    torch.manual_seed(0)
    logits, cost = torch.randn(4, 7).double(), torch.rand(4, 7).double() * 3
    probs = logits.softmax(1)
    exact = probs * (cost - (probs * cost).sum(1, keepdim=True))  # specification, section 9
    for baseline in (0.0, -1.7, torch.randn(4).double()):
        torch.testing.assert_close(expected_gradient(logits, cost, baseline), exact, rtol=1e-10, atol=1e-12)


def test_reinforce_keeps_gradients_out_of_the_advantage():
    logits, reward = torch.zeros(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    losses.reinforce(logits, torch.tensor([0, 2]), reward).sum().backward()
    assert reward.grad is None
    torch.testing.assert_close(logits.grad[0], torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


@given(st.integers(1, 6), st.integers(2, 9), st.floats(0.1, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_entropy_gradient_identity(batch, actions, scale, seed):
    """dH/dlogits = -p (ln p + H), also where a probability is next to nothing."""
    logits = torch.randn(batch, actions, generator=torch.Generator().manual_seed(seed)).double() * scale
    leaf = logits.clone().requires_grad_()
    entropy = losses.entropy(leaf)
    entropy.sum().backward()
    log_probs = logits.log_softmax(1)
    expected = -log_probs.exp() * (log_probs + entropy.detach()[:, None])
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)
    assert bool((entropy >= -1e-12).all()) and bool((entropy <= math.log(actions) + 1e-12).all())


def test_entropy_of_a_uniform_policy_is_the_log_of_its_choices():
    torch.testing.assert_close(losses.entropy(torch.full((2, 1000), 3.0)), torch.full((2,), math.log(1000)))


def two_armed_bandit(cost, entropy_weight, start, steps=300):
    """Plain SGD of 0.5 and batches of 32, as in the specification's section 9; the probabilities at the end."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor(start, requires_grad=True)
    for _ in range(steps):
        shown = logits.expand(32, -1)
        action = torch.multinomial(shown.detach().softmax(1), 1, generator=rng)[:, 0]
        loss = losses.reinforce(shown, action, -cost[action]).mean() - entropy_weight * losses.entropy(shown).mean()
        (grad,) = torch.autograd.grad(loss, logits)
        logits.data -= 0.5 * grad
    return logits.detach().softmax(0)


def test_bandit_moves_to_the_cheap_arm():
    probs = two_armed_bandit(torch.tensor([0.0, 1.0]), 0.0, [0.0, 0.0])
    assert float(probs[0]) == pytest.approx(0.996, abs=0.004)


def test_bandit_moves_away_from_the_arm_it_begins_with():
    assert float(two_armed_bandit(torch.tensor([1.0, 0.0]), 0.0, [2.0, 0.0])[1]) > 0.95


def test_bandit_with_entropy_alone_becomes_uniform():
    probs = two_armed_bandit(torch.tensor([0.0, 0.0]), 1.0, [3.0, -1.0])
    torch.testing.assert_close(probs, torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)


def test_feature_mse_is_per_image_and_zero_for_equal_features():
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    found = losses.feature_mse(s, t)
    assert found.tolist() == pytest.approx([float(((s[i] - t[i]) ** 2).mean()) for i in range(3)])
    assert losses.feature_mse(s, s).tolist() == [0, 0, 0]


def test_pooled_hint_is_blind_to_places_and_a_grid_is_not():
    torch.manual_seed(0)
    feature = torch.randn(2, 3, 4, 4)
    moved = feature.flip(2, 3)
    torch.testing.assert_close(losses.pooled(feature, 1), losses.pooled(moved, 1))
    assert losses.pooled(feature, 2).shape == (2, 3, 2, 2)
    assert float((losses.pooled(feature, 2) - losses.pooled(moved, 2)).abs().max()) > 0.1


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=1, max_size=12), st.integers(1, 11))
def test_mean_over_adds_up_over_micro_batches(rows, cut):
    """Split anywhere and weighted by size, as the trainer does, the parts make the whole."""
    values = torch.tensor([v for v, _ in rows], dtype=torch.float64)
    chosen = torch.tensor([c for _, c in rows])
    whole = float(losses.mean_over(values, chosen))
    assert whole == pytest.approx(sum(v for v, c in rows if c) / len(rows), abs=1e-9)
    parts = [(values[:cut], chosen[:cut]), (values[cut:], chosen[cut:])]
    added = sum(float(losses.mean_over(v, c)) * len(v) / len(rows) for v, c in parts)
    assert added == pytest.approx(whole, abs=1e-9)


def test_mean_over_lets_no_gradient_to_what_is_not_chosen():
    values = torch.tensor([1.0, float("inf"), 3.0], requires_grad=True)
    total = losses.mean_over(values, torch.tensor([True, False, True]))
    total.backward()
    assert float(total.detach()) == pytest.approx(4 / 3)
    assert values.grad.tolist() == pytest.approx([1 / 3, 0, 1 / 3])
