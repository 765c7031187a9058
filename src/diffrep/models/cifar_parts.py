"""What the CIFAR classifiers share: timm's words, pooling, the usual initial weights, stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffrep.errors import UserError


class CifarNetwork(nn.Module):
    """A network that ends in a map, its mean over places and one linear layer ``fc``, in timm's words.

    feature_info: where features are read (timm's list of num_chs, reduction and module); ``preact`` beside them names
        the ReLU whose input is the stage's value before activation.
    """

    feature_info: list[dict[str, Any]]

    def finish(self, num_features: int, num_classes: int, map_size: int | None = None) -> None:
        """The end of every constructor: initial weights, pooling, classifier."""
        self.apply(self.initialise)
        self.num_features = num_features
        self.global_pool = MeanOverPlaces(map_size, type(self).__name__)
        self.reset_classifier(num_classes)

    def initialise(self, module: nn.Module) -> None:
        """Normal weights of variance 2 / fan-out in convolutions; batch norm is born with 1 and 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.initialise(self.fc)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)  # (B, D)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class MeanOverPlaces(nn.Module):
    """(B, D, h, w) -> (B, D).

    size: the official code pools a window of this size, which is the whole map for 32-pixel images alone; of larger
        maps it would leave places out, or break the classifier. None: any map.
    """

    def __init__(self, size: int | None, owner: str) -> None:
        super().__init__()
        self.size, self.owner = size, owner

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.size and (height, width) != (self.size, self.size):
            whole = f"its last map is {height}x{width} instead of {self.size}x{self.size}"
            raise UserError(f"{self.owner} takes 32-pixel images alone ({whole})")
        return x.mean((2, 3))


def feature(module: str, width: int, reduction: int, preact: str | None = None) -> dict[str, Any]:
    """One entry of ``feature_info``."""
    place = {"num_chs": width, "reduction": reduction, "module": module}
    return place | ({"preact": preact} if preact else {})


def conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution as batch norm wants it: no bias, padded to keep the size."""
    return nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], width_in: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """``count`` blocks of (width in, width, stride); the first changes width and size."""
    return nn.Sequential(block(width_in, width, stride), *(block(width, width, 1) for _ in range(count - 1)))
