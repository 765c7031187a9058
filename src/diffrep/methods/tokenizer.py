"""Train a tokenizer of one's own images: a VQGAN without its adversarial part.

Loss: mean (x - D(z_q))^2 + beta mean (z - sg[e])^2, gradients straight through the quantiser (van den Oord et al.
2017, equation 3); on wish also the distance of image and copy in a named network's features. Codes follow running
means of the latents that choose them (their appendix A.1) and are no parameters of the optimiser, or learn by gradient
from gamma mean (e - sg[z])^2. A code that hardly any latent chooses begins anew at a latent of the batch.
Letters: B images, c latent channels, K codes, L tokens of an image.

Deviations from the tokenizer that ADDP was released with (MaskGIT's, whose training code is not public): no
adversarial loss; features without learned weights in the perceptual part; running means and revival.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import counting, losses, taps
from diffrep.data.batch import Batch
from diffrep.errors import UserError, nearest
from diffrep.frozen.classifier import ClassifierConfig, load_classifier
from diffrep.frozen.tokens import write_network
from diffrep.methods.base import Method, MethodConfig, sum_over_processes
from diffrep.models.vqgan import VQGAN, VQGANConfig, perplexity
from diffrep.randomness import Rows, stream

RECENT = 100  # steps; a code that was named in one of them is in use
COLLAPSED = 0.1  # share of codes in use below which a run's notes say so


class PerceptualConfig(ClassifierConfig):
    """The frozen classifier that looks at image and copy, told as for every other one, and where it is read."""

    taps: tuple[str, ...] = Field(min_length=1)  # dotted module paths
    weight: float = Field(1.0, gt=0)  # beside the squared error of pixels


class TokenizerConfig(MethodConfig):
    """The network, and how its codebook learns."""

    kind: Literal["tokenizer"] = "tokenizer"
    network: VQGANConfig = VQGANConfig()
    commitment: float = Field(0.25, ge=0)  # beta; the released network's code has 1
    # gamma, of mean (e - sg[z])^2: codes learn by gradient (released: 0.25); None: by running means
    codebook: float | None = Field(None, gt=0)
    decay: float = Field(0.97, gt=0, lt=1)  # per step, of running means
    revive_below: float = Field(0.5, ge=0)  # latents per step; a code that is chosen less often begins anew
    revive_after: int | None = Field(None, ge=1)  # steps; instead: a code that nobody chose for so long begins anew
    perceptual: PerceptualConfig | None = None


class TokenizerMethod(Method):
    """One step: encode, quantise, decode; afterwards the codebook follows."""

    chosen: Tensor  # (K,) running number of latents per code and step; of a code that begins anew 1
    summed: Tensor  # (K, c) running sum of those latents
    named: Tensor  # (K,) running number of latents per code and step, whatever was revived
    idle: Tensor  # (K,) int64, steps since a latent chose the code

    def __init__(self, config: TokenizerConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        if image_size % config.network.stride:
            what = f"method.network makes one token of {config.network.stride} pixels"
            raise UserError(f"{what}: data.image_size {image_size} is not divisible")
        self.config, self.network = config, VQGAN(config.network)
        self.network.codebook.requires_grad_(config.codebook is not None)
        self.perceptual = Perceptual(config.perceptual, image_size, allow_code) if config.perceptual else None
        if self.perceptual:
            judge = self.perceptual.classifier
            self.licence = f"{Method.licence}; judged by features of {judge.name} ({judge.licence})"
            self.labels_behind = {f"perceptual: {part}": count for part, count in judge.labels_seen.items()}
        codes, channels = self.network.codebook.shape
        self.register_buffer("chosen", torch.ones(codes))
        self.register_buffer("summed", torch.zeros(codes, channels))
        self.register_buffer("named", torch.zeros(codes))
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))
        self._step: tuple[Tensor, ...] | None = None  # of the micro-batches so far: see _note

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The first codes are latents of training images."""
        with torch.no_grad():
            latents = flat(self.network.encoder(next(iter(batches)).images)).flatten(0, 1)
        codes = len(self.network.codebook)
        place = torch.randperm(len(latents), generator=stream(0, "first codes"))[:codes].to(latents.device)
        if len(place) < codes:
            raise UserError(f"method.network.num_codes {codes}: the first images have {len(place)} latents only")
        self._follow(torch.ones_like(self.chosen), latents[place])

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        z = self.network.encoder(batch.images)  # (B, c, h, w)
        ids = self.network.quantize.nearest(z)
        codes, latents = self.network.lookup(ids), z.flatten(2).transpose(1, 2)  # (B, L, c)
        drawn = self.network.decode(latents + (codes - latents).detach(), (z.shape[2], z.shape[3])).float()
        if self.training:
            self._note(flat(z), ids, rng)
        parts = {"mse": F.mse_loss(drawn, batch.images), "commitment": F.mse_loss(latents, codes.detach())}
        loss = parts["mse"] + self.config.commitment * parts["commitment"]
        if self.config.codebook is not None:
            parts["codebook"] = F.mse_loss(codes, latents.detach())
            loss = loss + self.config.codebook * parts["codebook"]
        if self.perceptual:
            parts["perceptual"] = self.perceptual.distance(drawn, batch.images).mean()
            loss = loss + self.perceptual.weight * parts["perceptual"]
        return {"loss": loss, **parts, "codes_used": self.used(), "perplexity": perplexity(self.named)}

    # The codebook

    def used(self) -> Tensor:
        """Share of codes that a latent chose within the last ``RECENT`` steps, ()."""
        return ((self.named > 0) & (self.idle < RECENT)).float().mean()

    @torch.no_grad()
    def _note(self, latents: Tensor, ids: Tensor, rng: Rows) -> None:
        """Add to what the step knows so far: latents per code (K,), their sum (K, c), and latents to begin anew at."""
        with torch.autocast(latents.device.type, enabled=False):
            one_hot = F.one_hot(ids.flatten(), len(self.chosen)).float()
            summed = one_hot.T @ latents.flatten(0, 1)
        found = (one_hot.sum(0), summed, offered(latents, len(self.chosen), rng))
        self._step = tuple(a + b for a, b in zip(self._step, found, strict=True)) if self._step else found

    @torch.no_grad()
    def after_step(self) -> None:
        """Codes follow their latents, those of all processes; what nobody chooses begins anew."""
        if self._step is None:
            return
        count, summed, fresh = (sum_over_processes(part) for part in self._step)
        self._step = None
        self.named.lerp_(count, 1 - self.config.decay)
        self.idle.copy_(torch.where(count > 0, 0, self.idle + 1))
        chosen = torch.lerp(count, self.chosen, self.config.decay)
        summed = torch.lerp(summed, self.summed, self.config.decay)
        dead = self._dead(chosen)[: len(fresh)]
        chosen[dead], summed[dead] = 1.0, fresh[: len(dead)]
        if self.config.codebook is None:
            kept = chosen.clamp(min=1e-6)  # of a code that waits for long: its place stays
            self._follow(kept, summed * (kept / chosen)[:, None])
        else:
            self.chosen.copy_(chosen)
            self.network.codebook.data[dead] = fresh[: len(dead)]

    def _dead(self, chosen: Tensor) -> Tensor:
        """The codes to begin anew; one that is still not chosen gets another try after as many steps."""
        if self.config.revive_after is None:
            return (chosen < self.config.revive_below).nonzero()[:, 0]
        return ((self.idle > 0) & (self.idle % self.config.revive_after == 0)).nonzero()[:, 0]

    def _follow(self, chosen: Tensor, summed: Tensor) -> None:
        """Each code to the mean of its latents."""
        self.chosen.copy_(chosen)
        self.summed.copy_(summed)
        self.network.codebook.data.copy_(summed / chosen[:, None])

    # What the loop asks

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"tokenizer": [p for p in self.parameters() if p.requires_grad]}

    def dry_step(self, images: Tensor) -> None:
        z = self.network.encoder(images)
        self.network.decode(z.flatten(2).transpose(1, 2), (z.shape[2], z.shape[3])).sum().backward()

    def frozen_multiply_adds(self) -> int:
        return self.perceptual.multiply_adds() if self.perceptual else 0

    def export(self, run_dir: Path) -> dict[str, Any]:
        """The network; how much of its codebook the last steps used, with a warning where that is little."""
        write_network(run_dir, "tokenizer", self.network, run_dir.name, self.licence)
        used, even = float(self.used()), float(perplexity(self.named))
        notes = self.notes
        if self.named.any() and used < COLLAPSED:
            codes = f"{100 * used:.1f} % of {len(self.named):,} codes are in use"
            notes = (*notes, f"the codebook has collapsed: {codes}, as evenly as {even:.1f} codes would be")
        return {"codes_used": round(used, 4), "perplexity": round(even, 2), "notes": list(notes)}


def flat(z: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, L, c) float32, without gradient."""
    return z.detach().float().movedim(1, 3).flatten(1, 2)


def offered(latents: Tensor, count: int, rng: Rows) -> Tensor:
    """Latents at ``count`` places (or all there are) drawn from the whole batch of a step, (count, c).

    Those at places of another micro-batch or process are zero: the sum over all of them is the draw.

    Args:
        latents: (B, L, c), of the rows that ``rng`` draws for.
    """
    tokens = latents.shape[1]
    order = Rows(rng.generator, rng.total).uniform(tokens).flatten().argsort()[:count]  # places in the whole batch
    rows = torch.arange(rng.total, device=order.device) if rng.rows is None else rng.rows
    here = (order[:, None] // tokens == rows).to(latents.device)  # (count, B)
    found = latents[here.int().argmax(1), order.to(latents.device) % tokens]
    return torch.where(here.any(1, keepdim=True), found, 0)


class Perceptual:
    """How far apart two images are in a frozen classifier's features (Zhang et al. 2018, equation 1, weights one)."""

    def __init__(self, config: PerceptualConfig, image_size: int, allow_code: bool) -> None:
        self.weight, self.classifier = config.weight, load_classifier(config, allow_code=allow_code)
        self.classifier.multiply_adds(image_size)  # refuses images it does not take
        self.module = self.classifier.module
        image = torch.zeros(1, self.classifier.in_chans, image_size, image_size)
        self.dry_run = counting.on_meta(self.module, image)
        known = taps.list_taps(self.module, self.dry_run, image_size)
        if unknown := [tap for tap in config.taps if tap not in known]:
            raise UserError(f"method.perceptual.taps: '{unknown[0]}' cannot be read; {nearest(unknown[0], known)}")
        self.taps = [known[tap] for tap in config.taps]

    def distance(self, drawn: Tensor, images: Tensor) -> Tensor:
        """Per image: squared difference of features of length one, mean over places, sum over taps, (B,).

        Args:
            drawn, images: (B, 3, H, W) in or around [0, 1]; ``images`` get no gradient.
        """
        with torch.no_grad():
            real = self.features(images)
        made = self.features(drawn)
        return torch.stack([_gap(made[name], real[name]) for name in made]).sum(0)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        self.classifier.follow(images)
        return taps.read(self.module, lambda: self.module(self.classifier.normalise(images)), self.taps)

    def multiply_adds(self) -> int:
        """Of one image: it and its copy forward, and the copy's way back, which is as long."""
        return 3 * counting.multiply_adds(lambda: taps.read(self.module, self.dry_run, self.taps))


def _gap(made: Tensor, real: Tensor) -> Tensor:
    """Maps (B, C, h, w), tokens (B, N, C) or vectors (B, C) -> (B,)."""
    channels = 2 if made.dim() == 3 else 1
    apart = losses.unit(losses.wide(made), channels) - losses.unit(losses.wide(real), channels)
    return apart.square().sum(channels).flatten(1).mean(1) if made.dim() > 2 else apart.square().sum(1)
