"""Official tiny networks of face parsing and segmentation: what their golden cases hold, under our names."""

import torch
from torch import nn

from diffrep import _torchvision_compat

BLOCKS = {18: ("BasicBlock", (2, 2, 2, 2)), 34: ("BasicBlock", (3, 4, 6, 3)), 50: ("Bottleneck", (3, 4, 6, 3))}
BLOCKS |= {101: ("Bottleneck", (3, 4, 23, 3)), 152: ("Bottleneck", (3, 8, 36, 3))}


def is_bisenet(case):
    return case.meta.get("kind") == "BiSeNetV1"


def is_upernet(case):
    return case.meta.get("kind") == "UPerHead+Feature2Pyramid"


class TinyResNet(nn.Module):
    """timm's blocks under timm's names, in widths timm has no name for; images reach it as they are."""

    def __init__(self, depth, stem_channels, base_channels, strides):
        super().__init__()
        _torchvision_compat.install()
        from timm.models import resnet

        kind, counts = BLOCKS[depth]
        block = getattr(resnet, kind)
        self.conv1 = nn.Conv2d(3, stem_channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        width = stem_channels
        for number, (count, stride) in enumerate(zip(counts, strides, strict=True)):
            planes, blocks = base_channels * 2**number, []
            for k in range(count):
                step, out = stride if k == 0 else 1, planes * block.expansion
                changes = step != 1 or width != out
                down = resnet.downsample_conv(width, out, 1, step) if changes else None
                blocks.append(block(width, planes, step, down))
                width = out
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.widths = tuple(base_channels * 2**k * block.expansion for k in range(4))
        self.strides = (4, 8, 16, 32)

    def normalise(self, images):
        return images

    def forward(self, images):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(images)).relu(), 3, 2, 1)
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            found.append(x := stage(x))
        return found


class Given(nn.Module):
    """A backbone whose maps are told."""

    def __init__(self, maps, strides):
        super().__init__()
        self.maps, self.strides, self.widths = maps, strides, tuple(x.shape[1] for x in maps)

    def forward(self, images):
        return self.maps


def renamed(state):
    """Official tensors under our names: the network of the context path stands outside, and paths have no prefix."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("backbone.") if name.startswith("backbone.") else name
        found[name.replace("context_path.backbone.", "backbone.", 1)] = tensor
    return found


def relative(found, wanted):
    """The largest difference, as a share of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny))
