"""MobileNetV2 for small images: timm's network, whose stem and third stage keep the size.

Source: RepFusion's ``MobileNetV2_CIFAR``. Names and shapes are those of timm's ``mobilenetv2_100``; strides are no
weights, so its files load there too, but that network then halves twice more. The half-wide one of DM-KD's tables,
whose stem does halve, stands in cifar_mobile.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffrep.models.cifar_parts import feature

REDUCTIONS = (1, 2, 2, 4, 8)  # of the places that timm names: after stages 1, 2, 3, 5 and 7


def mobilenetv2_cifar(**options: Any) -> nn.Module:
    """Images (B, 3, H, W) -> a last map of (B, 1280, H/8, W/8); 2.224 M parameters without a classifier."""
    from timm.models import efficientnet

    network = efficientnet.mobilenetv2_100(**options)
    for convolution in (network.conv_stem, network.blocks[2][0].conv_dw):
        convolution.stride = (1, 1)
    places = zip(network.feature_info, REDUCTIONS, strict=True)
    network.feature_info = [feature(place["module"], place["num_chs"], reduction) for place, reduction in places]
    return network


ENTRIES: dict[str, Callable[..., nn.Module]] = {"mobilenetv2_cifar": mobilenetv2_cifar}
