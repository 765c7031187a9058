"""The network of masked autoencoders (He et al. 2022, `models_mae.py`): pixels behind hidden patches from the others.

A ViT encoder reads the visible patches and a class token, and never a mask token; a small decoder reads what it says,
with one mask token for each hidden patch. Neither knows an order of tokens but by their positions, so they stay as
they were drawn, visible ones first, and the decoder's last block is computed at hidden ones alone, which are all that
the loss reads. State dicts have the official names, the two tables of positions included.
Letters: B images, L = h^2 patches of p x p pixels, D width of the encoder, E of the decoder, S visible and M hidden
patches of each image.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffrep.models.addp_vit import MEAN, STD, PatchEmbed
from diffrep.models.masked_vit import TransformerConfig, blocks, initialise, layer_norm
from diffrep.models.some_rows import block_at, picked

CHANNELS = 3


class MAEVitConfig(TransformerConfig):
    """Defaults: mae_vit_base_patch16."""

    patch_size: Annotated[int, Field(ge=1)] = 16  # p
    decoder_dim: Annotated[int, Field(ge=1)] = 512  # E
    dropout: float = Field(0.0, ge=0, lt=1)  # official: none

    @model_validator(mode="after")
    def _fits(self) -> MAEVitConfig:
        for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                told = f"{width} {getattr(self, width)} is not divisible by {heads} {getattr(self, heads)}"
                raise ValueError(told)
            if getattr(self, width) % 4:
                raise ValueError(f"{width} {getattr(self, width)} is not divisible by 4: sines and cosines, twice")
        return self


class MAEVit(nn.Module):
    """Images (B, 3, H, H) and which patches of each are shown and hidden -> pixels of the hidden ones."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: MAEVitConfig, image_size: int) -> None:
        super().__init__()
        self.config, self.image_size, self.side = config, image_size, image_size // config.patch_size
        width, narrow = config.embed_dim, config.model_copy(update={"embed_dim": config.decoder_dim})
        self.patch_embed, self.cls_token = PatchEmbed(config.patch_size, width), nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", positions(self.side, width))
        self.blocks, self.norm = blocks(config, config.depth, config.num_heads), layer_norm(width)
        self.decoder_embed = nn.Linear(width, config.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_dim))
        self.register_buffer("decoder_pos_embed", positions(self.side, config.decoder_dim))
        self.decoder_blocks = blocks(narrow, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm = layer_norm(config.decoder_dim)
        self.decoder_pred = nn.Linear(config.decoder_dim, CHANNELS * config.patch_size**2)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        initialise(self, config.init_std)

    @property
    def num_patches(self) -> int:
        """L."""
        return self.side**2

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> what the encoder reads and the decoder is to give back."""
        return (images - self.mean) / self.std

    def encode(self, pixels: Tensor, shown: Tensor) -> Tensor:
        """pixels: normalised, (B, 3, H, H). shown: (B, S) int64 -> (B, 1 + S, D), the class token's first."""
        x = picked(self.patch_embed(pixels) + self.pos_embed[:, 1:], shown)
        token = self.cls_token + self.pos_embed[:, :1]
        return self.norm(self.blocks(torch.cat([token.expand(len(x), -1, -1), x], 1)))

    def decode(self, latent: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
        """latent: (B, 1 + S, D), of the class token and ``shown``. hidden: (B, M) int64 -> (B, M, 3 p^2)."""
        seen = self.decoder_embed(latent)
        where = nn.functional.pad(1 + torch.cat([shown, hidden], 1), (1, 0))  # the class token stands at 0
        y = torch.cat([seen, self.mask_token.expand(*hidden.shape, -1)], 1) + self.decoder_pos_embed[0, where]
        rows = torch.arange(latent.shape[1], y.shape[1], device=y.device).expand(len(y), -1)
        y = block_at(self.decoder_blocks[-1], self.decoder_blocks[:-1](y), rows)
        return self.decoder_pred(self.decoder_norm(y))

    def forward(self, pixels: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
        """(B, M, 3 p^2), patch by patch in the order of ``hidden``."""
        return self.decode(self.encode(pixels, shown), shown, hidden)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, H) -> (B, L, 3 p^2): patches row by row, in each row by row the pixels' channels."""
    cut = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, h, p, h, p)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def positions(side: int, width: int) -> Tensor:
    """Fixed sines and cosines (1, 1 + L, D), 0 for the class token.

    sin, cos of the column, then of the row, times 10000^(-4 k / D) for k < D / 4. Source: official `pos_embed.py`, in
    which columns come first whatever its variables are called.
    """
    frequency = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # (h, D / 2)
    table = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)
    return nn.functional.pad(table, (0, 0, 1, 0))[None].float()


def timm_state(network: MAEVit) -> dict[str, Tensor]:
    """The encoder's tensors under timm's names, without its last norm: a mean of patches has a norm of its own."""
    kept = ("patch_embed.", "cls_token", "pos_embed", "blocks.")
    return {name: value.clone() for name, value in network.state_dict().items() if name.startswith(kept)}
