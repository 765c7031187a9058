"""Scores of points: normalised mean error, failures, the area under the curve of errors; of a whole set and subsets.

Source: mmpose 0.29's `keypoint_nme` for the error; failures and area as in the paper of WFLW (Wu et al., CVPR 2018).
The area is exact; on a grid of thresholds, as others take it, it is a little larger.
Letters: N faces, K points, h w of heatmaps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from diffrep.data.dense import DenseSet
from diffrep.data.landmark_views import LandmarkViews, crop, exchanged, padded_scale
from diffrep.data.wflw import UNIT, Face
from diffrep.errors import UserError
from diffrep.evaluation import panels
from diffrep.models.heatmaps import Decoding, decode, flipped_back

LIMIT = 0.1  # error of a face beyond which it counts as failed, and up to which the area is taken
BLOCK = 32  # faces at once


def point_errors(found: Tensor, truth: Tensor, normaliser: Tensor, visible: Tensor | None = None) -> Tensor:
    """Distances in units of each face's normaliser, (N, K) float64.

    Args:
        found, truth: (N, K, 2) pixels. normaliser: (N,) pixels. visible: (N, K), 0 or False where none counts.

    Returns:
        NaN where a point is not visible or a normaliser is 0.
    """
    distance = (found.double() - truth.double()).norm(dim=-1)
    counts = torch.ones_like(distance, dtype=torch.bool) if visible is None else visible > 0
    errors = distance / normaliser.double()[:, None]
    return errors.masked_fill(~counts | (normaliser[:, None] <= 0), math.nan)


def per_face(errors: Tensor) -> Tensor:
    """Mean error of each face's points, (N,); NaN of a face without any."""
    return errors.nanmean(1)


def nme(errors: Tensor) -> Tensor:
    """Mean error of all points of all faces, as a share of the normaliser."""
    return errors.nanmean()


def failure_rate(faces: Tensor, limit: float = LIMIT) -> Tensor:
    """Share of faces (N,) whose error is larger than ``limit``."""
    return (faces > limit).double().mean()


def auc(faces: Tensor, limit: float = LIMIT, step: float | None = None) -> Tensor:
    """Area under the cumulative distribution of errors (N,) from 0 to ``limit``, as a share of the whole.

    step: None: exact. Else by trapezoids between thresholds that far apart, as many tools take it.
    """
    if step is None:
        return (limit - faces).clamp(min=0).double().mean() / limit
    thresholds = torch.linspace(0, limit, round(limit / step) + 1, dtype=torch.float64)
    shares = (faces.double()[:, None] <= thresholds.to(faces.device)).double().mean(0)
    return torch.trapezoid(shares, dx=step) / limit


def normalisers(faces: list[Face], pair: tuple[int, int] | None) -> Tensor:
    """The unit of each face's errors in pixels, (N,) float64: between two of its points, or its box's side."""
    if pair is None:
        return torch.tensor([face.scale * UNIT for face in faces], dtype=torch.float64)
    ends = torch.stack([face.points[list(pair)] for face in faces])  # (N, 2, 2)
    return (ends[:, 0] - ends[:, 1]).norm(dim=-1)


class Landmarks(Protocol):
    """What is scored: a network from images to heatmaps, and how its recipe cuts faces out and reads maps.

    config: has ``views``, ``decoding`` and ``flip_test``.
    """

    network: nn.Module
    config: Any


def landmark_scores(
    method: Landmarks, images: DenseSet, device: torch.device, samples: Path | None = None, count: int = 0
) -> dict[str, Any]:
    """Error, failures and area over a split and its subsets, in percent; the ``count`` worst faces are drawn.

    Raises:
        UserError: no face can be scored.
    """
    found = torch.cat(list(located(method, images, device)))  # (N, K, 2)
    faces = [images.truth(k) for k in range(len(images))]
    truth, visible = torch.stack([f.points for f in faces]), torch.stack([f.visible for f in faces])
    pair = images.facts.get("normaliser")
    errors = point_errors(found, truth, normalisers(faces, pair), visible)
    own = per_face(errors)
    if own.isnan().all():
        raise UserError(f"{images.name}: no face can be scored: the points {pair} that errors are measured by coincide")
    if samples is not None:
        worst = (-own.nan_to_num(nan=0.0)).argsort(stable=True)[:count].tolist()
        shown = truth.masked_fill(~visible[..., None], math.nan)

        def draw(k: int) -> Image.Image:
            return panels.points(images[k][0], shown[k], found[k])

        rows = [(round(100 * float(own[k]), 3), k) for k in worst if not own[k].isnan()]
        panels.write_panels(samples, rows, draw, "NME %", images.image_name)
    return _summary(errors, images.subsets)


def _summary(errors: Tensor, subsets: dict[str, Tensor]) -> dict[str, float]:
    """``nme``, ``fr10``, ``auc10``, and the same of each subset that has faces, as ``nme_largepose``."""
    known = ~per_face(errors).isnan()
    groups = {"": known} | {f"_{name}": belongs & known for name, belongs in subsets.items()}
    found: dict[str, float] = {}
    for name, belongs in groups.items():
        if belongs.any():
            chosen = errors[belongs]
            own = per_face(chosen)
            values = {"nme": nme(chosen), "fr10": failure_rate(own), "auc10": auc(own)}
            found |= {f"{metric}{name}": round(100 * float(value), 3) for metric, value in values.items()}
    return found


@torch.no_grad()
def located(method: Landmarks, images: DenseSet, device: torch.device) -> Iterator[Tensor]:
    """The points that a network finds, (n, K, 2) float64 pixels of the pictures, some faces at a time."""
    views, decoding = method.config.views, method.config.decoding
    for start in range(0, len(images), BLOCK):
        pairs = [images[k] for k in range(start, min(start + BLOCK, len(images)))]
        views_of = torch.stack([crop(views, image, face)[0] for image, face in pairs]).to(device)
        maps = _heatmaps(method, views_of.float() / 255, images.mirrored)
        yield _points(views, [face for _, face in pairs], maps.cpu(), decoding)


def _heatmaps(method: Landmarks, crops: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """(B, K, h, w); with flip test, the mean of a crop's and of its mirror image's."""
    maps = method.network(crops)
    if not method.config.flip_test:
        return maps
    order = exchanged(maps.shape[1], pairs)
    # Measured from pixel centres (UDP), crop and mirror image meet; else they are a cell apart.
    back = flipped_back(method.network(crops.flip(-1)), order, shift=method.config.decoding != "udp")
    return (maps + back) / 2


def _points(views: LandmarkViews, faces: list[Face], maps: Tensor, decoding: Decoding) -> Tensor:
    center = torch.stack([face.center for face in faces])
    scale = torch.tensor([[padded_scale(views, face)] for face in faces], dtype=torch.float64)
    return decode(maps, center, scale, decoding)[0]
