"""Losses as pure functions. A function lives here once two places call it, or once its formula has a golden file.

Letters: B images, D width, C channels, h w a grid, A actions, K classes; z logits, p probabilities, s student,
t teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
