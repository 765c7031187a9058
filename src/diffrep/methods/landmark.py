"""Landmarks: points of a face as peaks of heatmaps, on a backbone from scratch or from a run.

Source: RepFusion's `landmark` configs (mmpose 0.29, top-down heatmaps on WFLW). A head draws one map per point; the
loss is the mean square to Gaussians around the true points; a point is read where its map is highest.
Deviations: the best network is chosen on a tenth of the training faces (official: on the test faces; ``select``
"test"); maps are drawn where the loss is computed, not where pictures are read; loading is strict (official: not).
Letters: B pictures, K points, h w of heatmaps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep.data.batch import Batch
from diffrep.data.dense import DenseSet
from diffrep.data.landmark_views import LandmarkViews
from diffrep.errors import UserError
from diffrep.methods.dense import DenseConfig, DenseMethod
from diffrep.models import heatmaps
from diffrep.models.heatmaps import ConcatHead, Decoding, DeconvHead, Landmarker, joints_mse
from diffrep.models.maps import MapBackbone
from diffrep.randomness import Rows


class LandmarkConfig(DenseConfig):
    """Head, views and how maps are read."""

    kind: Literal["landmark"] = "landmark"
    views: LandmarkViews = LandmarkViews()
    head: Literal["deconv", "concat"] = "deconv"  # of the coarsest map (ResNet); of all maps together (HRNet)
    deconv: tuple[int, ...] = (256, 256, 256)  # channels of the transposed convolutions, each twice the size
    backbone_std: float | None = Field(None, gt=0)  # of a fresh backbone's filters; None: as the network begins
    decoding: Decoding = "default"  # of maps; udp belongs to targets of its kind
    flip_test: bool = True  # tests average the maps of a crop and of its mirror image
    select: Literal["last", "held_out", "test"] = "held_out"

    @model_validator(mode="after")
    def _one_measure(self) -> LandmarkConfig:
        if (self.decoding == "udp") != (self.views.target == "udp"):
            raise ValueError("UDP measures from pixel centres: decoding and views.target are 'udp' both or neither")
        return self


class Landmark(DenseMethod):
    """Mean square between drawn and true heatmaps."""

    task = "landmark"

    def __init__(self, config: LandmarkConfig, images: DenseSet) -> None:
        super().__init__()
        self.config = config
        self.hold(MapBackbone(config.student, config.maps, config.fuse_upsample))
        _check_side(config, self.backbone)
        if config.init is None and config.backbone_std is not None:
            heatmaps.begin(self.backbone, config.backbone_std)
        self.start(config)
        self.network = Landmarker(self.backbone, _head(config, self.backbone, len(images.truth(0).points)))
        self.image_size = config.views.size
        self.facts = {"classes": list(images.classes), "mirrored": images.mirrored, **images.facts}

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        """batch.target: {"points": (B, K, 2) in pixels of the crop, "visible": (B, K)}."""
        views, points, visible = self.config.views, batch.target["points"], batch.target["visible"]
        maps = self.network(batch.images)
        width, height = maps.shape[-1], maps.shape[-2]
        target, weight = heatmaps.targets(
            points, visible, (views.size, views.size), (width, height), views.target, views.sigma
        )
        return {"loss": joints_mse(maps, target, weight), "train_error": self._error(maps, points, weight)}

    @torch.no_grad()
    def _error(self, maps: Tensor, points: Tensor, weight: Tensor) -> Tensor:
        """Mean distance of the peaks from the points, in percent of the crop's side."""
        sides = torch.tensor([maps.shape[-1], maps.shape[-2]], device=maps.device)
        peaks = heatmaps.cells_of(maps.float(), "none")[0] / sides
        distance = (peaks - points / self.config.views.size).norm(dim=-1) * weight[..., 0]
        return 100 * distance.sum() / weight.sum().clamp(min=1)

    def dry_step(self, images: Tensor) -> None:
        self.network(images).sum().backward()


def _check_side(config: LandmarkConfig, backbone: MapBackbone) -> None:
    """Of the crops that a plain ViT, whose maps are all of one size, is shown."""
    patch, side = backbone.strides[-1], config.views.size
    if len(set(backbone.strides)) == 1 and side % patch:
        raise UserError(f"method.views.size = {side}: {config.student.name} takes multiples of {patch} pixels")


def _head(config: LandmarkConfig, backbone: MapBackbone, num_points: int) -> nn.Module:
    if config.head == "concat":
        return ConcatHead(backbone.widths, num_points)
    if config.student.name.startswith("hrnet"):
        raise UserError(f"method.head 'deconv' reads the coarsest map alone; {config.student.name} is for 'concat'")
    return DeconvHead(backbone.widths[-1], num_points, config.deconv)
