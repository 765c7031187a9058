"""The light CIFAR classifiers of RepDistiller: MobileNetV2 at half width, ShuffleNet and ShuffleNetV2.

All take 32-pixel images alone (their last pooling window is fixed in the official code).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from diffrep.models.cifar_parts import CifarNetwork, conv, feature, stage


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; added to its input where the shape stays."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, self.is_residual = width_in * expansion, stride == 1 and width_in == width
        self.conv = nn.Sequential(
            *(conv(width_in, inner, 1), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner), nn.ReLU()),
            *(conv(inner, width, 1), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


# Per stage: expansion, width (half of the published), units, stride of the first.
MOBILE_STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class MobileNetV2Half(CifarNetwork):
    """MobileNetV2 (Sandler et al. 2018) at half width with plain ReLU; stages end without one."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(conv(in_chans, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks, width_in = nn.Sequential(), 16
        for expansion, width, units, stride in MOBILE_STAGES:
            self.blocks.append(stage(partial(InvertedResidual, expansion=expansion), width_in, width, units, stride))
            width_in = width
        self.conv2 = nn.Sequential(conv(width_in, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU())
        reductions = {1: 2, 2: 4, 4: 8, 6: 16}
        read = [feature(f"blocks.{i}", MOBILE_STAGES[i][1], reductions[i]) for i in reductions]
        self.feature_info = [feature("conv1", 16, 2), *read]
        self.finish(1280, num_classes, map_size=2)

    def initialise(self, module: nn.Module) -> None:
        super().initialise(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv2(self.blocks(self.conv1(x)))  # (B, 1280, H/16, W/16)


class ChannelShuffle(nn.Module):
    """Deal the channels of ``groups`` groups out in turn."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)  # (B, C, H, W)


class ShuffleUnit(nn.Module):
    """1x1 in groups, shuffle, 3x3 per channel, 1x1 in groups; added to its input, or beside it at stride 2."""

    groups = 3

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.is_beside = stride == 2
        branch = width - width_in if self.is_beside else width
        inner, groups = branch // 4, 1 if width_in == 24 else self.groups  # the stem's 24 channels stay together
        self.conv1, self.bn1, self.act1 = conv(width_in, inner, 1, groups=groups), nn.BatchNorm2d(inner), nn.ReLU()
        self.shuffle = ChannelShuffle(groups)
        self.conv2, self.bn2, self.act2 = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner), nn.ReLU()
        self.conv3, self.bn3 = conv(inner, branch, 1, groups=self.groups), nn.BatchNorm2d(branch)
        self.pool = nn.AvgPool2d(3, 2, 1) if self.is_beside else nn.Identity()
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.pool(x)
        x = self.shuffle(self.act1(self.bn1(self.conv1(x))))
        x = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(x)))))
        return self.act3(torch.cat([x, kept], 1) if self.is_beside else x + kept)


class ShuffleNetV1(CifarNetwork):
    """ShuffleNet (Zhang et al. 2018) with three groups behind a 1x1 stem; torch's own initial weights."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(in_chans, 24, 1), nn.BatchNorm2d(24), nn.ReLU()
        self.layer1 = stage(ShuffleUnit, 24, 240, 4, 2)
        self.layer2 = stage(ShuffleUnit, 240, 480, 8, 2)
        self.layer3 = stage(ShuffleUnit, 480, 960, 4, 2)
        self.feature_info = [
            feature("act1", 24, 1),
            feature("layer1", 240, 2, "layer1.3.act3"),
            feature("layer2", 480, 4, "layer2.7.act3"),
            feature("layer3", 960, 8, "layer3.3.act3"),
        ]
        self.finish(960, num_classes, map_size=4)

    def initialise(self, module: nn.Module) -> None:
        """Left as torch made it."""

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))  # (B, 960, H/8, W/8)


class DownBlock(nn.Module):
    """Two branches at half the size, side by side and shuffled."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(width_in, width_in, 3, 2, groups=width_in), nn.BatchNorm2d(width_in)
        self.conv2, self.bn2, self.act2 = conv(width_in, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.conv3, self.bn3, self.act3 = conv(width_in, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.conv4, self.bn4 = conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5, self.act5 = conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.act2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.act3(self.bn3(self.conv3(x)))))
        right = self.act5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))


class SplitBlock(nn.Module):
    """The second half of the channels is worked on, the first passes; then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1, self.act1 = conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.conv2, self.bn2 = conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3, self.act3 = conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, 1)
        x = self.bn3(self.conv3(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))))
        # What passes left a ReLU before: one more does not change it, and its input is the stage's pre-activation.
        return self.shuffle(self.act3(torch.cat([kept, x], 1)))


class ShuffleNetV2(CifarNetwork):
    """ShuffleNetV2 (Ma et al. 2018) of size 1 behind a 1x1 stem; torch's own initial weights."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(in_chans, 24, 1), nn.BatchNorm2d(24), nn.ReLU()
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2, self.bn2, self.act2 = conv(464, 1024, 1), nn.BatchNorm2d(1024), nn.ReLU()
        self.feature_info = [
            feature("act1", 24, 1),
            feature("layer1", 116, 2, "layer1.3.act3"),
            feature("layer2", 232, 4, "layer2.7.act3"),
            feature("layer3", 464, 8, "layer3.3.act3"),
        ]
        self.finish(1024, num_classes, map_size=4)

    @staticmethod
    def _stage(width_in: int, width: int, units: int) -> nn.Sequential:
        return nn.Sequential(DownBlock(width_in, width), *(SplitBlock(width) for _ in range(units)))

    def initialise(self, module: nn.Module) -> None:
        """Left as torch made it."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))
        return self.act2(self.bn2(self.conv2(x)))  # (B, 1024, H/8, W/8)
