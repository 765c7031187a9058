"""The U-Net of guided-diffusion, ADM (Dhariwal and Nichol 2021; official `unet.py`).

A noisy image and its timestep go in, perhaps a class; out come the predicted noise and, where it was learned, the
variance v behind it. Every module has its official name, those without parameters too: official files load as they
are, and ``middle_block.2.out_layers.3`` is the last convolution of the second middle block. The network knows no noise
schedule: it embeds any t it is told, fractions too.
Letters: B images, C channels, D = 4 model_channels, K classes, N = h w positions of a map, d channels of a head.
Deviations: a class-conditional network may be asked without labels (nothing is added then; no training saw that);
no dropout, for which the official code keeps place 2 of ``out_layers``; no gradient checkpointing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep.config import Config
from diffrep.errors import UserError

GROUPS = 32  # of every norm
MAX_PERIOD = 10_000  # of the slowest sine, divided by 2 pi
FALLS_SHORT = 1e-6  # of a whole width, by a multiplier that is a quotient

AttentionOrder = Literal["legacy", "new"]


class GuidedUNetConfig(Config):
    """Official arguments under names of ours where theirs mislead."""

    image_size: int = Field(ge=1)  # pixels per side
    in_channels: int = Field(3, ge=1)
    out_channels: int  # in_channels, or twice that with a learned variance
    model_channels: int = Field(ge=2, multiple_of=2)  # width that the multipliers multiply
    num_res_blocks: int = Field(ge=1)  # per level on the way down; one more on the way up
    channel_mult: tuple[float, ...] = Field(min_length=1)  # one per level, the finest first
    attention_factors: tuple[int, ...]  # attention where the map is 1/factor of the image; official "resolutions"
    num_classes: int | None = Field(None, ge=1)  # K; None: unconditional
    num_heads: int = Field(1, ge=1)  # of every attention, whatever its width
    num_head_channels: int | None = Field(None, ge=1)  # d; overrules num_heads
    num_heads_upsample: int | None = Field(None, ge=1)  # of the way up; None: num_heads
    scale_shift_norm: bool  # the embedding scales and shifts a norm; else it is added
    resblock_updown: bool  # residual blocks change the size; else single layers do
    conv_resample: bool = True  # these layers hold a convolution
    attention_order: AttentionOrder  # of the channels of qkv: heads first, or q, k, v first

    @model_validator(mode="after")
    def _fits(self) -> GuidedUNetConfig:
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            both = f"{self.in_channels} or, with a learned variance, {2 * self.in_channels}"
            raise ValueError(f"out_channels {self.out_channels} does not fit; valid: {both}")
        if odd := [width for width in self.widths if width < GROUPS or width % GROUPS]:
            raise ValueError(f"width {odd[0]} is not divisible by the {GROUPS} groups of a norm")
        coarsest = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % coarsest:
            raise ValueError(f"image_size {self.image_size} is not divisible by {coarsest}, as its levels need")
        factors = [2**level for level in range(len(self.channel_mult))]
        if unknown := [factor for factor in self.attention_factors if factor not in factors]:
            raise ValueError(f"attention_factors {unknown[0]} is none of its levels' factors {factors}")
        for width, heads in sorted(self.attentions):
            if self.num_head_channels and heads * self.num_head_channels != width:
                told = f"num_head_channels {self.num_head_channels} does not divide the width {width} of an attention"
                raise ValueError(told)
            if width % heads:
                raise ValueError(f"{heads} heads do not divide the width {width} of an attention")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """C of each level."""
        return tuple(int(factor * self.model_channels + FALLS_SHORT) for factor in self.channel_mult)

    def heads(self, width: int, upwards: bool = False) -> int:
        """Of an attention of this width."""
        if self.num_head_channels:
            return width // self.num_head_channels
        return (self.num_heads_upsample or self.num_heads) if upwards else self.num_heads

    @property
    def attentions(self) -> set[tuple[int, int]]:
        """(C, heads) of every attention: the middle's, and both ways those of attention_factors."""
        levels = [width for level, width in enumerate(self.widths) if 2**level in self.attention_factors]
        found = {(width, self.heads(width, upwards)) for width in levels for upwards in (False, True)}
        return found | {(self.widths[-1], self.heads(self.widths[-1]))}

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels


# Parts


class TimeEmbedding(nn.Sequential):
    """t (B,) -> (B, D): sines through two layers, once for each distinct t."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        if timesteps.is_meta or timesteps.requires_grad:  # without values all are distinct; ``unique`` has no gradient
            return super().forward(self.sines(timesteps))
        distinct, where = torch.unique(timesteps, return_inverse=True)
        return super().forward(self.sines(distinct))[where]

    def sines(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, width): cos then sin of t 10000^(-k / half), k = 0 ... half - 1."""
        half = self.width // 2
        places = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * places / half)
        return torch.cat([angles.cos(), angles.sin()], 1).to(self[0].weight.dtype)


class GroupNorm(nn.GroupNorm):
    """Computed in float32 whatever comes in, and given back as it came."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Upsample(nn.Module):
    """Nearest neighbours, twice the size; then a convolution, if asked."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = conv3(channels, channels) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Half the size: a convolution of stride 2 or the mean of 2x2 cells."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """h = conv(SiLU(norm(conv(SiLU(norm(x)))))), told the embedding at its second norm; out = skip(x) + h.

    resample: changes the size of x and of h in front of the first convolution; None: the size stays.
    """

    def __init__(
        self, inner: int, outer: int, embedding: int, scale_shift: bool, resample: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(GroupNorm(inner), nn.SiLU(), conv3(inner, outer))
        self.h_upd = resample(inner, use_conv=False) if resample else nn.Identity()
        self.x_upd = resample(inner, use_conv=False) if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outer if scale_shift else outer))
        self.out_layers = nn.Sequential(GroupNorm(outer), nn.SiLU(), nn.Identity(), zeroed(conv3(outer, outer)))
        self.skip_connection = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activate, conv = self.in_layers
        h = conv(self.h_upd(activate(norm(x))))
        told = self.emb_layers(embedding).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.x_upd(x)) + h


class QKVAttention(nn.Module):
    """softmax(q^T k / sqrt(d)) v in each head; qkv (B, 3C, N) -> (B, C, N).

    The channels of qkv are [head 1: q k v | head 2: q k v | ...] in the legacy order, [q of all heads | k | v] in the
    new one. Weights fit both, and only with one head are they the same.
    """

    def __init__(self, num_heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.num_heads, self.order = num_heads, order

    def forward(self, qkv: Tensor) -> Tensor:
        axis, split = (3, (self.num_heads, 3, -1)) if self.order == "legacy" else (2, (3, self.num_heads, -1))
        rows = qkv.transpose(1, 2).contiguous()  # (B, N, 3C): fused kernels want the channels of a head side by side
        q, k, v = (part.transpose(1, 2) for part in rows.unflatten(2, split).unbind(axis))  # (B, heads, N, d)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) among the positions of a map (B, C, h, w)."""

    def __init__(self, channels: int, num_heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.norm, self.qkv = GroupNorm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention, self.proj_out = QKVAttention(num_heads, order), zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return (rows + self.proj_out(self.attention(self.qkv(self.norm(rows))))).view_as(x)


class Block(nn.Sequential):
    """Layers in a row, of which residual blocks are told the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


def conv3(inner: int, outer: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """A fresh block begins as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# The network


class GuidedUNet(nn.Module):
    """x (B, in_channels, H, W) in [-1, 1], t (B,) and perhaps classes (B,) -> (B, out_channels, H, W)."""

    def __init__(self, config: GuidedUNetConfig) -> None:
        super().__init__()
        self.config, widths, embedding = config, config.widths, 4 * config.model_channels
        self.time_embed = TimeEmbedding(config.model_channels)
        self.label_emb = nn.Embedding(config.num_classes, embedding) if config.num_classes else None
        self.input_blocks, skips = _way_down(config)
        self.middle_block = Block(
            _residual(config, widths[-1], widths[-1]),
            _attention(config, widths[-1]),
            _residual(config, widths[-1], widths[-1]),
        )
        self.output_blocks = _way_up(config, skips)
        self.out = nn.Sequential(GroupNorm(widths[0]), nn.SiLU(), zeroed(conv3(widths[0], config.out_channels)))

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The predicted noise, and v behind it where the variance is learned.

        Args:
            x: (B, in_channels, H, W), H and W divisible by 2^(levels - 1).
            timesteps: (B,) whole numbers or fractions.
            class_labels: (B,) int64 in 0..K-1; None adds no class: these networks have no null class.

        Raises:
            UserError: labels for an unconditional network.
        """
        embedding, skips = self.condition(timesteps, class_labels), []
        h = x
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), embedding)
        return self.out(h)

    def condition(self, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """(B, D): all that the blocks are told."""
        embedding = self.time_embed(timesteps)
        if class_labels is None:
            return embedding
        if self.label_emb is None:
            raise UserError("this guided-diffusion network is unconditional: it takes no class labels")
        return embedding + self.label_emb(class_labels)


def _way_down(config: GuidedUNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The blocks from image to coarsest map, and the width of what each leaves for the way up."""
    width = config.widths[0]
    blocks, skips = [Block(conv3(config.in_channels, width))], [width]
    for level, outer in enumerate(config.widths):
        for _ in range(config.num_res_blocks):
            blocks.append(Block(*_layers(config, level, width, outer)))
            width = outer
            skips.append(width)
        if level + 1 < len(config.widths):
            blocks.append(Block(_resampling(config, width, Downsample)))
            skips.append(width)
    return nn.ModuleList(blocks), skips


def _way_up(config: GuidedUNetConfig, skips: list[int]) -> nn.ModuleList:
    """The blocks back to the size of the image; each reads beside its own map what the way down left."""
    width, blocks = config.widths[-1], []
    for level, outer in reversed(list(enumerate(config.widths))):
        for number in range(config.num_res_blocks + 1):
            layers = _layers(config, level, width + skips.pop(), outer, upwards=True)
            width = outer
            if level and number == config.num_res_blocks:
                layers.append(_resampling(config, width, Upsample))
            blocks.append(Block(*layers))
    return nn.ModuleList(blocks)


def _layers(config: GuidedUNetConfig, level: int, inner: int, outer: int, upwards: bool = False) -> list[nn.Module]:
    attended = 2**level in config.attention_factors
    return [_residual(config, inner, outer), *([_attention(config, outer, upwards)] if attended else [])]


def _residual(config: GuidedUNetConfig, inner: int, outer: int, resample: type[nn.Module] | None = None) -> ResBlock:
    return ResBlock(inner, outer, 4 * config.model_channels, config.scale_shift_norm, resample)


def _attention(config: GuidedUNetConfig, width: int, upwards: bool = False) -> AttentionBlock:
    return AttentionBlock(width, config.heads(width, upwards), config.attention_order)


def _resampling(config: GuidedUNetConfig, width: int, layer: type[nn.Module]) -> nn.Module:
    return _residual(config, width, width, layer) if config.resblock_updown else layer(width, config.conv_resample)
