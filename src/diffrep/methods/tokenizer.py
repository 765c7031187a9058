"""Train a tokenizer of one's own images: a VQGAN without its adversarial part.

van den Oord et al. 2017, with the codebook learnt by running means (their appendix A.1): codes are no parameters of the
optimiser, they follow the mean of the latents that choose them, and one that hardly any latent chooses begins anew at a
latent of the batch. Loss: mean (x - D(z_q))^2 + beta mean (z - sg[e])^2, gradients straight through the quantiser.
Letters: B images, c latent channels, K codes, N = B h w latents of a batch.

Deviations from the tokenizer that ADDP was released with: no perceptual and no adversarial loss; one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep.data.batch import Batch
from diffrep.errors import UserError
from diffrep.frozen.tokens import write_network
from diffrep.methods.base import Method, MethodConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.randomness import Rows, stream


class TokenizerConfig(MethodConfig):
    """The network, and how its codebook learns."""

    kind: Literal["tokenizer"] = "tokenizer"
    network: VQGANConfig = VQGANConfig()
    commitment: float = Field(0.25, ge=0)  # beta
    decay: float = Field(0.97, gt=0, lt=1)  # of the running means behind a code
    revive_below: float = Field(0.5, ge=0)  # latents per step; a code that is chosen less often begins anew


class TokenizerMethod(Method):
    """One step: encode, quantise, decode; afterwards the codebook follows."""

    chosen: Tensor  # (K,) running number of latents per code and step
    summed: Tensor  # (K, c) running sum of those latents

    def __init__(self, config: TokenizerConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        if image_size % config.network.stride:
            what = f"method.network makes one token of {config.network.stride} pixels"
            raise UserError(f"{what}: data.image_size {image_size} is not divisible")
        self.config, self.network = config, VQGAN(config.network)
        self.network.codebook.requires_grad_(False)
        codes, channels = self.network.codebook.shape
        self.register_buffer("chosen", torch.ones(codes))
        self.register_buffer("summed", torch.zeros(codes, channels))
        self._step: tuple[Tensor, Tensor] | None = None  # latents of the step, and those that dead codes may take

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The first codes are latents of training images."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("method 'tokenizer' learns its codebook in one process: leave torchrun out")
        with torch.no_grad():
            latents = self._flat(self.network.encoder(next(iter(batches)).images))
        codes = len(self.network.codebook)
        place = torch.randperm(len(latents), generator=stream(0, "first codes"))[:codes].to(latents.device)
        if len(place) < codes:
            raise UserError(f"method.network.num_codes {codes}: the first images have {len(place)} latents only")
        self._set_codes(torch.ones_like(self.chosen), latents[place])

    @staticmethod
    def _flat(z: Tensor) -> Tensor:
        """(B, c, h, w) -> (N, c) float32."""
        return z.detach().float().movedim(1, 3).flatten(0, 2)

    def _set_codes(self, chosen: Tensor, summed: Tensor) -> None:
        self.chosen.copy_(chosen)
        self.summed.copy_(summed)
        self.network.codebook.data.copy_(summed / chosen[:, None])

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        z = self.network.encoder(batch.images)  # (B, c, h, w)
        ids = self.network.quantize.nearest(z)
        codes, latents = self.network.lookup(ids), z.flatten(2).transpose(1, 2)  # (B, L, c)
        drawn = self.network.decode(latents + (codes - latents).detach(), (z.shape[2], z.shape[3]))
        self._note(z, rng)
        mse, commitment = F.mse_loss(drawn.float(), batch.images), F.mse_loss(latents, codes)
        loss = mse + self.config.commitment * commitment
        return {"loss": loss, "mse": mse, "commitment": commitment, "codes_used": self._used()}

    def _note(self, z: Tensor, rng: Rows) -> None:
        latents, order = self._flat(z), rng.uniform(z.shape[2] * z.shape[3]).flatten().argsort()
        offered = latents[order.to(latents.device)]
        if self._step is not None:  # of the micro-batches before
            latents, offered = torch.cat([self._step[0], latents]), torch.cat([self._step[1], offered])
        self._step = (latents, offered) if self.training else None

    def _used(self) -> Tensor:
        """Share of codes that are alive."""
        return (self.chosen >= self.config.revive_below).float().mean()

    @torch.no_grad()
    def after_step(self) -> None:
        """Codes follow their latents; those that nobody chooses begin anew."""
        if self._step is None:
            return
        latents, offered = self._step
        self._step = None
        ids = self.network.quantize.nearest(latents[:, :, None, None])[:, 0]
        one_hot = F.one_hot(ids, len(self.chosen)).float()
        chosen = torch.lerp(one_hot.sum(0), self.chosen, self.config.decay)
        summed = torch.lerp(one_hot.T @ latents, self.summed, self.config.decay)
        dead = (chosen < self.config.revive_below).nonzero()[: len(offered), 0]
        chosen[dead], summed[dead] = 1.0, offered[: len(dead)]
        self._set_codes(chosen.clamp(min=1e-6), summed)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"tokenizer": [p for p in self.parameters() if p.requires_grad]}

    def dry_step(self, images: Tensor) -> None:
        z = self.network.encoder(images)
        self.network.decode(z.flatten(2).transpose(1, 2), (z.shape[2], z.shape[3])).sum().backward()

    def export(self, run_dir: Path) -> dict[str, Any]:
        write_network(run_dir, "tokenizer", self.network, run_dir.name, self.licence)
        return {"codes_used": round(float(self._used()), 4)}
