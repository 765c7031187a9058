"""BiSeNetV1: a context path sees far, a spatial path sees sharp, a fusion joins them at an eighth of the size.

Source: Yu et al., ECCV 2018, as mmseg 0.30's `BiSeNetV1` builds it; parameter names are its own, but for the network
inside the context path, which stands outside under ``backbone``.
Deviation: where training is distributed on GPUs all batch norms may be synchronised (methods/segment.py); the official
build forgets to say so to the two paths and the fusion, whose norms see one device's images.
Letters: B images, C H W as usual, K classes; x4 .. x32 the backbone's maps, named by their strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.models.fcn import ConvNorm, FCNHead
from diffrep.models.maps import MapBackbone

STRIDES = (4, 8, 16, 32)


class AttentionRefinement(nn.Module):
    """ARM: (B, channels, H, W) -> (B, width, H, W), each channel scaled by what the whole map says of it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_layer = ConvNorm(channels, width, 3)
        self.atten_conv_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNorm(width, width, 1, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_layer(x)
        return x * self.atten_conv_layer(x).sigmoid()


class ContextPath(nn.Module):
    """Maps x8, x16, x32 of ``channels`` -> what is seen at 1/8 and at 1/16, both channels[0] wide."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        width, middle, deep = channels
        self.gap_conv = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNorm(deep, width, 1))
        self.arm16, self.arm32 = AttentionRefinement(middle, width), AttentionRefinement(deep, width)
        self.conv_head16, self.conv_head32 = ConvNorm(width, width, 3), ConvNorm(width, width, 3)

    def forward(self, x8: Tensor, x16: Tensor, x32: Tensor) -> tuple[Tensor, Tensor]:
        up32 = self.arm32(x32) + self.gap_conv(x32)
        up32 = self.conv_head32(F.interpolate(up32, x16.shape[2:]))
        up16 = self.arm16(x16) + up32
        return self.conv_head16(F.interpolate(up16, x8.shape[2:])), up32


class SpatialPath(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, widths[3], H / 8, W / 8) by three strides, and no pooling."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer1 = ConvNorm(3, widths[0], 7, 2)
        self.layer2 = ConvNorm(widths[0], widths[1], 3, 2)
        self.layer3 = ConvNorm(widths[1], widths[2], 3, 2)
        self.layer4 = ConvNorm(widths[2], widths[3], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(images))))


class FeatureFusion(nn.Module):
    """FFM: two maps, ``channels`` together -> (B, width, H, W). Its gate passes a ReLU first: never below a half."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, width, 1)
        self.conv_atten = nn.Sequential(ConvNorm(width, width, 1))

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        fused = self.conv1(torch.cat([spatial, context], 1))
        gate = self.conv_atten(F.adaptive_avg_pool2d(fused, 1)).sigmoid()
        return fused + fused * gate


class BiSeNet(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits at 1/8 of the size, and in training also those of two side heads.

    Every width follows from the backbone's, as in both published sizes.

    Args:
        backbone: four maps of strides 4 to 32; it normalises for both paths.
        spatial: widths of the spatial path; None: the first map's, and last what the third has beyond the second.
        width: of the fusion and the main head; None: the third map's.
        side_width: of the side heads; None: half the second map's.

    Raises:
        UserError: maps of other strides, or widths that do not add up.
    """

    def __init__(
        self,
        backbone: MapBackbone,
        num_classes: int,
        spatial: Sequence[int] | None = None,
        width: int | None = None,
        side_width: int | None = None,
    ) -> None:
        super().__init__()
        first, context, middle, _ = _four(backbone)
        spatial = spatial or (first, first, first, middle - context)
        if len(spatial) != 4 or min(spatial) < 1:
            beside = f"four widths from 1 up; the backbone's are {', '.join(map(str, backbone.widths))}"
            raise UserError(f"method.spatial {list(spatial)}: give {beside}")
        width, side_width = width or middle, side_width or context // 2
        self.backbone = backbone
        self.context_path, self.spatial_path = ContextPath(backbone.widths[1:]), SpatialPath(spatial)
        self.ffm = FeatureFusion(spatial[3] + context, width)
        self.decode_head = FCNHead(width, width, num_classes)
        self.auxiliary_head = nn.ModuleList(FCNHead(context, side_width, num_classes) for _ in range(2))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fused map at 1/8, and the context path's at 1/8 and 1/16."""
        _, x8, x16, x32 = self.backbone(images)
        context8, context16 = self.context_path(x8, x16, x32)
        return self.ffm(self.spatial_path(self.backbone.normalise(images)), context8), context8, context16

    def all_logits(self, images: Tensor) -> list[Tensor]:
        """Of the main head, then of the side heads: (B, K, H / 8, W / 8) twice, (B, K, H / 16, W / 16)."""
        fused, *sides = self.features(images)
        heads = zip(self.auxiliary_head, sides, strict=True)
        return [self.decode_head(fused), *(head(side) for head, side in heads)]

    def forward(self, images: Tensor) -> Tensor:
        return self.decode_head(self.features(images)[0])


def _four(backbone: MapBackbone) -> tuple[int, ...]:
    """The widths of the four maps."""
    strides = tuple(backbone.strides)
    if strides != STRIDES:
        given = f"{len(strides)} of strides {', '.join(map(str, strides))}"
        raise UserError(f"method.head 'bisenet' reads four maps of strides 4, 8, 16, 32; the backbone gives {given}")
    return tuple(backbone.widths)
