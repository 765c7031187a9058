"""ADDP's own network: from pixels and reliable ids to a distribution over ids (Tian et al. 2024, `models_addp.py`).

A ViT encoder looks at every patch of the decoded image, also at unreliable ones. The decoder drops what the encoder
says of masked positions and of the class slot, and is given the embeddings of the visible ids besides, appended in
row-major order. State dicts have the official names, without the tables that no computation reads (:data:`UNUSED`).
Letters: B images, L = h w tokens, D width, K codes, V = K + 1001 rows of the vocabulary, n visible tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffrep import _torchvision_compat
from diffrep.models.masked_vit import (
    CLASS_ROWS,
    TokenHead,
    TransformerConfig,
    Vocabulary,
    blocks,
    initialise,
    layer_norm,
    transformer_fields,
)
from diffrep.models.some_rows import Places, among, block_at, places, put_back

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, whatever the data: the network's own

# In the released files and read by nothing: filling them with NaN changes no output.
UNUSED = ("decoder_pos_embed", "pos_token_embed", "pos_mask_embed", "decoder_pred.weight", "decoder_pred.bias")


class ADDPVitConfig(TransformerConfig):
    """Defaults: addp_vit_base_patch16 (146.9 M parameters besides the unused)."""

    image_size: int = Field(256, ge=1)
    patch_size: int = Field(16, ge=1)  # pixels per token: the tokenizer's stride
    num_codes: int = Field(1024, ge=2)  # K

    @model_validator(mode="after")
    def _divides(self) -> ADDPVitConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]


LARGE: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 6, "decoder_num_heads": 6}


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, L, D), one convolution."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ADDPVit(nn.Module):
    """p_theta(z_{t-1} | x_t, z_t): pixels (B, 3, H, W), ids (B, L) and a mask (B, L) -> logits.

    checkpoint_blocks: the backward pass computes each block again instead of keeping what is inside it.
    """

    checkpoint_blocks = False

    def __init__(self, config: ADDPVitConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, Vocabulary(config.num_codes)
        width = config.embed_dim
        self.patch_embed, self.cls_token = PatchEmbed(config.patch_size, width), nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = self._table()
        self.tokenizer_norm, self.dropout = layer_norm(width), nn.Dropout(config.dropout)
        self.blocks, self.norm = blocks(config, config.depth, config.num_heads), layer_norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.token_emb = nn.Embedding(self.vocabulary.rows, width)
        self.decoder_pos_embed_learned, self.decoder_pos_mask_embed = self._table(), self._table()
        self.decoder_pos_token_embed = self._table()
        self.decoder_blocks = blocks(config, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm, self.mlm_layer = layer_norm(width), TokenHead(width, self.vocabulary.rows)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        initialise(self, config.init_std)

    def _table(self) -> nn.Parameter:
        """Of positions, the class slot first."""
        return nn.Parameter(torch.zeros(1, 1 + self.config.num_tokens, self.config.embed_dim))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W), held in [0, 1] -> (B, 1 + L, D): what the first block reads."""
        patches = self.patch_embed((pixels.clamp(0, 1) - self.mean) / self.std)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        return self.dropout(self.tokenizer_norm(x))

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + L, D)."""
        return self.norm(self.blocks(self.embed(pixels)))

    def decode(self, latent: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoder says, and the visible ids, to logits of every slot.

        Args:
            latent: (B, 1 + L, D); None where everything is masked, and nothing of it would be read.
            ids: (B, L) int64; those of masked positions are not read.
            mask: (B, L) bool, True where masked; every image has the same number n of visible positions.

        Returns:
            (B, 1 + L + n, V); positions are 1..L.
        """
        seen = self.mask_token if latent is None else self.decoder_embed(latent)
        y = self._slots(seen, ids, mask, places(~mask))
        return self.mlm_layer(self.decoder_norm(self.decoder_blocks(y)), self.token_emb.weight)

    def _slots(self, seen: Tensor, ids: Tensor, mask: Tensor, visible: Places) -> Tensor:
        """(B, 1 + L + n, D): what the decoder's first block reads; ``seen``: the embedded features of 1 + L slots."""
        hidden = F.pad(mask, (1, 0))[..., None]
        dropped = F.pad(mask, (1, 0), value=True)[..., None]
        where = torch.where(hidden, self.decoder_pos_mask_embed, self.decoder_pos_embed_learned)
        reliable = self.token_emb(ids.gather(1, visible.index)) + self.decoder_pos_token_embed[0, 1 + visible.index]
        return torch.cat([torch.where(dropped, self.mask_token, seen) + where, reliable], 1)

    # Training reads the logits of masked positions alone

    def masked_logits(self, pixels: Tensor | None, ids: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """:meth:`forward` at masked positions, and no row of it that nothing reads (see ``some_rows``).

        Args:
            pixels: (B, 3, H, W); None where everything is masked, and nothing of them would be read.
            ids: (B, L). mask: (B, L); images may have different numbers of masked positions.
            rows: only the first rows of the vocabulary; None: all.

        Returns:
            (M, V): of all M masked positions, image by image, row by row.
        """
        return self.answer(pixels, ids, mask, places(~mask), places(mask), rows)

    def answer(
        self, pixels: Tensor | None, ids: Tensor, mask: Tensor, visible: Places, masked: Places, rows: int | None = None
    ) -> Tensor:
        """:meth:`masked_logits`, told where the mask is False and True."""
        slots = 1 + mask.shape[1]
        seen = self.mask_token if pixels is None else self._seen(pixels, 1 + visible.index)
        y = self._slots(seen, ids, mask, visible)
        # Where images differ in visible tokens, what fills up the shorter ones is looked at by nobody.
        looked_at = None if visible.real is None else F.pad(visible.real, (slots, 0), value=True)
        y = masked.joined(self._through(self.decoder_blocks, y, 1 + masked.index, looked_at))
        return self.mlm_layer(self.decoder_norm(y)[None], self.token_emb.weight[:rows])[0]

    def _seen(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """(B, 1 + L, D): embedded features of the encoder at ``rows``, 0 elsewhere."""
        x = self._through(self.blocks, self.embed(pixels), rows)
        return put_back(self.decoder_embed(self.norm(x)), rows, 1 + self.config.num_tokens)

    def _through(self, stack: nn.Sequential, x: Tensor, rows: Tensor, looked_at: Tensor | None = None) -> Tensor:
        """All blocks, the last at ``rows`` alone."""
        for block in stack[:-1]:
            x = self._block(block, x, among(looked_at))
        return self._block(block_at, stack[-1], x, rows, looked_at)

    def _block(self, run: Any, *given: Any) -> Tensor:
        return checkpoint(run, *given, use_reentrant=False) if self.checkpoint_blocks else run(*given)

    def nothing(self) -> Tensor:
        """0, that has a gradient of zero at everything that reads pixels.

        Without it these parameters had no gradient where everything is masked, and the optimiser, which then leaves
        out weight decay and momentum, would do something else than after a pass whose gradient is zero.
        """
        parts = (self.patch_embed, self.tokenizer_norm, self.blocks, self.norm, self.decoder_embed)
        readers = [self.cls_token, self.pos_embed, *(p for part in parts for p in part.parameters())]
        return torch.stack([p.flatten()[:0].sum() for p in readers]).sum()

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, L, V)."""
        return self.decode(self.encode(pixels), ids, mask)[:, 1 : 1 + mask.shape[1]]


def addp_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All fields but heads of the :class:`ADDPVitConfig` behind a state dict."""
    patch, tokens = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[1] - 1
    side = round(tokens**0.5)
    found = {
        "patch_size": patch,
        "image_size": side * patch,
        "num_codes": len(state["token_emb.weight"]) - CLASS_ROWS - 1,
    }
    return transformer_fields(state) | found


# As a plain ViT


def timm_vit(network: ADDPVit, tokenizer_norm: bool = False, num_classes: int = 0) -> nn.Module:
    """The encoder as timm's ``VisionTransformer``, as the official fine-tuning reads it: no norm but that of the mean.

    Args:
        tokenizer_norm: keep the norm behind the embeddings, which the official fine-tuning drops without a word.
        num_classes: of a fresh head on the mean of the patch features; 0: none.

    Returns:
        a module of images normalised with :data:`MEAN` and :data:`STD`.
    """
    _torchvision_compat.install()
    from timm.models.vision_transformer import VisionTransformer

    config = network.config
    vit = VisionTransformer(
        config.image_size, config.patch_size, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, num_classes=num_classes, global_pool="avg",
        pre_norm=tokenizer_norm, norm_layer=layer_norm,
    )  # fmt: skip
    fresh = {name: value for name, value in vit.state_dict().items() if name.startswith(("fc_norm.", "head."))}
    vit.load_state_dict(timm_state(network, tokenizer_norm) | fresh)
    return vit


def timm_state(network: ADDPVit, tokenizer_norm: bool = False) -> dict[str, Tensor]:
    """The encoder's tensors under timm's names.

    timm's ViT with a norm behind the embeddings has no bias in front of it: the bias goes to the position table.
    """
    kept = ("patch_embed.", "cls_token", "pos_embed", "blocks.")
    found = {name: value.clone() for name, value in network.state_dict().items() if name.startswith(kept)}
    if tokenizer_norm:
        found |= {f"norm_pre.{name}": value for name, value in network.tokenizer_norm.state_dict().items()}
        found["pos_embed"][:, 1:] += found.pop("patch_embed.proj.bias")
    return found
