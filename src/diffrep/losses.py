"""Losses as pure functions. A function lives here once two places call it, or once its formula has a golden file.

Letters: B images, D width, C channels, h w a grid, A actions.
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
