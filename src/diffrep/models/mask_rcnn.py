"""Mask R-CNN of torchvision's parts on a pyramid of maps, with the losses and regions of detectron2's ViTDet.

He, Gkioxari, Dollar, Girshick 2017. torchvision gives anchors, matching, sampling, suppression and heads; written here
is what it has no setting for: L1 losses of boxes, regions read with pixel centres at .5 and as many samples as they
have pixels, masks compared after the same reading, and images that come in one size.
Deviations from detectron2: anchors have whole-numbered sides, boxes below 0.01 pixels are dropped, background is
class 0 in the heads and has boxes and masks of its own that nothing trains. Anchors and regions to compare are drawn
by torchvision, so they depend on how a batch is split over processes.
Letters: B images, S their side, n objects, R regions, K classes, C channels of the pyramid, M side of a mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.config import Config
from diffrep.models.vitdet import ChannelNorm, SimplePyramid

Found = dict[str, Tensor]  # boxes (n, 4) in input pixels, labels (n,) 0..K-1, scores (n,), masks (n, M, M) in [0, 1]
CANONICAL = (224, 4)  # a region of 224 x 224 pixels is read at stride 2^4: Lin et al. 2017 (FPN), eq. 1
RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors
BOX_CELLS, MASK_CELLS = 7, 14  # of a region, per side
SAMPLED_ANCHORS = 256  # of an image, half of them on objects where there are as many


class HeadConfig(Config):
    """What stands on the pyramid; the defaults are ViTDet's."""

    channels: int = Field(256, ge=1)  # of the pyramid and of every convolution on it
    box_width: int = Field(1024, ge=1)  # of the layer before a region's class and box
    num_convs: int = Field(4, ge=1)  # before the box's linear layer, and before the mask's upsampling
    anchors: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)  # pixels, p2 to p6
    candidates: tuple[int, int] = (2000, 1000)  # boxes a level proposes in training and in the test
    proposals: int = Field(1000, ge=1)  # of an image that the heads see, after suppression
    regions: int = Field(512, ge=1)  # of an image that training compares with the truth, a quarter of them objects
    score: float = Field(0.05, ge=0, lt=1)  # least score of a detection
    overlap: float = Field(0.5, gt=0, le=1)  # IoU with a better detection of its class that suppresses one
    detections: int = Field(100, ge=1)  # per image


class MaskRCNN(nn.Module):
    """Normalised images (B, 3, S, S) to losses, or to what is found in them."""

    def __init__(self, backbone: SimplePyramid, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        _torchvision_compat.install_detection()
        self.backbone, self.config = backbone, config
        self.rpn = _proposer(config)
        self.regions = _heads(config, num_classes, backbone.strides[:4])
        _initialise(self.regions)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses by name.

        Args:
            targets: of each image boxes (n, 4) in pixels, labels (n,) int64 from 0, masks (n, S, S) bool.
        """
        features, sizes = self.backbone(images), [(images.shape[2], images.shape[3])] * len(images)
        truths = [target | {"labels": target["labels"] + 1} for target in targets]
        proposals, losses = self._propose(images, features, sizes, truths)
        return losses | self._region_losses(list(features.values())[:4], proposals, truths)

    @torch.no_grad()
    def found(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Found]:
        """What is found in each image, best first.

        Args:
            sizes: height and width of the picture at the top left of each; no box reaches beyond.
        """
        features, heads = self.backbone(images), self.regions
        proposals, _ = self._propose(images, features, sizes, None)
        levels = list(features.values())[:4]
        scores, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, proposals)))
        found = heads.postprocess_detections(scores.float(), deltas.float(), proposals, sizes)
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, found[0])))
        counts, labels = [len(boxes) for boxes in found[0]], torch.cat(found[2])
        masks = logits[torch.arange(len(labels), device=labels.device), labels].float().sigmoid().split(counts)
        return [
            {"boxes": boxes, "labels": labels - 1, "scores": scores, "masks": mask}
            for boxes, scores, labels, mask in zip(*found, masks, strict=True)
        ]

    def _propose(
        self, images: Tensor, features: dict[str, Tensor], sizes: list[tuple[int, int]], truths: list[Found] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Boxes that may hold an object, (r, 4) of each image, and their losses where there is a truth."""
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        logits, deltas = self.rpn.head(list(features.values()))
        anchors = [self.anchors([level.shape[2:] for level in logits], images.device)] * len(images)
        counts = [level.shape[1:].numel() for level in logits]
        logits, deltas = (flat.float() for flat in concat_box_prediction_layers(logits, deltas))
        boxes = self.rpn.box_coder.decode(deltas.detach(), anchors).view(len(images), -1, 4)
        proposals, _ = self.rpn.filter_proposals(boxes, logits, sizes, counts)
        if truths is None:
            return proposals, {}
        return proposals, self._proposal_losses(logits.flatten(), deltas, anchors, truths)

    def anchors(self, grids: list[torch.Size], device: torch.device) -> Tensor:
        """(A, 4) of all levels, whose maps have these heights and widths."""
        generator = self.rpn.anchor_generator
        generator.set_cell_anchors(torch.float32, device)
        return torch.cat(generator.grid_anchors(grids, [(stride, stride) for stride in self.backbone.strides]))

    def _proposal_losses(
        self, logits: Tensor, deltas: Tensor, anchors: list[Tensor], truths: list[Found]
    ) -> dict[str, Tensor]:
        """Of the sampled anchors of each image: is there an object, and where (L1)."""
        labels, boxes = self.rpn.assign_targets_to_anchors(anchors, truths)
        wanted = torch.cat(self.rpn.box_coder.encode(boxes, anchors))
        positive, negative = (torch.cat(chosen).bool() for chosen in self.rpn.fg_bg_sampler(labels))
        sampled = positive | negative
        count = SAMPLED_ANCHORS * len(truths)
        objectness = F.binary_cross_entropy_with_logits(logits[sampled], torch.cat(labels)[sampled], reduction="sum")
        placed = F.l1_loss(deltas[positive], wanted[positive], reduction="sum")
        return {"objectness_loss": objectness / count, "proposal_loss": placed / count}

    def _region_losses(self, levels: list[Tensor], proposals: list[Tensor], truths: list[Found]) -> dict[str, Tensor]:
        """Of the sampled regions: class, box (L1) of its own class, mask of those that hold an object."""
        heads = self.regions
        regions, matched, labels, wanted = heads.select_training_samples(proposals, truths)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, regions)))
        of_all, held = torch.cat(labels), torch.cat(labels) > 0
        own = deltas.float().unflatten(1, (-1, 4))[held, of_all[held]]
        placed = F.l1_loss(own, torch.cat(wanted)[held], reduction="sum") / len(of_all)
        return {
            "class_loss": F.cross_entropy(logits.float(), of_all),
            "box_loss": placed,
            "mask_loss": self._mask_loss(levels, regions, matched, labels, truths),
        }

    def _mask_loss(
        self, levels: list[Tensor], regions: list[Tensor], matched: list[Tensor], labels: list[Tensor],
        truths: list[Found],
    ) -> Tensor:  # fmt: skip
        heads, held = self.regions, [of_image > 0 for of_image in labels]
        boxes, kinds = [r[h] for r, h in zip(regions, held, strict=True)], torch.cat(labels)[torch.cat(held)]
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, boxes)))
        if not len(kinds):
            return logits.sum() * 0  # the heads have a gradient all the same
        wanted = [
            mask_targets(truth["masks"], box, match[h], logits.shape[-1])
            for truth, box, match, h in zip(truths, boxes, matched, held, strict=True)
        ]
        own = logits[torch.arange(len(kinds), device=kinds.device), kinds].float()
        return F.binary_cross_entropy_with_logits(own, torch.cat(wanted))

    def dry_step(self, images: Tensor) -> None:
        """What a step costs, on shapes alone: every region that training may compare, and no suppression."""
        features, heads, config = self.backbone(images), self.regions, self.config
        logits, deltas = self.rpn.head(list(features.values()))
        regions = len(images) * config.regions
        box = images.new_zeros(regions, config.channels, BOX_CELLS, BOX_CELLS, requires_grad=True)
        mask = images.new_zeros(regions // 4, config.channels, MASK_CELLS, MASK_CELLS, requires_grad=True)
        answers = [*logits, *deltas, *heads.box_predictor(heads.box_head(box))]
        answers.append(heads.mask_predictor(heads.mask_head(mask)))
        torch.stack([answer.sum() for answer in answers]).sum().backward()


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """(R, M, M) float32, 0 or 1: what each box (R, 4) shows of its object's mask, (n, S, S) bool."""
    import torchvision

    if not len(masks):
        return boxes.new_zeros(0, side, side)
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    shown = torchvision.ops.roi_align(masks[:, None].to(boxes), rois, side, 1.0, 0, True)
    return (shown[:, 0] >= 0.5).float()


class RegionPool(nn.Module):
    """Regions as cells of the level that fits their size: levels and boxes of each image -> (R, C, P, P)."""

    def __init__(self, cells: int, strides: list[int]) -> None:
        super().__init__()
        self.cells, self.strides = cells, strides

    def forward(self, levels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        import torchvision

        rois = torch.cat([F.pad(of_image, (1, 0), value=number) for number, of_image in enumerate(boxes)])
        level, pooled, rows = self.level(rois[:, 1:]), [], []
        for number, (features, stride) in enumerate(zip(levels, self.strides, strict=True)):
            rows.append((level == number).nonzero()[:, 0])
            exact = features.float()  # half precision knows no pixel of a large image
            pooled.append(torchvision.ops.roi_align(exact, rois[rows[-1]], self.cells, 1 / stride, 0, True))
        return torch.cat(pooled)[torch.cat(rows).argsort()]

    def level(self, boxes: Tensor) -> Tensor:
        """(R,) int64, the position among the levels: FPN's eq. 1."""
        side, stride = CANONICAL
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        exponent = (stride + (area.clamp(min=0).sqrt() / side + 1e-8).log2()).floor()
        first = self.strides[0].bit_length() - 1
        return (exponent - first).clamp(0, len(self.strides) - 1).long()


def _proposer(config: HeadConfig) -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

    anchors = AnchorGenerator(tuple((side,) for side in config.anchors), (RATIOS,) * len(config.anchors))
    head = RPNHead(config.channels, len(RATIOS), conv_depth=2)
    before = dict(zip(("training", "testing"), config.candidates, strict=True))
    after = dict.fromkeys(before, config.proposals)
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, SAMPLED_ANCHORS, 0.5, before, after, nms_thresh=0.7)


def _heads(config: HeadConfig, num_classes: int, strides: list[int]) -> Any:
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads

    width, widths = config.channels, [config.channels] * config.num_convs
    return RoIHeads(
        RegionPool(BOX_CELLS, strides),
        FastRCNNConvFCHead((width, BOX_CELLS, BOX_CELLS), widths, [config.box_width], norm_layer=ChannelNorm),
        FastRCNNPredictor(config.box_width, num_classes + 1),
        fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=config.regions, positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=config.score, nms_thresh=config.overlap, detections_per_img=config.detections,
        mask_roi_pool=RegionPool(MASK_CELLS, strides),
        mask_head=MaskRCNNHeads(width, widths, 1, norm_layer=ChannelNorm),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
    )  # fmt: skip


def _initialise(heads: Any) -> None:
    """detectron2's: small last layers, so that a fresh detector says background everywhere."""
    for layer in heads.box_head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    last = heads.box_predictor.cls_score, heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits
    for layer, std in zip(last, (0.01, 0.001, 0.001), strict=True):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
