"""Parts that heads of maps share: a normed convolution, the FCN head, and maps brought to another size.

Source: mmcv's `ConvModule`, mmseg's `FCNHead`; parameter names are theirs.
Letters: B images, C H W as usual, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # of whole channels before the last layer, in every published head
FINAL_STD = 0.01  # of the last layer's fresh weights


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU unless ``relu`` is False; (B, C, H, W) -> (B, width, H', W').

    An even share of padding keeps the size where ``stride`` is 1.
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer of a head: one linear decision per place."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=FINAL_STD)
    nn.init.zeros_(layer.bias)
    return layer


class FCNHead(nn.Module):
    """A map (B, channels, H, W) -> logits (B, K, H, W) by one 3x3 convolution of ``width`` channels."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(channels, width, 3))
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear with the corners of pixels, not their centres, on each other."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
