"""CIFAR classifiers of the distillation literature, under names of their own in timm's registry.

Sources: RepDistiller (resnet, wrn, vgg, resnetv2), akamaster (shortcut="pad"), FastDFKD (the same networks), DM-KD's
cifarresnet (stem_relu=False); small ones for phones stand in cifar_mobile.py. Deviations: every classifier is called
``fc``, the shortcuts of ResNet-18 and larger ``downsample`` as in timm (models/convert.py reads the official names);
an image size that the official pooling would crop or break on is refused.
Letters: B images, C H W as usual, D width of the pooled vector, K classes, n blocks of a stage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.models.cifar_mobile import MobileNetV2Half, ShuffleNetV1, ShuffleNetV2
from diffrep.models.cifar_parts import CifarNetwork, conv, feature, stage
from diffrep.taps import find_module


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015)."""

    def __init__(self, width_in: int, width: int, stride: int, shortcut: str = "conv") -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(width_in, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv(width, width, 3), nn.BatchNorm2d(width), nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            by_conv = shortcut == "conv"
            self.downsample = _projection(width_in, width, stride) if by_conv else PadShortcut(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + kept)


def _projection(width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv(width_in, width, 1, stride), nn.BatchNorm2d(width))


class PadShortcut(nn.Module):
    """Option A of He et al.: every ``stride``-th row and column, and channels of zeros on both sides."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (width - width_in) // 2
        self.behind = width - width_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


class CifarResNet(CifarNetwork):
    """ResNet of depth 6n + 2 in three stages.

    depth, widths: of the network; widths are those of stem and stages.
    shortcut: "conv" (RepDistiller; 32-pixel images alone) or "pad" (akamaster; any size).
    """

    def __init__(
        self, depth: int, widths: tuple[int, ...], num_classes: int = 0, in_chans: int = 3, shortcut: str = "conv"
    ) -> None:
        super().__init__()
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"shortcut '{shortcut}' is not known; valid: conv, pad")
        self.shortcut, blocks = shortcut, (depth - 2) // 6
        block = partial(BasicBlock, shortcut=shortcut)
        self.conv1, self.bn1, self.act1 = conv(in_chans, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.ReLU()
        self.layer1 = stage(block, widths[0], widths[1], blocks, 1)
        self.layer2 = stage(block, widths[1], widths[2], blocks, 2)
        self.layer3 = stage(block, widths[2], widths[3], blocks, 2)
        last = f"{blocks - 1}.act2"
        self.feature_info = [feature("act1", widths[0], 1)] + [
            feature(f"layer{i}", widths[i], 2 ** (i - 1), f"layer{i}.{last}") for i in (1, 2, 3)
        ]
        self.finish(widths[3], num_classes, map_size=8 if shortcut == "conv" else None)

    def initialise(self, module: nn.Module) -> None:
        if self.shortcut == "conv":
            super().initialise(module)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))  # (B, D, H/4, W/4)


class WideBlock(nn.Module):
    """A pre-activation block; where the width changes, the shortcut starts from the activated input."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(width_in), nn.ReLU(), conv(width_in, width, 3, stride)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(), conv(width, width, 3)
        self.convShortcut = conv(width_in, width, 1, stride) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        kept = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(self.act2(self.bn2(self.conv1(active)))) + kept


class WideResNet(CifarNetwork):
    """WRN-d-k (Zagoruyko and Komodakis 2016) without dropout: three stages of (d - 4)/6 blocks; 32-pixel images."""

    def __init__(self, depth: int, width: int, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = conv(in_chans, widths[0], 3)
        self.block1 = self._stage(widths[0], widths[1], blocks, 1)
        self.block2 = self._stage(widths[1], widths[2], blocks, 2)
        self.block3 = self._stage(widths[2], widths[3], blocks, 2)
        self.bn1, self.act = nn.BatchNorm2d(widths[3]), nn.ReLU()
        # A stage ends in a raw sum: its value before a ReLU is what the next batch norm makes of it.
        self.feature_info = [
            feature("conv1", widths[0], 1),
            feature("block1", widths[1], 1, "block2.layer.0.act1"),
            feature("block2", widths[2], 2, "block3.layer.0.act1"),
            feature("block3", widths[3], 4, "act"),
        ]
        self.finish(widths[3], num_classes, map_size=8)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(OrderedDict(layer=stage(WideBlock, width_in, width, blocks, stride)))

    def initialise(self, module: nn.Module) -> None:
        super().initialise(module)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))  # (B, D, H/4, W/4)


VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(CifarNetwork):
    """VGG with batch norm and one linear layer; images of 64 pixels are halved once more before the last block."""

    def __init__(self, depth: int, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        counts, width_in = VGG_CONVOLUTIONS[depth], in_chans
        self.feature_info = []
        for i, (width, count) in enumerate(zip(VGG_WIDTHS, counts, strict=True)):
            setattr(self, f"block{i}", self._block(width_in, width, count))
            before_relu = f"block{i}.{3 * count - 1}" if i else None
            self.feature_info.append(feature(f"block{i}", width, 2 ** min(i, 3), before_relu))
            width_in = width
        self.finish(width_in, num_classes)

    @staticmethod
    def _block(width_in: int, width: int, count: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for j in range(count):
            convolution = nn.Conv2d(width if j else width_in, width, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers)

    def initialise(self, module: nn.Module) -> None:
        super().initialise(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        halvings = 4 if x.shape[-2] == 64 else 3
        for i in range(5):
            x = getattr(self, f"block{i}")(x)
            x = F.max_pool2d(x, 2) if i < halvings else x
        return x  # (B, 512, 4, 4)


def resnet_with_small_stem(name: str, stem_relu: bool = True, **options: Any) -> nn.Module:
    """timm's own ``name`` with a 3x3 stem of stride 1 and no max-pooling; parameters keep timm's names.

    stem_relu: DM-KD's cifarresnet forgets the ReLU behind the stem; False builds that network.
    """
    from timm.models import resnet

    network = getattr(resnet, name)(**options)
    network.conv1 = nn.Conv2d(network.conv1.in_channels, 64, 3, padding=1, bias=False)  # timm's is 7x7 with stride 2
    network.maxpool = nn.Identity()
    if not stem_relu:
        network.act1 = nn.Identity()
    network.feature_info = [feature("act1", 64, 1)]
    for i, layer in enumerate((network.layer1, network.layer2, network.layer3, network.layer4)):
        last_relu = f"layer{i + 1}.{len(layer) - 1}.{'act3' if hasattr(layer[-1], 'conv3') else 'act2'}"
        width = network.num_features // 2 ** (3 - i)
        network.feature_info.append(feature(f"layer{i + 1}", width, 2**i, last_relu))
    return network


# The name in timm's registry -> what builds it from keywords (num_classes, in_chans and the options above).
ENTRIES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{d}_cifar": partial(CifarResNet, d, (16, 16, 32, 64)) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4_cifar": partial(CifarResNet, d, (32, 64, 128, 256)) for d in (8, 32)},
    **{f"resnet{d}_cifar": partial(resnet_with_small_stem, f"resnet{d}") for d in (18, 34, 50)},
    **{f"wrn_{d}_{k}_cifar": partial(WideResNet, d, k) for d in (16, 40) for k in (1, 2)},
    **{f"vgg{d}_cifar": partial(VGG, d) for d in VGG_CONVOLUTIONS},
    "mobilenetv2_half_cifar": MobileNetV2Half,
    "shufflenetv1_cifar": ShuffleNetV1,
    "shufflenetv2_cifar": ShuffleNetV2,
}


def features(network: nn.Module, x: Tensor, preact: bool = False) -> list[Tensor]:
    """What distillation reads along the way: stem, stages, pooled vector, as RepDistiller's ``is_feat`` lists them.

    Args:
        network: one of this page; its ``feature_info`` names the places in timm's words.
        x: (B, C, H, W), already normalised.
        preact: read stages before their last ReLU (MobileNetV2's end without one).

    Returns:
        (B, C, h, w) for each place, then (B, D).
    """
    places = getattr(network, "feature_info", None)
    if not isinstance(places, list):
        raise UserError(f"{type(network).__name__} does not say where its features are (no list feature_info)")
    found: list[Tensor] = []  # a pass reaches every place once, in their order
    handles = []
    for place in [*places, feature("global_pool", 0, 0)]:
        if preact and "preact" in place:
            module = find_module(network, place["preact"])
            # timm's ReLU writes over its input, hence the copy.
            handles.append(module.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0].clone())))
        else:
            module = find_module(network, place["module"])
            handles.append(module.register_forward_hook(lambda _m, _i, output: found.append(output)))
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found
