"""Distances of features: invariances, limits, memory, and CRD against the official code.

pytest tests/test_feature_losses.py; values and gradients of the golden files are in tests/test_losses.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffrep import losses
from diffrep.errors import UserError
from diffrep.losses import FEATURE_LOSSES
from diffrep.models.contrast import ContrastiveMemory, contrast_table, nce
from diffrep.randomness import Rows, stream

seeds = st.integers(0, 10_000)
RELATIONAL = (losses.rkd_distance, losses.rkd_angle, losses.rkd)


def drawn(seed, *shapes, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=rng, dtype=dtype) for shape in shapes]


def gradient(function, student, *others):
    leaf = student.clone().requires_grad_()
    loss = function(leaf, *others).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def close(found, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# What the table says of each


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_each_is_least_at_the_teacher(name):
    student, teacher = drawn(1, (4, 6, 3, 3), (4, 6, 3, 3))
    function = FEATURE_LOSSES[name].function
    at_teacher, grad = gradient(function, teacher, teacher)
    assert float(at_teacher) < float(function(student, teacher).sum())
    if name != "info_nce":
        assert float(at_teacher) == pytest.approx(0, abs=1e-12) and float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_a_step_down_the_gradient_brings_the_student_closer(name):
    student, teacher = drawn(2, (5, 6, 3, 3), (5, 6, 3, 3))
    before, grad = gradient(FEATURE_LOSSES[name].function, student, teacher)
    step = 1e-3 * student.norm() / grad.norm()
    assert float(FEATURE_LOSSES[name].function(student - step * grad, teacher).sum()) < float(before)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_those_without_a_projector_compare_any_widths(name):
    student, teacher = drawn(3, (4, 5, 3, 3), (4, 8, 3, 3))
    if FEATURE_LOSSES[name].needs_projector:
        with pytest.raises(RuntimeError):
            FEATURE_LOSSES[name].function(student, teacher)
    else:
        assert float(FEATURE_LOSSES[name].function(student, teacher).sum()) > 0


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_pooled_maps_teach_where_the_table_says_so(name):
    student, teacher = drawn(4, (4, 6, 1, 1), (4, 6, 1, 1))
    loss, grad = gradient(FEATURE_LOSSES[name].function, student, teacher)
    assert (float(loss) > 1e-3 and float(grad.abs().max()) > 1e-3) == FEATURE_LOSSES[name].pools


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_vectors_and_maps_of_one_place_are_the_same_to_all_that_pool(name):
    student, teacher = drawn(5, (4, 6), (4, 6))
    if FEATURE_LOSSES[name].pools:
        function = FEATURE_LOSSES[name].function
        close(function(student, teacher), function(student[..., None, None], teacher[..., None, None]))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_per_image_or_over_the_batch(name):
    """(B,) where images are judged one by one: then half a batch gives half of the values (InfoNCE looks across)."""
    student, teacher = drawn(6, (6, 4, 3, 3), (6, 4, 3, 3))
    function = FEATURE_LOSSES[name].function
    found = function(student, teacher)
    assert found.shape == (() if name == "rkd" else (6,))
    if name not in ("rkd", "info_nce"):
        close(function(student[3:], teacher[3:]), found[3:])


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_autocast_and_half_inputs_cost_no_more_than_the_inputs_digits(name):
    student, teacher = (x.bfloat16() for x in drawn(7, (5, 8, 4, 4), (5, 8, 4, 4)))
    if name in ("l2", "l1"):  # plain differences, in whatever type the projector speaks
        teacher = teacher.float()
    expected = FEATURE_LOSSES[name].function(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = FEATURE_LOSSES[name].function(student, teacher)
    close(found, expected, rtol=1e-5, atol=1e-7)


# Image by image


@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_cosine_and_l2_of_units_are_blind_to_positive_scale(seed, a, b):
    student, teacher = drawn(seed, (3, 5, 2, 2), (3, 5, 2, 2))
    for function in (losses.feature_cosine, losses.feature_mse_of_units):
        close(function(a * student, b * teacher), function(student, teacher))


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_l2_of_units_is_the_cosine_over_half_the_width(seed):
    student, teacher = drawn(seed, (3, 7), (3, 7))
    expected = 2 * losses.feature_cosine(student, teacher) / 7
    close(losses.feature_mse_of_units(student, teacher), expected)
    close(losses.feature_cosine(student, teacher), 1 - F.cosine_similarity(student, teacher))


def test_cosine_pulls_together():
    """The official option pushes apart: its gradient has the other sign."""
    (student, teacher) = drawn(8, (4, 6), (4, 6))
    for _ in range(200):
        student = student - gradient(losses.feature_cosine, student, teacher)[1]
    assert float(F.cosine_similarity(student, teacher).min()) > 0.99
    assert losses.feature_cosine(-teacher, teacher).tolist() == pytest.approx([2] * 4)


@pytest.mark.parametrize("function", [losses.feature_cosine, losses.feature_mse_of_units, losses.info_nce, losses.rkd])
def test_zero_vectors_have_a_finite_gradient(function):
    student, teacher = drawn(9, (4, 5), (4, 5), dtype=torch.float32)
    student[1] = 0
    loss, grad = gradient(function, student, teacher)
    assert bool(loss.isfinite()) and float(grad.abs().max()) < 1e3


def test_l1_is_the_mean_absolute_difference():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert losses.feature_l1(student, torch.tensor([[0.0, 4.0], [0.0, -1.0]])).tolist() == [1.5, 0.5]


def test_dense_distances_see_places():
    student, teacher = drawn(10, (2, 3, 4, 4), (2, 3, 4, 4))
    moved = student.flip(2, 3)
    close(losses.feature_mse(*(losses.pooled(x, 1) for x in (moved, teacher))).sum(),
          losses.feature_mse(*(losses.pooled(x, 1) for x in (student, teacher))).sum())  # fmt: skip
    for function in (losses.feature_mse, losses.feature_l1, losses.feature_cosine, losses.feature_mse_of_units):
        assert float((function(moved, teacher) - function(student, teacher)).abs().max()) > 1e-3


def test_resized_keeps_a_map_of_the_right_size():
    (student,) = drawn(11, (2, 3, 5, 4))
    assert torch.equal(losses.resized(student, torch.empty(1, 9, 5, 4)), student)
    assert losses.resized(student, torch.empty(1, 9, 2, 7)).shape == (2, 3, 2, 7)


# Attention transfer


@given(seeds, st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.1, 100))
@settings(max_examples=25, deadline=None)
def test_attention_is_blind_to_sign_scale_order_and_number_of_channels(seed, power, scale):
    student, teacher, sign = drawn(seed, (3, 5, 4, 4), (3, 6, 4, 4), (1, 5, 4, 4))
    expected = losses.attention_transfer(student, teacher, power)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for changed in (student * sign.sign(), student[:, order], student.repeat(1, 3, 1, 1), scale * student):
        close(losses.attention_transfer(changed, teacher, power), expected, rtol=1e-3, atol=1e-6)
    close(losses.attention_transfer(student * sign.sign(), teacher, power), expected)
    close(losses.attention_transfer(student[:, order], teacher, power), expected)


def test_attention_sees_places_and_power():
    student, teacher = drawn(12, (2, 3, 4, 4), (2, 3, 4, 4))
    expected = losses.attention_transfer(student, teacher, 2)
    assert float((losses.attention_transfer(student.flip(2), teacher, 2) - expected).abs().max()) > 1e-4
    assert float((losses.attention_transfer(student, teacher, 1) - expected).abs().max()) > 1e-4


def test_attention_resizes_features_and_not_attention():
    student, teacher = drawn(13, (2, 3, 6, 6), (2, 5, 4, 3))
    smaller = F.interpolate(student, (4, 3), mode="bilinear", align_corners=False)
    close(losses.attention_transfer(student, teacher), losses.attention_transfer(smaller, teacher))


def test_attention_of_nothing_is_finite():
    student = torch.zeros(2, 3, 4, 4)
    loss, grad = gradient(losses.attention_transfer, student, torch.randn(2, 5, 4, 4))
    assert bool(loss.isfinite()) and bool(grad.isfinite().all())


# InfoNCE


@given(seeds, st.floats(0.05, 2), st.floats(1e-2, 1e2))
@settings(max_examples=25, deadline=None)
def test_info_nce_is_blind_to_scale_and_follows_a_common_order(seed, temperature, scale):
    query, key = drawn(seed, (6, 5), (6, 5))
    expected = losses.info_nce(query, key, temperature)
    close(losses.info_nce(scale * query, key, temperature), expected)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    close(losses.info_nce(query[order], key[order], temperature), expected[order])


def test_info_nce_of_equal_keys_is_a_guess_and_of_far_ones_is_nothing():
    (query,) = drawn(14, (5, 3))
    close(losses.info_nce(query, torch.ones_like(query)), torch.full((5,), math.log(5), dtype=torch.float64))
    assert float(losses.info_nce(torch.eye(5), 3 * torch.eye(5), 0.05).max()) < 1e-6
    assert float(losses.info_nce(torch.eye(5), torch.eye(5).roll(1, 0), 0.05).min()) > 19


# Relations


def rkd_by_hand(student, teacher):
    """Distance and angle loss, entry by entry as the formulas stand there."""

    def distance(x):
        d = [[math.dist(a, b) for b in x] for a in x]
        positive = [v for row in d for v in row if v > 0]
        return [v / (sum(positive) / len(positive)) for row in d for v in row]

    def angle(x):
        found = []
        for k in x:
            e = [[(a - b) / (math.dist(i, k) or 1) for a, b in zip(i, k, strict=True)] for i in x]
            found += [sum(a * b for a, b in zip(i, j, strict=True)) for i in e for j in e]
        return found

    def smooth(a, b):
        gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(gaps)

    s, t = student.tolist(), teacher.tolist()
    return smooth(distance(s), distance(t)), smooth(angle(s), angle(t))


@given(seeds, st.integers(3, 7), st.booleans())
@settings(max_examples=25, deadline=None)
def test_rkd_entry_by_entry(seed, batch, twins):
    student, teacher = drawn(seed, (batch, 3), (batch, 4))
    if twins:
        student[2], teacher[1] = student[0], teacher[0]
    distance, angle = rkd_by_hand(student, teacher)
    assert float(losses.rkd_distance(student, teacher)) == pytest.approx(distance, rel=1e-9)
    assert float(losses.rkd_angle(student, teacher)) == pytest.approx(angle, rel=1e-9)
    assert float(losses.rkd(student, teacher)) == pytest.approx(25 * distance + 50 * angle, rel=1e-9)
    assert float(losses.rkd(student, teacher, 1, 2)) == pytest.approx(distance + 2 * angle, rel=1e-9)


@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_rkd_is_blind_to_place_rotation_scale_and_order(seed, scale, shift):
    student, teacher, square = drawn(seed, (6, 5), (6, 4), (5, 5))
    rotation = torch.linalg.qr(square).Q
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for function in RELATIONAL:
        expected = function(student, teacher)
        for changed in (student + shift, student @ rotation, scale * student):
            close(function(changed, teacher), expected, rtol=1e-8)
        close(function(student, scale * teacher + shift), expected, rtol=1e-8)
        close(function(student[order], teacher[order]), expected)


@pytest.mark.parametrize("function", RELATIONAL)
def test_an_offset_costs_no_digits_in_float32(function):
    """All values are multiples of 1/64, so that the shifted ones are exact in float32 as well."""
    student, teacher = ((x * 64).round() / 64 for x in drawn(15, (6, 5), (6, 4), dtype=torch.float32))
    expected = gradient(function, student, teacher)
    for found, wanted in zip(gradient(function, student + 4096, teacher - 4096), expected, strict=True):
        close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", RELATIONAL)
@pytest.mark.parametrize("equal", [2, 6])
def test_equal_rows_have_a_finite_gradient(function, equal):
    student, teacher = drawn(16, (6, 5), (6, 4), dtype=torch.float32)
    student[:equal], teacher[:equal] = student[0].clone(), teacher[0].clone()
    loss, grad = gradient(function, student, teacher)
    assert bool(loss.isfinite()) and bool(grad.isfinite().all()) and float(grad.abs().max()) < 1e3
    others = gradient(function, student, drawn(17, (6, 4), dtype=torch.float32)[0])
    assert all(bool(x.isfinite().all()) for x in others)


@pytest.mark.parametrize("function", RELATIONAL)
@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_than_three_images_are_refused(function, batch):
    with pytest.raises(UserError, match=f"micro-batch of {batch} is too small") as caught:
        function(torch.randn(batch, 4), torch.randn(batch, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", RELATIONAL)
@pytest.mark.parametrize("numbers", [1, 150, 10**9])
def test_stretches_change_nothing(function, numbers, monkeypatch):
    student, teacher = drawn(18, (7, 5), (7, 9))
    expected = gradient(function, student, teacher)
    monkeypatch.setattr(losses, "STRETCH", numbers)
    for found, wanted in zip(gradient(function, student, teacher), expected, strict=True):
        close(found, wanted, rtol=1e-11, atol=1e-14)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned, backward pass included."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, x.untyped_storage().nbytes() // 4 if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("function", RELATIONAL)
def test_memory_is_of_a_table_and_a_stretch(function, monkeypatch):
    """Neither a tensor of B B C or B B B numbers, nor a sum of stretches kept for the backward pass."""
    batch, width, stretch, kept = 96, 160, 2**16, []
    monkeypatch.setattr(losses, "STRETCH", stretch)
    student, teacher = drawn(19, (batch, width), (batch, width), dtype=torch.float32)
    student.requires_grad_()
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(student, teacher).backward()
    assert student.grad is not None and batch**2 <= largest.numbers <= stretch < batch**3 // 10
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4 for x in kept}
    assert sum(storages.values()) <= 16 * batch**2 + 4 * batch * width < batch**3


# CRD


def crd_of(case, dtype):
    meta = case.meta["config"]
    sizes = meta["s_dim"], meta["t_dim"], meta["n_data"], meta["feat_dim"]
    module = ContrastiveMemory(*sizes, temperature=meta["nce_t"], momentum=meta["nce_mom"])
    weights = {name.replace("linear.", ""): value for name, value in case.under("weights/").items()}
    memories = {name: case.get(f"inputs/{name}") for name in ("memory_s", "memory_t")}
    module.load_state_dict(weights | memories | {"z_s": torch.zeros(()), "z_t": torch.zeros(())})
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.golden(of=lambda case: str(case.meta.get("loss", "")).startswith("CRD"))
def test_golden_crd(golden_case, dtype):
    module, rtol = crd_of(golden_case, dtype), 1e-9 if dtype == torch.float64 else 1e-5
    student, teacher = (golden_case.get(f"inputs/feat_{side}").to(dtype) for side in "st")
    student.requires_grad_()
    loss = module(student, teacher, golden_case.get("inputs/sample_idx")).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(golden_case.get("outputs/exact_loss")), rel=rtol)
    grads = {"feat_s": student.grad} | {name: p.grad for name, p in module.named_parameters()}
    for name, official in golden_case.under("outputs/official_grad/").items():
        close(grads[name.replace("linear.", "")].float(), official, rtol=1e-4, atol=1e-5 * float(official.abs().max()))
    module.after_step()
    for side in "st":
        z = golden_case.get(f"outputs/official_Z_{side}")
        assert float(getattr(module, f"z_{side}")) == pytest.approx(float(z), rel=1e-5)
        memory = golden_case.get(f"outputs/official_memory_{side}_after")
        close(getattr(module, f"memory_{side}").float(), memory, rtol=1e-5, atol=1e-6)


def crd(seed=0, num_images=12):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ContrastiveMemory(5, 4, num_images, width=8)


def rows(seed, total, share=None):
    return Rows(stream(seed, "step", 0), total, share)


def test_all_of_crd_is_registered_and_saved():
    module = crd()
    assert {name for name, _ in module.named_parameters()} == {
        f"embed_{side}.{kind}" for side in "st" for kind in ("weight", "bias")
    }
    state = {"memory_s", "memory_t", "z_s", "z_t"}
    assert {name for name, _ in module.named_buffers()} == state <= module.state_dict().keys()
    assert all(x.device.type == "meta" for x in module.to("meta").state_dict().values())


def test_crd_goes_on_from_a_checkpoint_as_if_never_stopped():
    student, teacher = drawn(20, (3, 5), (3, 4), dtype=torch.float32)
    module = crd()
    table = contrast_table(torch.tensor([2, 7, 0]), 6, 12, rows(0, 3))
    module(student, teacher, table)
    module.after_step()
    again = crd(seed=1)
    again.load_state_dict(module.state_dict())
    close(module(2 - student, teacher, table), again(2 - student, teacher, table), rtol=0, atol=0)


def test_crd_keeps_the_first_normaliser_and_writes_only_after_the_step():
    module = crd()
    before = {name: value.clone() for name, value in module.named_buffers()}
    (student, teacher), table = drawn(21, (2, 5), (2, 4), dtype=torch.float32), torch.tensor([[3, 1, 1], [5, 0, 3]])
    module(student, teacher, table).sum().backward()
    first = module.z_s.clone()
    assert float(first) > 0 and torch.equal(module.memory_s, before["memory_s"])
    module(9 * student - 1, teacher, table[:, [1, 0, 2]]).sum().backward()
    module.after_step()
    assert torch.equal(module.z_s, first)
    changed = (module.memory_s != before["memory_s"]).any(1).nonzero()[:, 0]
    assert changed.tolist() == [0, 1, 3, 5]
    close(module.memory_s[changed].norm(dim=1), torch.ones(4), rtol=1e-5)
    after = module.memory_s.clone()
    module.after_step()  # nothing was shown since
    assert torch.equal(module.memory_s, after)


def test_crd_in_eval_learns_nothing():
    module = crd().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = module(torch.ones(2, 5), torch.ones(2, 4), torch.tensor([[3, 1, 1], [5, 0, 3]]))
    module.after_step()
    assert bool(found.isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_crd_costs_no_digits_under_autocast():
    module = crd().eval()
    (student, teacher), table = drawn(22, (2, 5), (2, 4), dtype=torch.float32), torch.tensor([[3, 1, 1], [5, 0, 3]])
    expected = module(student, teacher, table)
    with torch.autocast("cpu", torch.bfloat16):
        close(module(student, teacher, table), expected, rtol=1e-6)


def test_nce_by_hand():
    """Where every candidate is as probable as noise, each of the 1 + m guesses costs ln 2."""
    p = torch.full((2, 5), 4 / 10, dtype=torch.float64)
    close(nce(p, 10), torch.full((2,), 5 * math.log(2), dtype=torch.float64), rtol=1e-6)
    better = p.clone()
    better[:, 0], better[:, 1:] = 100, 1e-4
    assert float(nce(better, 10).max()) < 0.01


def test_contrast_table_begins_with_the_image_and_covers_all_others():
    index = torch.tensor([4, 1, 9])
    table = contrast_table(index, 3000, 10, rows(0, 3))
    assert table.shape == (3, 3001) and torch.equal(table[:, 0], index)
    counts = table[:, 1:].flatten().bincount(minlength=10)
    assert len(counts) == 10 and float((counts / 900 - 1).abs().max()) < 0.15
    parts = [contrast_table(index[share], 3000, 10, rows(0, 3, share)) for share in ([0], [1, 2])]
    assert torch.equal(torch.cat(parts), table)


@pytest.mark.parametrize("number", [3, 10, 50_000, 2**20, 2**20 + 1, 1_281_167, 2**24 - 1])
def test_contrast_table_stays_inside_its_set(number, monkeypatch):
    """Also at the largest float32 below one, whose product must not round up to N."""
    monkeypatch.setattr(Rows, "uniform", lambda self, m: torch.tensor(1 - 2**-24).expand(2, m))
    assert int(contrast_table(torch.zeros(2, dtype=torch.int64), 2, number, rows(0, 2)).max()) == number - 1


def test_crd_teaches_the_student_to_know_its_partner():
    """Of twelve images one in twelve is found by chance; afterwards most are."""
    inputs, mixing = drawn(23, (12, 6), (6, 4), dtype=torch.float32)
    teacher, module = (inputs @ mixing).tanh(), crd()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = nn.Linear(6, 5)
    optimizer = torch.optim.Adam([*student.parameters(), *module.parameters()], lr=0.02)

    def found():
        v_s, v_t = module.embed_s(student(inputs)), module.embed_t(teacher)
        nearest = (F.normalize(v_s, dim=1) @ F.normalize(v_t, dim=1).T).argmax(1)
        return float((nearest == torch.arange(12)).float().mean())

    assert found() < 0.3
    for step in range(100):
        index = torch.randperm(12, generator=stream(0, "order", step))[:6]
        table = contrast_table(index, 8, 12, Rows(stream(0, "step", step), 6))
        optimizer.zero_grad()
        module(student(inputs[index]), teacher[index], table).mean().backward()
        optimizer.step()
        module.after_step()
    assert found() > 0.5
