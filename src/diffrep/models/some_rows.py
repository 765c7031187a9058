"""Transformers of which only some rows are read: the last block and what follows it are computed there alone.

A block's keys and values need every row; its queries, its projection and its MLP only those that somebody reads. The
same numbers as of the whole pass at those rows, to rounding.
Letters: B images, L tokens, N rows of a sequence, R rows that are read, D width, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.models.masked_vit import TokenPredictor


@dataclass(frozen=True)
class Places:
    """Where a mask (B, L) is True.

    index: (B, R) int64, rising in each row, R being the most of any row; shorter rows go on with places that are not.
    real:  (B, R) bool, False of those; None where all rows are equally long.
    """

    index: Tensor
    real: Tensor | None

    def joined(self, x: Tensor) -> Tensor:
        """(B, R, D) -> (M, D), row by row: what stands at real places."""
        return x.flatten(0, 1) if self.real is None else x[self.real]


def places(chosen: Tensor) -> Places:
    """Of a bool mask (B, L)."""
    counts = chosen.sum(1)
    least, most = int(counts.min()), int(counts.max())
    index = (~chosen).byte().argsort(dim=1, stable=True)[:, :most]
    if least == most:
        return Places(index, None)
    return Places(index, torch.arange(most, device=chosen.device) < counts[:, None])


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, D), rows (B, R) -> (B, R, D)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def put_back(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """The inverse of :func:`picked`: (B, R, D) -> (B, count, D), 0 elsewhere."""
    empty = x.new_zeros(len(x), count, x.shape[2])
    return empty.scatter(1, rows[..., None].expand(-1, -1, x.shape[2]), x)


def block_at(block: Any, x: Tensor, rows: Tensor, seen: Tensor | None = None) -> Tensor:
    """``block(x)`` at some rows.

    Args:
        block: a pre-norm block of timm's ViT, without layer scale or drop path.
        x: (B, N, D). rows: (B, R) int64.
        seen: (B, N) bool, which rows of x may be looked at; None: all.

    Returns:
        (B, R, D).
    """
    attention, width = block.attn, x.shape[2]
    normed, weight, bias = block.norm1(x), attention.qkv.weight, attention.qkv.bias
    q = F.linear(picked(normed, rows), weight[:width], bias[:width])
    k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, 2)
    q, k, v = (t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    dropout = attention.attn_drop.p if attention.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, among(seen), dropout)
    x = picked(x, rows) + attention.proj_drop(attention.proj(found.transpose(1, 2).flatten(2)))
    return x + block.mlp(block.norm2(x))


def among(seen: Tensor | None) -> Tensor | None:
    """(B, N) -> (B, 1, 1, N), as attention wants it."""
    return None if seen is None else seen[:, None, None]


def predicted_at(network: TokenPredictor, ids: Tensor, mask: Tensor, visible: Tensor, read: Tensor) -> Tensor:
    """:meth:`TokenPredictor.probabilities` at some positions.

    Its decoder replaces what the encoder says of hidden positions by the class slot's feature, so the encoder's last
    block is computed at visible ones and at the class slot.

    Args:
        ids: (B, L). mask: (B, L) bool, True where hidden.
        visible: (B, R') int64, at least all positions that are not hidden.
        read: (B, R) int64.

    Returns:
        (B, R, K).
    """
    told = F.pad(1 + visible, (1, 0))  # the class slot first
    x = network.blocks[:-1](network.token_emb(network.sequence(ids, mask)))
    x = network.decoder_embed(network.norm(block_at(network.blocks[-1], x, told)))
    y = torch.where(F.pad(mask, (1, 0))[..., None], x[:, :1], put_back(x, told, 1 + mask.shape[1]))
    y = network.decoder_blocks[:-1](y + network.decoder_pos_embed_learned)
    y = network.decoder_norm(block_at(network.decoder_blocks[-1], y, 1 + read))
    codes = network.token_emb.word_embeddings.weight[: network.config.num_codes]
    return network.mlm_layer(y, codes).float().softmax(2)
