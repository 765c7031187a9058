"""Losses as pure functions. A function lives here once two places call it, or once its formula has a golden file.

Letters: B images, D width, C channels, h w a grid, A actions, K classes; z logits, p probabilities, s student,
t teacher. ``FEATURE_LOSSES`` at the end holds the distances of features that a recipe may name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffrep.errors import UserError


def pooled(feature: Tensor, grid: int) -> Tensor:
    """(B, C, h, w) -> (B, C, grid, grid) by adaptive average pooling; grid 1 is the published global pool."""
    return F.adaptive_avg_pool2d(feature, grid)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Per image: mean over all but the batch axis of (s - t)^2, (B,). Source: hint loss of the official code (l2)."""
    return (student - teacher).square().flatten(1).mean(1)


def reinforce(logits: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
    """Per image: -log pi(action) * advantage, (B,); its gradient estimates that of -E[reward].

    Args:
        logits: (B, A) of the policy.
        action: (B,) int64, drawn from softmax(logits).
        advantage: (B,), reward minus a baseline that does not depend on the action; no gradient flows into it.

    Source: Williams 1992; official `Repfusion32_ImageClassifier`, which has no baseline.
    """
    log_prob = F.log_softmax(logits, 1).gather(1, action[:, None]).squeeze(1)
    return -log_prob * advantage.detach()


def entropy(logits: Tensor) -> Tensor:
    """Per image: H(softmax(logits)) in nats, (B,); ln A when uniform."""
    log_probs = F.log_softmax(logits, 1)
    return -(log_probs.exp() * log_probs).sum(1)


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """Sum of ``values`` (B,) where ``chosen`` (B,) bool, divided by B: zero elsewhere.

    Divided by B and not by the number chosen, so that micro-batches and processes add up to the same total.
    """
    return torch.where(chosen, values, torch.zeros_like(values)).sum() / max(len(values), 1)


# Of logits (B, K): what a classifier teaches. Every loss is per image, so that batches may be split.


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Logits (B, K), labels (B,) -> (B,)."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """K questions of yes or no, (B, K) and labels (B,) -> their mean (B,). Source: Wightman et al. 2021, timm's BCE."""
    target = F.one_hot(labels, logits.shape[1]).to(logits.dtype) * (1 - label_smoothing)
    target = target + label_smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)


def kd_kl(student: Tensor, teacher: Tensor, kd_temperature: float) -> Tensor:
    """tau^2 KL(p_t || p_s) with p = softmax(z / tau), (B,); its gradient is tau (p_s - p_t) per image.

    Source: Hinton et al. 2015; official DM-KD `DistillKL`.
    """
    p_t, log_t = F.softmax(teacher / kd_temperature, 1), F.log_softmax(teacher / kd_temperature, 1)
    log_s = F.log_softmax(student / kd_temperature, 1)
    return kd_temperature**2 * (p_t * (log_t - log_s)).sum(1)


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of (z_s - z_t)^2, (B,); up to a factor what ``kd_kl`` tends to as tau grows."""
    return (student - teacher).square().mean(1)


def standardised_logits(logits: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + sample standard deviation) over the classes (Sun et al. 2024): only the shape is left."""
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))


def decoupled_kd(
    student: Tensor, teacher: Tensor, labels: Tensor, kd_temperature: float, alpha: float, beta: float
) -> Tensor:
    """DKD (Zhao et al. 2022, equation 7), (B,): ``alpha`` x (target against the rest) + ``beta`` x (among the rest)."""
    target = F.one_hot(labels, student.shape[1]).bool()
    binary = [_target_and_rest(z / kd_temperature, target) for z in (student, teacher)]
    rest = [(z / kd_temperature).masked_fill(target, -1e4) for z in (student, teacher)]
    among = [F.log_softmax(z, 1) for z in rest]
    tckd, nckd = (kl_of_logs(teachers, students) for students, teachers in (binary, among))
    return kd_temperature**2 * (alpha * tckd + beta * nckd)


def _target_and_rest(logits: Tensor, target: Tensor) -> Tensor:
    """log of (probability of the target, of all others together), (B, 2)."""
    log_probs = F.log_softmax(logits, 1)
    of_target = log_probs[target][:, None]
    of_rest = log_probs.masked_fill(target, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([of_target, of_rest], 1)


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log probabilities (B, K), (B,)."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def dist(student: Tensor, teacher: Tensor, kd_temperature: float, beta: float, gamma: float) -> Tensor:
    """DIST (Huang et al. 2022, equations 8-10): tau^2 [beta (1 - row correlation) + gamma (1 - column correlation)].

    Rows are images, columns classes, so the second part compares the images of a batch: () and not (B,).
    """
    p_s, p_t = F.softmax(student / kd_temperature, 1), F.softmax(teacher / kd_temperature, 1)
    rows, columns = 1 - pearson(p_s, p_t).mean(), 1 - pearson(p_s.T, p_t.T).mean()
    return kd_temperature**2 * (beta * rows + gamma * columns)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of a with the same row of b, (B, K) -> (B,)."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


# Of tokens: logits (B, L, V), a mask (B, L)


def token_cross_entropy(logits: Tensor, ids: Tensor, label_smoothing: float) -> Tensor:
    """Per token: cross-entropy with (1 - eps) one-hot + eps / V, (B, L)."""
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=label_smoothing).view(
        ids.shape
    )


def soft_token_cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Per token: -sum q' log softmax(z) with q' = (1 - eps) q + eps / V, (B, L).

    Args:
        logits: (B, L, V). target: (B, L, K) distributions over the first K of them; the other columns are never right.
    """
    log_p = F.log_softmax(logits.float(), 2)
    expected = (target * log_p[..., : target.shape[2]]).sum(2)
    return -(1 - label_smoothing) * expected - label_smoothing * log_p.mean(2)


def mean_at(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens of the whole batch."""
    return (values * mask).sum() / mask.sum()


# Of features, image by image: vectors (B, C) or maps (B, C, h, w) of one shape on both sides


def resized(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map (B, C, h, w), bilinear without aligned corners, on the grid of the teacher's."""
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)


def unit(x: Tensor, dim: int) -> Tensor:
    """x / |x| along ``dim``; a zero vector stays zero and gets no gradient."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x * torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)


def wide(x: Tensor) -> Tensor:
    """float32 in place of a half precision, whose squares overflow and whose differences keep two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def feature_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Per image: mean over all but the batch axis of |s - t|, (B,). Source: official `distill_fn` l1."""
    return (student - teacher).abs().flatten(1).mean(1)


def feature_mse_of_units(student: Tensor, teacher: Tensor) -> Tensor:
    """``feature_mse`` of vectors of length one, (B,); of vectors (2 - 2 cos) / C. Source: official l2_norm."""
    return feature_mse(unit(wide(student), 1), unit(wide(teacher), 1))


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Per image: 1 - cos, the mean over places, (B,).

    The official `distill_fn` cosine minimises +cos and so drives student and teacher apart; this one does not.
    """
    cosine = (unit(wide(student), 1) * unit(wide(teacher), 1)).sum(1)  # (B,) or (B, h, w)
    return (1 - cosine).reshape(len(cosine), -1).mean(1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Per image: mean over places of (A_s - A_t)^2 with A = sum_c |F_c|^p, scaled to length one, (B,).

    Args:
        student: (B, C, h, w), resized to the teacher's grid first; widths may differ.
        teacher: (B, C', h', w').
        power: p, at least 1.

    Source: Zagoruyko and Komodakis 2017; official recipes use p = 2 and multiply by 1000.
    """
    return feature_mse(attention_map(resized(student, teacher), power), attention_map(teacher, power))


def attention_map(feature: Tensor, power: float) -> Tensor:
    """(B, C, h, w) -> (B, h, w): sum_c |F_c|^p, divided by its length over the places plus 1e-6."""
    attention = wide(feature).abs().pow(power).sum(1)
    return attention / (torch.linalg.vector_norm(attention, dim=(1, 2), keepdim=True) + 1e-6)


# Of features, images against each other


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.1) -> Tensor:
    """Per image: -log softmax_j(cos(q_i, k_j) / temperature) at j = i, (B,); more than two axes are flattened.

    Source: van den Oord et al. 2018; the official class with CleanContrast in its name, which leaves the mean to later.
    """
    with torch.autocast(query.device.type, enabled=False):
        queries, keys = unit(wide(query.flatten(1)), 1), unit(wide(key.flatten(1)), 1)
        logits = queries @ keys.T / temperature  # (B, B)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation (Park et al. 2019) with the official weights, (); widths may differ.

    Unlike the official code it takes differences of rows, not |a|^2 + |b|^2 - 2ab: equal rows are at distance 0 and
    a common offset costs no digits. It walks over the images in stretches and never holds B x B x C numbers.

    Raises:
        UserError: fewer than three images, of which nothing can be learnt.
    """
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    return distance_weight * distance + angle_weight * angle


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the two tables of distances |x_i - x_j|, each over its mean positive entry, ().

    Args:
        student, teacher: (B, C) and (B, C'); more axes are flattened.

    Source: Park et al. 2019, distance-wise loss; mean over all B^2 entries as in the official code.
    """
    return F.smooth_l1_loss(*(_relative_distances(_vectors(x)) for x in (student, teacher)))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines at every vertex k, e_ki . e_kj with e_ki = unit(x_i - x_k), ().

    Args:
        student, teacher: (B, C) and (B, C'); more axes are flattened.

    Source: Park et al. 2019, angle-wise loss; mean over all B^3 entries as in the official code, 0 where i or j is k.
    """
    s, t = _vectors(student), _vectors(teacher)
    with torch.autocast(s.device.type, enabled=False):
        stretches = _stretches(len(s), max(s.shape[1], t.shape[1]))
        total = sum(_recomputed(_angle_gap, s, t, vertices) for vertices in stretches)
    return total / len(s) ** 3


def _vectors(feature: Tensor) -> Tensor:
    if len(feature) < 3:
        raise UserError(f"loss 'rkd' compares images in threes: a micro-batch of {len(feature)} is too small, use >= 3")
    return wide(feature.flatten(1))


def _relative_distances(x: Tensor) -> Tensor:
    """(B, C) -> (B, B), of mean 1 over the positive entries; all zero where all rows are equal."""
    distances = torch.cat([_recomputed(_distances, x, vertices) for vertices in _stretches(*x.shape)])
    count = (distances > 0).sum()
    return distances / torch.where(count > 0, distances.sum() / count.clamp(min=1), 1)


def _distances(x: Tensor, vertices: slice) -> Tensor:
    return torch.linalg.vector_norm(x[None] - x[vertices, None], dim=2)  # (vertices, B)


def _angle_gap(s: Tensor, t: Tensor, vertices: slice) -> Tensor:
    cosines_s, cosines_t = (e @ e.mT for e in (unit(x[None] - x[vertices, None], 2) for x in (s, t)))
    return F.smooth_l1_loss(cosines_s, cosines_t, reduction="sum")  # over (vertices, B, B)


STRETCH = 2**22  # numbers in the largest tensor of a stretch: 16 MB


def _stretches(batch: int, width: int) -> Iterator[slice]:
    """0..B-1 in stretches so short that (vertices, B, max(B, C)) fits; at least one vertex each."""
    size = max(1, STRETCH // (batch * max(batch, width)))
    return (slice(i, i + size) for i in range(0, batch, size))


def _recomputed(part: Callable[..., Tensor], *args: Tensor | slice) -> Tensor:
    """``part(*args)``, of which the backward pass keeps the arguments alone."""
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class FeatureLoss:
    """A distance that a recipe may name, and what a method has to do before it calls it."""

    function: Callable[[Tensor, Tensor], Tensor]  # (student, teacher) -> (B,) or ()
    needs_projector: bool  # the student must first get the teacher's width
    pools: bool  # may be given pooled features; False: maps alone, before any pooling
    fewest: int = 1  # images it takes; above 1 it holds those of a batch against each other


FEATURE_LOSSES = {
    "l2": FeatureLoss(feature_mse, needs_projector=True, pools=True),
    "l1": FeatureLoss(feature_l1, needs_projector=True, pools=True),
    "l2_norm": FeatureLoss(feature_mse_of_units, needs_projector=True, pools=True),
    "cosine": FeatureLoss(feature_cosine, needs_projector=True, pools=True),
    "at": FeatureLoss(attention_transfer, needs_projector=False, pools=False),
    "rkd": FeatureLoss(rkd, needs_projector=False, pools=True, fewest=3),
    "info_nce": FeatureLoss(info_nce, needs_projector=True, pools=True, fewest=2),
}
