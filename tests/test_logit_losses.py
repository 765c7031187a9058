"""Losses between logits, against published and official numbers: pytest tests/test_logit_losses.py"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffrep import losses

# Values of the published implementations on these logits, in double precision (specification of the anchors, 5.10).
STUDENT = torch.tensor([[1, 2, 0.5, -1], [0, -1, 3, 0.25], [0.1, 0.2, 0.3, 0.4]], dtype=torch.double)
TEACHER = torch.tensor([[2, 1, 0, -0.5], [0.5, 0, 4, 1], [-1, 0, 1, 2]], dtype=torch.double)
LABELS = torch.tensor([1, 2, 0])


def exactly(value):
    return pytest.approx(value, rel=1e-12)


def test_published_values():
    standard = [losses.standardised_logits(z) for z in (STUDENT, TEACHER)]
    assert float(losses.kd_kl(STUDENT, TEACHER, 4).mean()) == exactly(0.287796451675164)
    assert float(losses.kd_kl(*standard, 2).mean()) == exactly(0.09303577509664411)
    target, rest, both = (
        float(losses.decoupled_kd(STUDENT, TEACHER, LABELS, 4, *w).mean()) for w in ((1, 0), (0, 1), (1, 8))
    )
    assert target == exactly(0.16018322127133788) and rest == exactly(0.16333916886252078)
    assert both == exactly(1.4668965721715042)
    rows, columns, tau4 = (float(losses.dist(STUDENT, TEACHER, *w)) for w in ((1, 1, 0), (1, 0, 1), (4, 1, 1)))
    assert rows == exactly(0.27626541029565355) and columns == exactly(0.11431365856044129)
    assert tau4 == exactly(3.6875906645810446)


@pytest.mark.golden(of=lambda case: "temps" in case.meta)
def test_golden_kd_loss_and_gradient(golden_case):
    teacher = golden_case.get("inputs/logits_t")
    for tau in golden_case.meta["temps"]:
        student = golden_case.get("inputs/logits_s").requires_grad_()
        loss = losses.kd_kl(student, teacher, tau).mean()
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(
            loss.detach(), golden_case.get(f"outputs/loss_T{tau}").view(()), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(gradient, golden_case.get(f"outputs/grad_T{tau}"), rtol=1e-9, atol=1e-12)


logits = st.lists(st.floats(-8, 8), min_size=10, max_size=10).map(
    lambda v: torch.tensor(v, dtype=torch.double).view(2, 5)
)


@given(logits, logits, st.floats(0.5, 20))
def test_kl_has_the_gradient_and_the_invariances_of_the_paper(student, teacher, tau):
    student = student.clone().requires_grad_()
    each = losses.kd_kl(student, teacher, tau)
    (gradient,) = torch.autograd.grad(each.mean(), student)
    p_s, p_t = (F.softmax(z.detach() / tau, 1) for z in (student, teacher))
    torch.testing.assert_close(gradient, tau / 2 * (p_s - p_t), rtol=1e-8, atol=1e-10)
    assert float(each.detach().min()) > -1e-9
    shifted = losses.kd_kl(student + 3, teacher - 1, tau)
    torch.testing.assert_close(shifted, each, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(losses.kd_kl(teacher + 1, teacher, tau), torch.zeros(2).double(), rtol=0, atol=1e-10)
    twice = losses.kd_kl(torch.cat([student, student]), torch.cat([teacher, teacher]), tau)
    torch.testing.assert_close(twice.mean(), each.mean())


def test_limits_of_the_temperature():
    student = STUDENT.clone().requires_grad_()
    (hot,) = torch.autograd.grad(losses.kd_kl(student, TEACHER, 1e5).mean(), student)
    centred = [z - z.mean(1, keepdim=True) for z in (STUDENT, TEACHER)]
    torch.testing.assert_close(hot, (centred[0] - centred[1]) / STUDENT.numel(), rtol=1e-3, atol=1e-6)
    (mse,) = torch.autograd.grad(losses.logit_mse(student, TEACHER).mean(), student)
    torch.testing.assert_close(mse, 2 * (STUDENT - TEACHER) / STUDENT.numel())
    (cold,) = torch.autograd.grad(losses.kd_kl(student, TEACHER, 1).mean(), student)
    (soft,) = torch.autograd.grad(F.cross_entropy(student, TEACHER.softmax(1)), student)
    torch.testing.assert_close(cold, soft)


def test_decoupled_kd_with_the_teachers_own_weight_is_kd():
    """KD = target part + (1 - p_target of the teacher) x the rest (Zhao et al. 2022, equation 6)."""
    tau = 3.0
    share = 1 - F.softmax(TEACHER / tau, 1).gather(1, LABELS[:, None]).squeeze(1)
    target, rest = (losses.decoupled_kd(STUDENT, TEACHER, LABELS, tau, *w) for w in ((1, 0), (0, 1)))
    torch.testing.assert_close(target + share * rest, losses.kd_kl(STUDENT, TEACHER, tau))


def test_standardising_forgets_scale_and_shift():
    torch.testing.assert_close(
        losses.standardised_logits(7 * TEACHER - 2), losses.standardised_logits(TEACHER), rtol=1e-6, atol=1e-6
    )


def test_dist_sees_only_correlation_and_is_zero_at_the_teacher():
    assert abs(float(losses.dist(TEACHER, TEACHER, 1, 1, 1))) < 1e-6
    assert float(losses.dist(-TEACHER, TEACHER, 1, 1, 1)) > 1
