"""Detection: boxes, classes and masks of objects, by Mask R-CNN on a ViT that comes from scratch or from a run.

Li, Mao, Girshick, He 2022 (ViTDet); detectron2's project of that name, with which ADDP's figures are compared.
Deviations: those of :mod:`diffrep.models.mask_rcnn` (whole-numbered anchors, a background class that owns boxes and
masks) and of :mod:`diffrep.data.detect_views` (masks to the nearest pixel); a box of no width or height is no target.
Letters: B images, S their side, n objects, K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.data.batch import Batch
from diffrep.data.dense import DenseSet
from diffrep.data.detect_views import DetectViews
from diffrep.errors import UserError
from diffrep.methods.dense import DenseConfig, DenseMethod
from diffrep.models.maps import MapBackbone
from diffrep.models.mask_rcnn import Found, HeadConfig, MaskRCNN
from diffrep.models.vitdet import SimplePyramid, ViTDet, check_plain, global_blocks
from diffrep.randomness import Rows


class DetectConfig(DenseConfig):
    """A ViT, how far its blocks see, and the heads on its pyramid."""

    kind: Literal["detect"] = "detect"
    views: DetectViews = DetectViews()
    window: int = Field(14, ge=1)  # tokens of a window's side: the grid of a ViT for 224 pixels
    # blocks that attend everywhere, the others within windows; (): the last of each quarter, as published
    global_blocks: tuple[int, ...] = ()
    heads: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _of_the_last_map(self) -> DetectConfig:
        if self.maps:
            raise ValueError("maps: the pyramid is made of the last map alone; leave it empty")
        return self


class Detect(DenseMethod):
    """The losses of proposals, classes, boxes and masks, added up."""

    task = "detect"
    mean: Tensor
    std: Tensor

    def __init__(self, config: DetectConfig, images: DenseSet) -> None:
        super().__init__()
        self.config, self.image_size = config, config.views.size
        self.hold(MapBackbone(config.student))
        self.start(config)
        for name in ("mean", "std"):  # which the network, built around the ViT alone, has not
            self.register_buffer(name, getattr(self.backbone, name).clone(), persistent=False)
        self.network = MaskRCNN(self._pyramid(config), len(images.classes), config.heads)
        self.facts = {"classes": list(images.classes), **images.facts}

    def _pyramid(self, config: DetectConfig) -> SimplePyramid:
        vit: Any = self.backbone.net
        check_plain(vit)
        depth = len(vit.blocks)
        chosen = config.global_blocks or global_blocks(depth)
        if beyond := [number for number in chosen if not 0 <= number < depth]:
            raise UserError(f"method.global_blocks {beyond[0]}: the network has blocks 0 to {depth - 1}")
        net = ViTDet(vit, config.window, sorted({*range(depth)} - {*chosen}), config.views.size)
        if config.views.size % net.stride:
            raise UserError(f"method.views.size {config.views.size}: takes multiples of {net.stride}, one patch")
        return SimplePyramid(net, net.width, net.stride, config.heads.channels)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        losses = self.network(self.normalise(batch.images), batch.target)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def found(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Found]:
        """What is found in images (B, 3, S, S) in [0, 1] whose pictures are ``sizes`` large."""
        return self.network.found(self.normalise(images), sizes)

    def dry_step(self, images: Tensor) -> None:
        self.network.dry_step(self.normalise(images))
