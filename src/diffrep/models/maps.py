"""A backbone as a stack of maps, finest first: what the heads of dense tasks read.

Letters: B images, C H W as usual.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.models.students import StudentConfig


class MapBackbone(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> maps [(B, C, H / stride, W / stride), ...], finest first.

    net: the network under timm's names, without a classifier; widths, strides: of each map.
    """

    net: nn.Module
    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def __init__(self, config: StudentConfig, names: Sequence[str] = ()) -> None:
        super().__init__()
        _torchvision_compat.install()
        import timm

        self.config = config
        self.net = timm.create_model(config.name, features_only=True, out_indices=(1, 2, 3, 4), **config.options)
        self.widths, self.strides = tuple(self.net.feature_info.channels()), tuple(self.net.feature_info.reduction())

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.net(images))
