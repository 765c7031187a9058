"""The tokenizer of MAGE and ADDP: a VQGAN with quirks that no library carries.

It is a PyTorch port of MaskGIT's JAX tokenizer, not the one of taming-transformers: images in [0, 1], average pooling,
no attention, no convolution around the quantiser, and the shortcut of a residual block that changes its width acts on
the branch output, so that the block's input is lost. State dicts have the official names.
Letters: B images, c latent channels, K codes, (h, w) the token grid, L = h w.
Deviation: with ``decoder=False`` the half that draws is not built.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep.config import Config

GROUPS = 32  # of every group norm; widths are multiples of it

Positive = Annotated[int, Field(ge=1)]


class VQGANConfig(Config):
    """Widths and depths. Defaults: the released tokenizer (54,515,587 parameters)."""

    ch: Annotated[int, Field(ge=GROUPS, multiple_of=GROUPS)] = 128
    ch_mult: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)  # width per resolution, over ch
    num_res_blocks: int = Field(2, ge=0)  # per resolution, in both halves
    z_channels: int = Field(256, ge=1)  # c
    num_codes: int = Field(1024, ge=2)  # K
    decoder: bool = True

    @model_validator(mode="after")
    def _fits(self) -> VQGANConfig:
        if not self.num_res_blocks and len(set(self.ch_mult)) > 1:
            raise ValueError("ch_mult: without residual blocks (num_res_blocks 0) the width cannot change")
        return self

    @property
    def stride(self) -> int:
        """Pixels per token, in each direction."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.ch * m for m in self.ch_mult)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> VQGANConfig:
        """What a state dict was built as: everything can be seen in its shapes."""
        ch = state["encoder.conv_in.weight"].shape[0]
        levels = _count(state, r"decoder\.up\.(\d+)\.upsample") or _count(state, r"encoder\.down\.(\d+)\.block")
        blocks = _count(state, r"encoder\.down\.0\.block\.(\d+)\.")
        mult = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)] if blocks else []
        codes, channels = state["quantize.embedding.weight"].shape
        return cls(
            ch=ch, ch_mult=tuple(mult) or (1,) * max(levels, 1), num_res_blocks=blocks, z_channels=channels,
            num_codes=codes, decoder="decoder.conv_in.weight" in state,
        )  # fmt: skip


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number at this place of the names."""
    return max((int(m[1]) + 1 for name in state if (m := re.match(pattern, name))), default=0)


def whole_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast; on the meta device there is none to leave."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


# Parts


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """h = conv2(swish(norm2(conv1(swish(norm1(x)))))); out = x + h, or h + W h where the width changes."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inner), nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm2, self.conv2 = group_norm(outer), nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outer, outer, 1, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return x + h if self.nin_shortcut is None else h + self.nin_shortcut(h)  # as released: not of x


class Level(nn.Module):
    """The residual blocks of one resolution."""

    def __init__(self, inner: int, outer: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inner if k == 0 else outer, outer) for k in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Upsample(nn.Module):
    """Nearest neighbours, twice the size, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two blocks at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


# The two halves


class Encoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, c, h, w) before quantisation; average pooling between resolutions."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        inner = (config.ch, *widths[:-1])
        pairs = zip(inner, widths, strict=True)
        self.down = nn.ModuleList(Level(i, o, config.num_res_blocks) for i, o in pairs)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for number, level in enumerate(self.down):
            h = level(h if number == 0 else F.avg_pool2d(h, 2))
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, H, W), around [0, 1] but not held there. ``up`` counts from the finest resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, blocks = config.widths, config.num_res_blocks
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        inner = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(Level(i, o, blocks) for i, o in zip(inner, widths, strict=True))
        for number, width in enumerate(widths):
            if number:
                self.up[number].upsample = Upsample(width)
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for number in reversed(range(len(self.up))):
            h = self.up[number](h)
            h = self.up[number].upsample(h) if number else h
        return self.conv_out(swish(self.norm_out(h)))


class Codebook(nn.Module):
    """K vectors; a latent becomes the nearest one."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """(B, c, h, w) -> ids (B, L): argmin |z|^2 + |e|^2 - 2 z e, the first where several are equally near."""
        with whole_precision(z.device):  # near a boundary half precision names others
            flat, codes = z.flatten(2).transpose(1, 2).float(), self.embedding.weight.float()
            distance = flat.square().sum(2, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        return distance.argmin(2)


def perplexity(chosen: Tensor) -> Tensor:
    """How many codes, all used alike, would be as hard to guess: exp of the entropy of (K,) counts, ()."""
    share = chosen.double() / chosen.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(share).sum().exp()


class VQGAN(nn.Module):
    """Images to ids, ids or distributions to latents, latents to images. Any size that ``stride`` divides."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.quantize = Encoder(config), Codebook(config.num_codes, config.z_channels)
        self.decoder = Decoder(config) if config.decoder else None

    @property
    def codebook(self) -> Tensor:
        """(K, c)."""
        return self.quantize.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> ids (B, L), row by row."""
        return self.quantize.nearest(self.encoder(images))

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids of any shape (..., L) -> code vectors (..., L, c)."""
        return self.quantize.embedding(ids)

    def soft(self, probabilities: Tensor) -> Tensor:
        """The mapping f: distributions (..., K) -> expected code vectors (..., c)."""
        return probabilities.to(self.codebook.dtype) @ self.codebook

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, c) -> (B, 3, H, W), not clamped."""
        assert self.decoder is not None, "this tokenizer was built without a decoder"
        return self.decoder(latents.transpose(1, 2).unflatten(2, grid))
