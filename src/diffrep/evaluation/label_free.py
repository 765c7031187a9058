"""How clustered features are, without any label: between-cluster over within-cluster variance under k-means.

Letters: N images, D width, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffrep.evaluation.probe import standardise
from diffrep.randomness import derived_seed

MOST_IMAGES = 2048  # that are clustered
STARTS = 4  # of k-means; the best is kept


def variance_ratio(features: Tensor, clusters: int, seed: int) -> float:
    """Between over within variance of (N, D) standardised features under k-means; 0 where nothing varies.

    More noise dimensions lower it, so it compares noise levels at one tap better than taps of different width.
    """
    from sklearn.cluster import KMeans

    x = standardise(features)[0].float().numpy()
    total = float(((x - x.mean(0)) ** 2).sum())
    if len(x) <= clusters or total < 1e-6 * x.size:
        return 0.0
    random_state = derived_seed(seed, "k-means") % 2**32
    within = float(KMeans(clusters, n_init=STARTS, max_iter=50, random_state=random_state).fit(x).inertia_)
    return (total - within) / max(within, 1e-6 * total)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, ties sharing their mean rank. None without any spread."""
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else None


def _ranks(values: Sequence[float]) -> Tensor:
    """(N,) float64, 0 for the smallest."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x[:, None] > x).double().sum(1) + ((x[:, None] == x).double().sum(1) - 1) / 2
