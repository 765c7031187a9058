"""MAGE's token predictor: a ViT encoder-decoder over token ids (Li et al. 2023, `models_mage.py`).

Given ids of which some are masked, it names a distribution over the codebook at every position. Blocks are timm's,
which compute the same with fused attention; state dicts have the official names, without the tables that no
computation reads (:data:`UNUSED`).
Letters: B images, L tokens, D width, K codes, V = K + 1001 rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep import _torchvision_compat
from diffrep.config import Config

CLASS_ROWS = 1000  # rows of the vocabulary behind the codes that the first (JAX) checkpoints had
CLASS_SLOT = 76  # the class row that stands in front of every sequence: id K + 76, 1100 of the released files


class Vocabulary:
    """Ids: K codes, 1000 class rows of which one is used, the mask."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes, self.rows = num_codes, num_codes + CLASS_ROWS + 1
        self.class_id, self.mask_id = num_codes + CLASS_SLOT, num_codes + CLASS_ROWS


class TransformerConfig(Config):
    """Width, depth and heads of an encoder and its decoder, which have one width: they share the token table."""

    embed_dim: Annotated[int, Field(ge=1)] = 768  # D
    depth: Annotated[int, Field(ge=1)] = 12
    num_heads: Annotated[int, Field(ge=1)] = 12
    decoder_depth: Annotated[int, Field(ge=1)] = 8
    decoder_num_heads: Annotated[int, Field(ge=1)] = 16
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)  # embeddings, attention, projections, MLP; in training alone
    init_std: float = Field(0.02, gt=0)  # of position tables and token embeddings; official

    @model_validator(mode="after")
    def _fits(self) -> TransformerConfig:
        for heads in ("num_heads", "decoder_num_heads"):
            if self.embed_dim % getattr(self, heads):
                raise ValueError(f"embed_dim {self.embed_dim} is not divisible by {heads} {getattr(self, heads)}")
        return self


class TokenPredictorConfig(TransformerConfig):
    """Defaults: mage_vit_base_patch16."""

    num_codes: int = Field(1024, ge=2)  # K, the tokenizer's
    num_tokens: int = Field(256, ge=1)  # L


# Parts, shared with ADDP's own network

layer_norm = partial(nn.LayerNorm, eps=1e-6)


def blocks(config: TransformerConfig, depth: int, heads: int) -> nn.Sequential:
    """Pre-norm transformer blocks, qkv with bias, layer norm of 1e-6."""
    _torchvision_compat.install()
    from timm.models.vision_transformer import Block

    options = {"mlp_ratio": config.mlp_ratio, "proj_drop": config.dropout, "attn_drop": config.dropout}
    made = (Block(config.embed_dim, heads, qkv_bias=True, norm_layer=layer_norm, **options) for _ in range(depth))
    return nn.Sequential(*made)


class TokenHead(nn.Module):
    """Features to logits over the vocabulary: h = LN(GELU(fc(x))); logits = h W^T + bias, W the token embeddings."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.fc, self.ln = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(1, 1, rows))

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """x (B, N, D), embeddings (R, D) -> (B, N, R): the first R rows of the vocabulary."""
        h = self.ln(F.gelu(self.fc(x)))
        return F.linear(h, embeddings.detach()) + self.bias[..., : len(embeddings)]


class TokenEmbedding(nn.Module):
    """Word and position tables, their sum normalised, as BERT has it. Official files have 257 positions for any L."""

    def __init__(self, rows: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(rows, width), nn.Embedding(positions, width)
        self.LayerNorm, self.dropout = layer_norm(width), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + places))


def initialise(network: nn.Module, std: float) -> None:
    """Linear and patch embedding Xavier uniform with zero bias, norms one and zero, tables and tokens N(0, std)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
    for parameter in network.parameters(recurse=False):
        nn.init.normal_(parameter, std=std)


# The predictor

# In the released files and read by nothing: filling them with NaN changes no output.
UNUSED = (
    "cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
    "decoder_pred.weight", "decoder_pred.bias", "token_emb.position_ids",
)  # fmt: skip


class TokenPredictor(nn.Module):
    """q(z | z_t): ids (B, L) and a mask (B, L) -> logits (B, 1 + L, V), the class slot first."""

    def __init__(self, config: TokenPredictorConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, Vocabulary(config.num_codes)
        width, slots = config.embed_dim, 1 + config.num_tokens
        self.token_emb = TokenEmbedding(self.vocabulary.rows, slots, width, config.dropout)
        self.blocks, self.norm = blocks(config, config.depth, config.num_heads), layer_norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, width))
        self.decoder_blocks = blocks(config, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm, self.mlm_layer = layer_norm(width), TokenHead(width, self.vocabulary.rows)
        initialise(self, config.init_std)

    def forward(self, ids: Tensor, mask: Tensor, rows: int | None = None, shown: Tensor | None = None) -> Tensor:
        """mask: bool, True where hidden. rows: only the first rows of the vocabulary; None: all. shown: see encode."""
        y, hidden = self.decoder_embed(self.encode(ids, mask, shown)), F.pad(mask, (1, 0))[..., None]
        if shown is not None:
            y = y[:, :1].expand(-1, hidden.shape[1], -1).scatter(1, _slots(shown, y.shape[2]), y)
        y = torch.where(hidden, y[:, :1], y) + self.decoder_pos_embed_learned  # official: padded with the class slot
        y = self.decoder_norm(self.decoder_blocks(y))
        return self.mlm_layer(y, self.token_emb.word_embeddings.weight[:rows])

    def encode(self, ids: Tensor, mask: Tensor, shown: Tensor | None = None) -> Tensor:
        """Features (B, 1 + L, D), the class slot's first.

        Args:
            shown: (B, S) positions of the tokens that go in, rising; those left out are masked ones. The features are
                then (B, 1 + S, D). None: all.
        """
        x = self.token_emb(self.sequence(ids, mask))
        if shown is not None:
            x = x.gather(1, _slots(shown, x.shape[2]))
        return self.norm(self.blocks(x))

    def sequence(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, 1 + L): the class slot, then the ids with the mask id where hidden."""
        shown = torch.where(mask, self.vocabulary.mask_id, ids)
        return F.pad(shown, (1, 0), value=self.vocabulary.class_id)

    def probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, K): class and mask rows are cut off before the softmax."""
        return self(ids, mask, self.config.num_codes)[:, 1:].float().softmax(2)


def _slots(shown: Tensor, width: int) -> Tensor:
    """Positions (B, S) of tokens -> of the class slot and theirs behind it, once per channel, (B, 1 + S, D)."""
    return F.pad(shown + 1, (1, 0))[..., None].expand(-1, -1, width)


def transformer_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Width, depths and MLP ratio, from the names and shapes of an official state dict; heads cannot be seen there."""
    width = state["decoder_embed.weight"].shape[1]
    deep = {
        part: 1 + max(int(n.split(".")[1]) for n in state if n.startswith(part))
        for part in ("blocks.", "decoder_blocks.")
    }
    ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    return {"embed_dim": width, "depth": deep["blocks."], "decoder_depth": deep["decoder_blocks."], "mlp_ratio": ratio}


def predictor_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All fields but heads of the :class:`TokenPredictorConfig` behind a state dict."""
    rows, tokens = len(state["token_emb.word_embeddings.weight"]), state["decoder_pos_embed_learned"].shape[1] - 1
    return transformer_fields(state) | {"num_codes": rows - CLASS_ROWS - 1, "num_tokens": tokens}
