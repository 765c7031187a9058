"""Images into the latents of a VAE: what stands before a network that reads latents.

Letters: B images, H W pixels per side, f pixels per cell and side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffrep import counting
from diffrep.frozen.base import FrozenModule


class LatentEncoder:
    """The encoder of diffusers' ``AutoencoderKL``, read at the mode of its posterior: nothing is drawn.

    vae:    the frozen autoencoder.
    pixels: per side, of the images it is given.
    """

    def __init__(self, vae: FrozenModule, latent_size: int) -> None:
        self.vae = vae
        self.pixels = latent_size * 2 ** (len(vae.module.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return self.vae.module.config.latent_channels

    def latents(self, images: Tensor, memory_mb: int | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, channels, H / f, W / f), scaled as the network knows them.

        With ``memory_mb`` only so many images go through at once as fit.
        """
        at_once = len(images) if memory_mb is None else memory_mb * 1_000_000 // self.peak_bytes
        return torch.cat([self._latents(part) for part in images.split(max(at_once, 1))])

    def _latents(self, images: Tensor) -> Tensor:
        self.vae.follow(images)
        vae = self.vae.module
        return vae.encode(images * 2 - 1, return_dict=False)[0].mode() * vae.config.scaling_factor

    @cached_property
    def multiply_adds(self) -> int:
        """Counted multiply-adds of one image."""
        return counting.multiply_adds(self._dry_pass())

    @cached_property
    def peak_bytes(self) -> int:
        """Most bytes that one image holds at once."""
        return counting.peak_bytes(self._dry_pass())

    def _dry_pass(self) -> Callable[[], Any]:
        vae = self.vae.module
        encoder = nn.Sequential(*[part for part in (vae.encoder, vae.quant_conv) if part is not None])
        return counting.on_meta(encoder, torch.zeros(1, 3, self.pixels, self.pixels))
