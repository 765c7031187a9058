"""A network made to learn CIFAR-10 quickly: frozen filters that whiten 2x2 patches, then six 3x3 convolutions.

Source: the speed runs of Jordan 2024 (arXiv 2404.00498). What no source at hand states is said by the recipe.
Letters: B images, C channels, H and W pixels, D width of the pooled vector, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2  # pixels, side of what is whitened
WHITEN_EPS = 5e-4  # added to the eigenvalues, so that directions without variance are not blown up
BLOCK = 256  # images whose patches are in memory at once


class FastCNN(nn.Module):
    """Whitening, three groups that halve the map, its maximum over places and a linear layer without bias.

    widths: channels of the three groups. The first layer is random until :meth:`whiten` has seen training images.
    """

    stem_learns = True  # False: the bias of the first layer gets no gradient

    def __init__(self, num_classes: int = 0, in_chans: int = 3, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, 2 * in_chans * PATCH**2, PATCH)
        self.stem.weight.requires_grad_(False)
        nn.init.zeros_(self.stem.bias)
        for number, (before, after) in enumerate(pairwise((self.stem.out_channels, *widths)), start=1):
            self.add_module(f"layer{number}", _group(before, after))
        self.depth, self.num_features = len(widths), widths[-1]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, bias=False) if num_classes else nn.Identity()
        if num_classes:
            nn.init.normal_(self.head.weight)  # variance 1: forward_head has divided by D already

    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the first layer's answers to patches of ``images`` uncorrelated and of variance 1, in both signs.

        Args:
            images: (B, C, H, W), normalised as the network will see them.
        """
        moments, count = torch.zeros((), dtype=torch.float64, device=images.device), 0
        for block in images.split(BLOCK):
            patches = F.unfold(block.double(), PATCH).transpose(0, 1).flatten(1)  # (4 C, patches)
            moments, count = moments + patches @ patches.T, count + patches.shape[1]
        values, vectors = torch.linalg.eigh(moments / count)
        filters = (vectors / (values + WHITEN_EPS).sqrt()).T.unflatten(1, (-1, PATCH, PATCH))
        self.stem.weight.copy_(torch.cat([filters, -filters]))

    def rate_parts(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the names that ``optim.group_lr`` may give a rate of their own."""
        learnt = [p for p in self.parameters() if p.requires_grad]
        dimensions = {"student": 4, "biases": 1, "head": 2}
        return {name: [p for p in learnt if p.dim() == count] for name, count in dimensions.items()}

    def forward_features(self, x: Tensor) -> Tensor:
        bias = self.stem.bias
        assert bias is not None
        x = F.gelu(F.conv2d(x, self.stem.weight, bias if self.stem_learns else bias.detach()))
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x  # (B, D, h, w), 3x3 of 32-pixel images

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.amax((2, 3)) / self.num_features  # (B, D)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _group(width_in: int, width: int) -> nn.Sequential:
    """Two convolutions, the map halved after the first."""
    first, second = _conv(width_in, width), _conv(width, width)
    return nn.Sequential(first, nn.MaxPool2d(2), _norm(width), nn.GELU(), second, _norm(width), nn.GELU())


def _conv(width_in: int, width: int) -> nn.Conv2d:
    """The first filters hand their inputs on as they are, as far as there are inputs; the others are random."""
    convolution = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:width_in])
    return convolution


def _norm(width: int) -> nn.BatchNorm2d:
    """Only the bias is learnt; the running statistics move by 0.4 a step, because a run has few."""
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


ENTRIES = {"fast_cnn": FastCNN}
