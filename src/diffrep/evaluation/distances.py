"""How far two sets of images are from each other: nearest neighbours, Frechet distance, kernel distance.

Letters: M queries, N keys, P numbers of a vector, D width of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffrep.console import Report
from diffrep.randomness import stream

QUERY_BLOCK, KEY_BLOCK = 1024, 8192  # their table of distances takes 32 MiB
MIDDLE = 127.5  # of grey levels: taking it away keeps sums of squares small
SUBSET = 1000  # images of each side that one estimate of the kernel distance looks at


def nearest(
    queries: Tensor, keys: Tensor, device: torch.device, report: Report = lambda *_: None, is_same: bool = False
) -> tuple[Tensor, Tensor]:
    """The nearest key of every query, block by block: memory does not grow with M x N.

    Args:
        queries, keys: (M, P) and (N, P), uint8 or float32, on the CPU.
        report: told of the queries that are done.
        is_same: both are the same images in the same order, at least two, and none is its own neighbour.

    Returns:
        Euclidean distances (M,) float64, computed from the differences themselves, so that equal vectors have
        distance 0; and where the neighbours stand, (M,) int64.
    """
    found = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(queries), QUERY_BLOCK):
        block = _numbers(queries[start : start + QUERY_BLOCK], device)
        found.append(_nearest_of(block, keys, device, start if is_same else None))
        report(min(start + QUERY_BLOCK, len(queries)), len(queries))
    index = torch.cat(found)
    distances = [
        (q.double() - keys[rows].double()).norm(dim=1)
        for q, rows in zip(queries.split(QUERY_BLOCK), index.split(QUERY_BLOCK), strict=True)
    ]
    return torch.cat(distances), index


def _nearest_of(block: Tensor, keys: Tensor, device: torch.device, own: int | None) -> Tensor:
    """block (m, P) -> (m,) int64. own: the row of its first query among the keys, which nobody is matched with."""
    best = torch.full((len(block),), torch.inf, device=device)
    index = torch.zeros(len(block), dtype=torch.int64, device=device)
    for start in range(0, len(keys), KEY_BLOCK):
        near = _numbers(keys[start : start + KEY_BLOCK], device)
        distance = near.square().sum(1) - 2 * block @ near.T  # (m, n), less |query|^2, which changes no order
        if own is not None:
            rows = torch.arange(own, own + len(block), device=device)
            distance[rows[:, None] == torch.arange(start, start + len(near), device=device)] = torch.inf
        value, position = distance.min(1)
        index = torch.where(value < best, position + start, index)
        best = torch.minimum(value, best)
    return index.cpu()


def _numbers(vectors: Tensor, device: torch.device) -> Tensor:
    vectors = vectors.to(device)
    return vectors.float() - MIDDLE if vectors.dtype == torch.uint8 else vectors.float()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) -> mean (D,) and covariance (D, D) over N - 1, float64; N is at least 2."""
    mean = features.mean(0, dtype=torch.float64)
    centred = (block.double() - mean for block in features.split(KEY_BLOCK))
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for block in centred:
        scatter += block.T @ block
    return mean, scatter / (len(features) - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of two Gaussians (m, S) and (n, T).

    Source: Dowson and Landau 1982; squared, as everyone reports it since Heusel et al. 2017. With S = H H^T the trace
    of (S T)^(1/2) is the sum of the roots of the eigenvalues of H^T T H, which is symmetric.
    """
    (mean, covariance), (other_mean, other) = first, second
    values, vectors = torch.linalg.eigh(covariance)
    half = vectors * values.clamp(min=0).sqrt()
    roots = torch.linalg.eigvalsh(half.T @ other @ half).clamp(min=0).sqrt()
    found = (mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * roots.sum()
    return max(float(found), 0.0)


def kernel_distance(first: Tensor, second: Tensor, size: int, subsets: int = 100) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of features with the kernel (x y / D + 1)^3: its mean and spread.

    Unlike the Frechet distance it does not shrink as N grows: the estimate is unbiased, and may be below 0.
    Source: Binkowski et al. 2018, section 4, equation 4 (of Inception's features it is called KID).

    Args:
        first, second: (N, D) and (M, D).
        size: images of each side in a subset, 2 at least; the subsets are drawn by lot, always the same.

    Returns:
        Mean and standard deviation over the subsets.
    """
    values = []
    for number in range(subsets):
        rng = stream(0, "kernel distance", number)
        x, y = (side[torch.randperm(len(side), generator=rng)[:size]].double() for side in (first, second))
        values.append(_mmd(x, y))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def _mmd(x: Tensor, y: Tensor) -> float:
    """(m, D), (m, D) -> the estimate from all pairs; no image is compared with itself."""
    m, width = x.shape
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return float(within / (m * (m - 1)) - 2 * xy.mean())


def subset_size(first: int, second: int) -> int:
    """Images of a subset: 1,000 as everyone has it; half of the smaller side where that is less than 2,000."""
    return min(SUBSET, max(min(first, second) // 2, 2))
