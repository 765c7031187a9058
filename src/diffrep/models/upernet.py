"""UperNet: a pyramid of maps, pooled at its top, walked down and read all at once; over a plain ViT or any stages.

Source: Xiao et al., ECCV 2018; mmseg 0.30's `UPerHead`, `FCNHead` and, for a ViT, `Feature2Pyramid`, whose parameter
names are kept.
Letters: B images, C H W as usual, L maps, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.models.fcn import DROPOUT, ConvNorm, FCNHead, classifier, resized
from diffrep.models.maps import MapBackbone

POOL_SCALES = (1, 2, 3, 6)  # bins of the pooling at the top
SIDE_WIDTH = 256  # of the side head


class Feature2Pyramid(nn.Module):
    """Four maps (B, width, H, W) of one size -> four of 4, 2, 1 and 1/2 times that size, equally wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.upsample_4x = nn.Sequential(_doubled(width), nn.BatchNorm2d(width), nn.GELU(), _doubled(width))
        self.upsample_2x = nn.Sequential(_doubled(width))
        self.downsample_2x = nn.MaxPool2d(2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, last = maps
        return [self.upsample_4x(first), self.upsample_2x(second), third, self.downsample_2x(last)]


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, 2)


class UPerHead(nn.Module):
    """L maps (B, channels[l], H_l, W_l), finest first -> logits (B, K, H_0, W_0).

    scales: into how many fields a side of the last map is pooled.
    """

    def __init__(
        self, channels: Sequence[int], width: int, num_classes: int, scales: Sequence[int] = POOL_SCALES
    ) -> None:
        super().__init__()
        *lower, top = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvNorm(top, width, 1)) for bins in scales
        )
        self.bottleneck = ConvNorm(top + len(scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(each, width, 1) for each in lower)
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in lower)
        self.fpn_bottleneck = ConvNorm(len(channels) * width, width, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        lower = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=False)]
        above = top = self._pooled(maps[-1])
        walked = []
        for conv, x in zip(reversed(self.fpn_convs), reversed(lower), strict=True):
            above = x + resized(above, x.shape[2:])
            walked.append(conv(above))
        size = maps[0].shape[2:]
        pyramid = [resized(x, size) for x in [*reversed(walked), top]]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(pyramid, 1))))

    def _pooled(self, x: Tensor) -> Tensor:
        """The last map beside its own averages over fields."""
        fields = [resized(pool(x), x.shape[2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([x, *fields], 1))


class UperNet(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, K, h, w), and in training also those of a side head.

    Args:
        backbone: two or more maps; four of one size, as a plain ViT's, first become a pyramid.
        width: of the head; None: the last map's, as published for ViTs.
        side_width: of the side head on the last map but one.

    Raises:
        UserError: too few maps.
    """

    def __init__(
        self, backbone: MapBackbone, num_classes: int, width: int | None = None, side_width: int | None = None
    ) -> None:
        super().__init__()
        channels, strides = tuple(backbone.widths), tuple(backbone.strides)
        if len(channels) < 2:
            raise UserError(f"method.head 'upernet' reads two or more maps; the backbone gives {len(channels)}")
        self.backbone, is_plain = backbone, len(set(strides)) == 1
        if is_plain and len(channels) != 4:
            raise UserError(f"method.maps: 'upernet' makes a pyramid of four equal maps; there are {len(channels)}")
        self.neck = Feature2Pyramid(channels[0]) if is_plain else nn.Identity()
        self.decode_head = UPerHead(channels, width or channels[-1], num_classes)
        self.auxiliary_head = FCNHead(channels[-2], side_width or SIDE_WIDTH, num_classes)

    def all_logits(self, images: Tensor) -> list[Tensor]:
        """Of the main head at the finest map's size, then of the side head at the last but one's."""
        maps = self.neck(self.backbone(images))
        return [self.decode_head(maps), self.auxiliary_head(maps[-2])]

    def forward(self, images: Tensor) -> Tensor:
        return self.decode_head(self.neck(self.backbone(images)))
