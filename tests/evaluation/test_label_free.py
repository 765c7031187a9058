"""Cluster score without labels, and rank correlation: pytest tests/evaluation/test_label_free.py"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from diffrep.evaluation.label_free import rank_correlation, variance_ratio


def clusters(distance: float, count: int = 300) -> torch.Tensor:
    """Three clusters of unit noise, about ``distance`` apart."""
    rng = torch.Generator().manual_seed(0)
    return distance * torch.eye(3)[torch.arange(count) % 3] + torch.randn(count, 3, generator=rng)


def test_far_clusters_score_higher_than_near_ones():
    scores = [variance_ratio(clusters(d), 3, seed=0) for d in (0, 5, 20, 80)]
    assert scores == sorted(scores) and scores[-1] > 50 * scores[0]


def test_planted_clusters_give_their_own_ratio():
    """At 80 deviations k-means finds the plant, so the ratio is that of the true labels."""
    x, labels = clusters(80), torch.arange(300) % 3
    z = (x - x.mean(0)) / x.std(0)
    centres = torch.stack([z[labels == k].mean(0) for k in range(3)])
    within = (z - centres[labels]).square().sum()
    expected = float((z.square().sum() - within) / within)
    assert variance_ratio(x, 3, seed=0) == pytest.approx(expected, rel=1e-3)


def test_it_is_indifferent_to_scale_and_shift_and_draws_from_its_seed():
    x = clusters(3)
    assert variance_ratio(7 * x - 2, 3, 5) == pytest.approx(variance_ratio(x, 3, 5), rel=1e-3)
    assert variance_ratio(x, 3, 5) == variance_ratio(x, 3, 5)


def test_nothing_that_varies_and_too_few_images_score_nothing():
    assert variance_ratio(torch.full((50, 3), 2.0), 3, 0) == 0
    assert variance_ratio(torch.randn(3, 5), 3, 0) == 0


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_rank_correlation_is_spearmans(pairs):
    one, other = zip(*pairs, strict=True)
    found = rank_correlation(one, other)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)
