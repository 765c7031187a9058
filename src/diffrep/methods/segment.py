"""Segmentation: the class of every pixel, by BiSeNet or UperNet on a backbone from scratch or from a run.

Sources: RepFusion's `segmentation` configs and zllrunning's face parser (BiSeNet); mmseg's MAE recipe (UperNet), which
ADDP's figures are compared with. Cross-entropy is divided by all pixels, ignored ones too, as mmseg does.
Deviations: classes are as many as the labels (the official face parser has 18 for 19); where several GPUs train, all
batch norms are synchronised (official: not those of BiSeNet's paths).
Letters: B images, H W as usual, K classes.
"""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.data.batch import Batch
from diffrep.data.dense import IGNORED, DenseSet
from diffrep.data.segment_views import SegmentViews
from diffrep.errors import UserError
from diffrep.methods.dense import DenseConfig, DenseMethod
from diffrep.models.bisenet import BiSeNet
from diffrep.models.fcn import resized
from diffrep.models.maps import MapBackbone
from diffrep.models.upernet import UperNet
from diffrep.randomness import Rows

SIDE_WEIGHTS = {"bisenet": 1.0, "upernet": 0.4}  # of the loss of each side head, as published


class SegmentConfig(DenseConfig):
    """Head, loss and views of a segmentation network."""

    kind: Literal["segment"] = "segment"
    views: SegmentViews = SegmentViews()
    head: Literal["bisenet", "upernet"] = "bisenet"
    width: int | None = Field(None, ge=1)  # channels of the main head; None: as published, from the backbone's
    side_width: int | None = Field(None, ge=1)  # channels of the side heads; None: as published
    spatial: tuple[int, int, int, int] | None = None  # channels of BiSeNet's spatial path; None: as published
    side_weight: float | None = Field(None, ge=0)  # of each side head's loss; None: as published, see SIDE_WEIGHTS
    loss: Literal["ce", "ohem"] = "ce"  # ohem: only the hard pixels count, of those that a device sees at once
    hard_below: float = Field(0.7, gt=0, lt=1)  # ohem: a pixel is hard whose true class has less probability
    hard_share: float = Field(1 / 16, gt=0, le=1)  # ohem: where fewer are hard, the hardest pixels up to this share


class Segment(DenseMethod):
    """Cross-entropy of each pixel, in the main head and in those that only help training."""

    task = "segment"

    def __init__(self, config: SegmentConfig, images: DenseSet) -> None:
        super().__init__()
        self.config = config
        self.hold(MapBackbone(config.student, config.maps, config.fuse_upsample))
        _check_sides(config, self.backbone)
        self.start(config)
        self.network = synchronised(_network(config, self.backbone, len(images.classes)))
        self.side_weight = SIDE_WEIGHTS[config.head] if config.side_weight is None else config.side_weight
        self.image_size = config.views.crop
        self.facts = {"classes": list(images.classes), **images.facts}

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        """batch.target: (B, H, W) classes, 255 = ignored."""
        self._comparable(batch.images)
        main, *sides = self.network.all_logits(batch.images)
        label = batch.target.to(torch.int64)
        main_loss, side_loss = self._loss(main, label), sum(self._loss(side, label) for side in sides)
        return {
            "loss": main_loss + self.side_weight * side_loss,
            "main_loss": main_loss,
            "side_loss": side_loss,
            "train_pixel_accuracy": pixel_accuracy(main.detach(), label),
        }

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.config.loss == "ce":
            return pixel_cross_entropy(logits, label)
        return hard_cross_entropy(logits, label, self.config.hard_below, self.config.hard_share)

    def _comparable(self, images: Tensor) -> None:
        """Both heads norm pooled vectors, over nothing but the batch."""
        if self.training and len(images) < 2 and not _has_several_gpus():
            told = "batch norm of a single picture's mean is not defined"
            raise UserError(f"train.batch_size, train.micro_batch_size: {told}; let steps see two or more at once")

    def dry_step(self, images: Tensor) -> None:
        for module in self.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.eval()  # would look for other processes
        torch.stack([logits.sum() for logits in self.network.all_logits(images)]).sum().backward()


def _check_sides(config: SegmentConfig, backbone: MapBackbone) -> None:
    """Squares that a plain ViT, whose maps are all of one size, is shown."""
    patch, views = max(backbone.strides), config.views
    sides = {"crop": views.crop} | ({"window": views.window} if views.test == "slide" else {})
    for name, side in sides.items():
        if min(backbone.strides) == patch and side % patch:
            raise UserError(f"method.views.{name} = {side}: {config.student.name} takes multiples of {patch} pixels")


def _network(config: SegmentConfig, backbone: MapBackbone, num_classes: int) -> nn.Module:
    if config.head == "bisenet":
        return BiSeNet(backbone, num_classes, config.spatial, config.width, config.side_width)
    if config.spatial is not None:
        raise UserError("method.spatial: 'upernet' has no spatial path; it belongs to head 'bisenet'")
    return UperNet(backbone, num_classes, config.width, config.side_width)


def _has_several_gpus() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available()


def synchronised(network: nn.Module) -> nn.Module:
    """With batch norms over all processes, where several train on GPUs; the names of tensors stay."""
    if not _has_several_gpus():
        return network
    _torchvision_compat.install()
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(network)


# Losses of logits (B, K, h, w), brought to the size of a label (B, H, W) int64


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """The sum over pixels that have a class, divided by all; so a batch without any has loss 0, not NaN.

    Source: mmseg's `CrossEntropyLoss` with `avg_non_ignore=False`.
    """
    each = resized(logits.float(), label.shape[1:])
    return F.cross_entropy(each, label, ignore_index=IGNORED, reduction="sum") / label.numel()


def hard_cross_entropy(logits: Tensor, label: Tensor, below: float, share: float) -> Tensor:
    """The mean over pixels whose true class has less probability than ``below``, or else over the hardest.

    share: of all pixels; where fewer are hard, the hardest count up to this share.

    Source: Shrivastava et al., CVPR 2016; zllrunning's `OhemCELoss`.
    """
    each = resized(logits.float(), label.shape[1:])
    each = F.cross_entropy(each, label, ignore_index=IGNORED, reduction="none").flatten()
    hard, least = each[each > -math.log(below)], max(1, int(share * each.numel()))
    return hard.mean() if len(hard) > least else each.topk(least).values.mean()


def pixel_accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """The share of pixels with a class that are right."""
    known = label != IGNORED
    right = (resized(logits.float(), label.shape[1:]).argmax(1) == label) & known
    return right.sum() / known.sum().clamp(min=1)
