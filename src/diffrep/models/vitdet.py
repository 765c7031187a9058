"""ViTDet: a plain ViT as the backbone of a detector, and the feature pyramid made of its last map alone.

Li, Mao, Girshick, He 2022, "Exploring Plain Vision Transformer Backbones for Object Detection"; detectron2's code:
most blocks attend within windows, a few everywhere, all with decomposed relative positions; no class token, no last
norm. Names are detectron2's, so a ViT of timm's names goes in as it is.
Deviation: relative positions enter attention as further dimensions of queries and keys. The numbers are the same, and
fused kernels can be used, which hold no table of all pairs of positions (at 1024 pixels 4096 x 4096 per head).
Letters: B images, H W pixels, h w a map in tokens, D width, N tokens that attend to each other, E width of a head.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.errors import UserError
from diffrep.models.maps import resized

SCALES = (4.0, 2.0, 1.0, 0.5)  # of the ViT's map, finest level of the pyramid first
LN_EPS = 1e-6


class ViTDet(nn.Module):
    """A timm ViT's patches, positions and blocks; normalised images (B, 3, H, W) -> the last map (B, D, h, w).

    The blocks are the ViT's own: their attention is replaced in place, and its class token goes.
    """

    def __init__(self, vit: Any, window: int, windowed: Sequence[int], image_size: int) -> None:
        """
        Args:
            window: tokens of a window's side.
            windowed: numbers of the blocks that attend within windows; the others attend everywhere.
            image_size: pixels of the images that the tables of relative positions are made for.

        Raises:
            UserError: no plain ViT.
        """
        super().__init__()
        check_plain(vit)
        self.patch_embed, self.pos_embed, self.blocks, self.norm_pre = (
            vit.patch_embed, vit.pos_embed, vit.blocks, vit.norm_pre,
        )  # fmt: skip
        self.grid, self.stride = vit.patch_embed.grid_size, vit.patch_embed.patch_size[0]
        self.width = vit.embed_dim
        vit.cls_token = vit.reg_token = None
        for number, block in enumerate(self.blocks):
            own = window if number in windowed else 0
            block.attn = RelativeAttention(block.attn, own, own or image_size // self.stride)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed.norm(self.patch_embed.proj(images).permute(0, 2, 3, 1))  # (B, h, w, D)
        skipped = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]
        table = resized(self.pos_embed, self.grid, (tokens.shape[1], tokens.shape[2]), skipped)[:, skipped:]
        tokens = self.norm_pre(tokens + table.view(1, *tokens.shape[1:]))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.permute(0, 3, 1, 2)


def check_plain(vit: Any) -> None:
    """Refuse what is no ViT with one kind of block, or has no table of positions.

    Raises:
        UserError: so.
    """
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    plain = isinstance(vit, VisionTransformer) and vit.pos_embed is not None
    if not plain or not all(type(b) is Block and type(b.attn) is Attention for b in vit.blocks):
        raise UserError("method.student: a detector stands on a plain ViT with a table of positions; timm's vit_* are")


def global_blocks(depth: int) -> tuple[int, ...]:
    """The last block of each quarter: 2, 5, 8, 11 of 12, and 5, 11, 17, 23 of 24, as published."""
    return tuple(sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)}))


class RelativeAttention(nn.Module):
    """Self-attention on maps (B, h, w, D) with decomposed relative positions, within windows or everywhere.

    q k / sqrt(E) + q R_row[i - j] + q R_column[i' - j'] is one product, of (q / sqrt(E), q R_row, q R_column) with
    (k, which row, which column). Source: detectron2's `add_decomposed_rel_pos`, after MViTv2 (Li et al. 2022), eq. 4.
    """

    def __init__(self, plain: Any, window: int, side: int) -> None:
        """plain: timm's attention, whose layers are taken over. window: 0 = everywhere. side: tokens; tables 2s - 1."""
        super().__init__()
        self.qkv, self.proj, self.q_norm, self.k_norm = plain.qkv, plain.proj, plain.q_norm, plain.k_norm
        self.num_heads, self.window = plain.num_heads, window
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, plain.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, plain.head_dim))

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        if not self.window:
            return self._attend(x)
        windows, padded = partition(x, self.window)
        return joined(self._attend(windows), self.window, padded, x.shape[1:3])

    def _attend(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        qkv = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]  # (B, heads, N, E)
        where = positions(*size, key).expand(*key.shape[:2], -1, -1)
        query = torch.cat([query / math.sqrt(query.shape[-1]), *self._seen(query.unflatten(2, size))], 3)
        key = torch.cat([key, where], 3)  # (B, heads, N, E + h + w)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return self.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, size)

    def _seen(self, query: Tensor) -> list[Tensor]:
        """What each token (B, heads, h, w, E) thinks of each row, (B, heads, N, h), and of each column, (.., N, w)."""
        rows, columns = (relative(table, side).to(query.dtype) for table, side in
                         ((self.rel_pos_h, query.shape[2]), (self.rel_pos_w, query.shape[3])))  # fmt: skip
        by_row = torch.einsum("bnhwe,hke->bnhwk", query, rows)
        by_column = torch.einsum("bnhwe,wke->bnhwk", query, columns)
        return [by_row.flatten(2, 3), by_column.flatten(2, 3)]


def relative(table: Tensor, side: int) -> Tensor:
    """(side, side, E): the row of the table for each pair; a table for another side is resized linearly first."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.t()[None].float(), size=2 * side - 1, mode="linear")[0].t()
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place + side - 1]


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """(N, h + w): of each token, one at its row and one at its column."""
    place = torch.arange(height * width, device=like.device)
    return torch.cat([F.one_hot(place // width, height), F.one_hot(place % width, width)], 1).to(like.dtype)


def partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, h, w, D) -> windows (B k, window, window, D), and the size after padding with 0 at the right and below."""
    below, right = -x.shape[1] % window, -x.shape[2] % window
    x = F.pad(x, (0, 0, 0, right, 0, below))
    rows = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, h', window, w', window, D)
    return rows.transpose(2, 3).flatten(0, 2), (x.shape[1], x.shape[2])


def joined(windows: Tensor, window: int, padded: tuple[int, int], size: Sequence[int]) -> Tensor:
    """The map (B, h, w, D) that :func:`partition` cut up."""
    grid = windows.unflatten(0, (-1, padded[0] // window, padded[1] // window))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


# The pyramid


class SimplePyramid(nn.Module):
    """images -> {"p2": (B, C, H / 4, W / 4), ..., "p6"}, all from the last map of ``net`` (of 16-pixel patches)."""

    def __init__(self, net: nn.Module, width: int, stride: int, out_channels: int) -> None:
        """width, stride: of the one map that ``net`` answers with.

        Raises:
            UserError: a stride that is no power of two, or below that of the finest level.
        """
        super().__init__()
        if stride & (stride - 1) or stride < SCALES[0]:
            raise UserError(f"method.student: patches of {stride} pixels; the pyramid needs 4, 8, 16 or 32")
        self.net, self.out_channels = net, out_channels
        self.strides = [int(stride / scale) for scale in SCALES] + [int(stride / SCALES[-1]) * 2]
        self.names = [f"p{int(math.log2(of_level))}" for of_level in self.strides]
        for name, scale in zip(self.names, SCALES, strict=False):
            self.add_module(f"simfp_{name[1:]}", _level(width, scale, out_channels))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        last = self.net(images)
        levels = OrderedDict((name, self.get_submodule(f"simfp_{name[1:]}")(last)) for name in self.names[:-1])
        levels[self.names[-1]] = F.max_pool2d(levels[self.names[-2]], kernel_size=1, stride=2)
        return levels


def _level(width: int, scale: float, out_channels: int) -> nn.Sequential:
    """From the map at 1/16 to a level of ``scale`` times its size."""
    half, quarter = width // 2, width // 4
    layers: list[nn.Module]
    if scale == 4:
        first, second = nn.ConvTranspose2d(width, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        layers, width = [first, ChannelNorm(half), nn.GELU(), second], quarter
    elif scale == 2:
        layers, width = [nn.ConvTranspose2d(width, half, 2, 2)], half
    else:
        layers = [nn.MaxPool2d(2, 2)] if scale < 1 else []
    return nn.Sequential(*layers, NormedConv(width, out_channels, 1), NormedConv(out_channels, out_channels, 3))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution without bias, then a norm of its own."""

    def __init__(self, width_in: int, width_out: int, side: int) -> None:
        super().__init__(width_in, width_out, side, padding=side // 2, bias=False)
        self.norm = ChannelNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))
