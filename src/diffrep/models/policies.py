"""Policy networks: images (B, 3, H, W) in [0, 1] -> logits (B, A) over A timesteps; and plain MLPs.

Source: `PolicyNet`, `PolicyNet_Cov`, `PolicyNet_Cov64` of the official RepFusion code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.errors import UserError


def policy_network(kind: str, num_choices: int, image_size: int) -> nn.Module:
    """images (B, 3, H, W) in [0, 1] -> logits (B, A); ``conv`` and ``mlp`` are the official networks' layers."""
    if kind == "small":
        return SmallPolicy(num_choices)
    if kind == "mlp":
        return OfficialPolicy([], 3 * image_size**2, (128, 128), num_choices)
    widths = {32: [6, 16], 64: [6, 16, 16]}.get(image_size)
    if widths is None:
        raise UserError(f"policy 'conv' is made for 32 or 64 pixels, not {image_size}; use 'small'")
    return OfficialPolicy(widths, {32: 400, 64: 256}[image_size], (120, 84), num_choices)


class SmallPolicy(nn.Module):
    """Two strided convolutions and a pool; the last layer starts at zero, so the first proposal is uniform."""

    def __init__(self, num_choices: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(32, num_choices)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images * 2 - 1))))
        return self.fc(x.mean((2, 3)))


class OfficialPolicy(nn.Module):
    """The official policies: 5x5 convolutions each with ReLU and 2x2 max-pool, then three linear layers.

    Source: `PolicyNet` (no convolutions), `PolicyNet_Cov`, `PolicyNet_Cov64`, whose parameter names are kept; they
    end in a softmax, this in logits.
    """

    def __init__(self, widths: list[int], flat: int, hidden: tuple[int, int], num_choices: int) -> None:
        super().__init__()
        self.num_convs = len(widths)
        for i, (width_in, width) in enumerate(zip([3, *widths], widths, strict=False), 1):
            self.add_module(f"conv{i}", nn.Conv2d(width_in, width, 5))
        self.fc1, self.fc2 = nn.Linear(flat, hidden[0]), nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], num_choices)

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2 - 1
        for i in range(1, self.num_convs + 1):
            x = F.max_pool2d(F.relu(self.get_submodule(f"conv{i}")(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    return nn.Sequential(*_layers(widths))


def _layers(widths: tuple[int, ...]) -> Iterator[nn.Module]:
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        if i:
            yield nn.ReLU()
        yield nn.Linear(width_in, width_out)
