"""What a token model does with images it never saw: the tokenizer's copies of them, and a hole mended.

Letters: B images, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.data.datasets import ImageSet
from diffrep.diffusion.masking import ImageDraws
from diffrep.frozen.classifier import ClassifierTeacher
from diffrep.frozen.generator import grid_png
from diffrep.frozen.tokens import FrozenADDP, Tokenizer
from diffrep.launch.generate import Generation
from diffrep.launch.repair import touched
from diffrep.methods.addp import alternate, as_uint8

SHOWN = 10
GREY = 0.5


def copies(images: Tensor, tokenizer: Tokenizer) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same through ids."""
    return tokenizer.decode(tokenizer.lookup(tokenizer.encode(images)), tokenizer.grid(images)).clamp(0, 1)


@torch.no_grad()
def read_share(real: ImageSet, tokenizer: Tokenizer, classifier: ClassifierTeacher) -> dict[str, Any]:
    """How many images a classifier names rightly, as they are and as the tokenizer's copies; mean squared error."""
    images = _all(real)
    again, labels = copies(images, tokenizer), torch.as_tensor(real.labels)
    named = {"originals": images, "copies": again}
    right = {key: (classifier.logits(x).argmax(1) == labels).float().mean() for key, x in named.items()}
    shares = {f"{key}_read": round(100 * float(share), 2) for key, share in right.items()}
    return {"images": len(images), **shares, "mse": float(F.mse_loss(again, images))}


@torch.no_grad()
def mended(real: ImageSet, generation: Generation, region: Tensor) -> bytes:
    """One PNG of three rows: the first images, the same with a hole, and what ADDP puts there; region (H, W) bool."""
    assert isinstance(generation.network, FrozenADDP)  # the recipe refuses another
    images, tokenizer = _all(real, SHOWN), generation.tokenizer
    mask = touched(region, generation.grid, tokenizer.stride).expand(len(images), -1)
    steps = min(generation.alternation.steps, int(mask[0].sum()))
    walk = generation.alternation.model_copy(update={"steps": steps})
    draws = ImageDraws(list(range(len(images))), generation.num_tokens)
    filled = alternate(generation.network.module, tokenizer, walk, draws, tokenizer.encode(images), mask)
    after = as_uint8(filled, generation.config.rounding).float() / 255
    return grid_png(torch.cat([images, torch.where(region, GREY, images), after]), columns=len(images))


def _all(real: ImageSet, count: int | None = None) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]."""
    return real.gather(torch.arange(min(len(real), count or len(real)))).float() / 255
