"""What a timestep is worth: rewards for the policy of RepFusion. Codes in, one number per image out, no gradient.

Letters: B images, D width of a code, K classes. A reward is higher where the teacher's view is better; all are at
most 0 (up to rounding), so that a baseline matters.
Source: the reward of the paper (task), and what the official classes `TaskOriented2`, `StudentOriented` and
`TaskCommon` were meant to compute: theirs fail to run or compare a code with itself (defects D17, D18).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 0.1  # penalty, as a share of the mean squared length of a centred code
NCE_TEMPERATURE = 0.2  # official PolicyInfo
FEWEST = 3  # images that a leave-one-out fit needs


def least_squares(code: Tensor, goal: Tensor) -> Tensor:
    """-|y_i - f_(-i)(z_i)|^2 / columns, (B,): ridge regression on all other images of the batch (leave-one-out).

    Args:
        code: (B, D); goal: (B, G), e.g. one-hot labels or the student's own code.

    In closed form: the residual of a fit with all images, divided by 1 minus the image's leverage (Allen's PRESS). With
    fewer than three images nothing can be left out, and the reward is 0.
    """
    if len(code) < FEWEST:
        return code.new_zeros(len(code))
    z, y = (x.detach().double() - x.detach().double().mean(0) for x in (code.flatten(1), goal.flatten(1)))
    kernel = z @ z.T  # (B, B): a batch has fewer images than a code has numbers
    penalty = RIDGE * kernel.diagonal().mean().clamp(min=1e-12)
    shrink = kernel @ torch.linalg.inv(kernel + penalty * torch.eye(len(z), dtype=z.dtype, device=z.device))
    leverage = shrink.diagonal() + 1 / len(z)  # that of the mean, too
    residual = (y - shrink @ y) / (1 - leverage).clamp(min=1e-6)[:, None]
    return -residual.square().mean(1).to(code.dtype)


def common(code: Tensor, other: Tensor) -> Tensor:
    """log softmax of cos(z_i, z'_i) among all cos(z_i, z'_j), (B,): the two views of an image know each other.

    Args:
        code, other: (B, D), of two views of the same images at the same timesteps.
    """
    a, b = (F.normalize(x.detach().flatten(1), dim=1) for x in (code, other))
    return F.log_softmax(a @ b.T / NCE_TEMPERATURE, 1).diagonal()
