"""ADDP: alternate between tokens and pixels, to generate and to recognise (Tian et al., ICLR 2024).

Training (figure 4): an image x_0 has ids z_0; m_t inside m_{t+1} say which tokens are masked. The token predictor q
names what is masked; its expected codes at t + 1 are decoded, with the reliable tokens, to pixels x_t; the network
learns q(z_{t-1} | z_t) from x_t and the reliable ids. Rows and passes that no loss or gradient depends on are left
out (:mod:`diffrep.models.some_rows`). Generation (figure 5) alternates: pixels to a distribution over
ids, ids drawn, the least sure masked again, codes to pixels.
Letters: B images, L tokens of which M are masked in the whole batch, K codes, V = K + 1001 rows of the vocabulary,
c latent channels.

Deviations from `main_pretrain.py` and `models_addp.py`: frozen networks stay in eval mode (the official loop turns the
predictor's dropout on again: ``predictor_dropout``); ids are found in float32 whatever the precision; the share of
masked tokens is drawn from the run's seed (official: partly from a generator that nobody seeds) and is one for a step
on all processes (official: one for each process); codebook and grid sizes come from the networks. Generation reads no
image where none is needed and no predictor, leaves out steps that cannot change the image, draws each image from its
own seed, and takes the first pixels of a repair from visible tokens alone (official: from the true image, hidden parts
included).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffrep import losses
from diffrep.config import Config
from diffrep.counting import multiply_adds
from diffrep.data.batch import Batch
from diffrep.diffusion.masking import (
    AlternationConfig,
    Draws,
    PairMaskConfig,
    Unreliable,
    choice_temperature,
    confidence,
    drawn_ids,
    lowest,
    masked_after,
    pair_counts,
    within_top_p,
)
from diffrep.errors import UserError
from diffrep.frozen.passes import PassConfig, running
from diffrep.frozen.tokens import Tokenizer, load_predictor, load_tokenizer, write_network
from diffrep.methods.base import Method, MethodConfig, save_student
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig, timm_state
from diffrep.models.masked_vit import TransformerConfig
from diffrep.models.some_rows import Places, predicted_at
from diffrep.models.students import Student
from diffrep.models.vit_students import filled, vit_student
from diffrep.randomness import Rows


class ADDPConfig(MethodConfig):
    """The two frozen networks, the trained one, and how tokens are masked."""

    kind: Literal["addp"] = "addp"
    tokenizer: str  # a run folder or a file
    token_predictor: str
    network: TransformerConfig = TransformerConfig()
    mask: PairMaskConfig = PairMaskConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    codes_alone: bool = False  # in the loss: leave out the 1001 ids that never occur; official: all V compete
    keep_tokenizer_norm: bool = False  # in the exported ViT; official fine-tuning drops it
    # Of predictor and decoder; ids are found in float32 always. None: as train.precision.
    frozen_precision: Literal["fp32", "bf16"] | None = None
    predictor_dropout: Literal["official"] | None = None  # official: the teacher's dropout is on; null: it is off
    # Ablations: f maps unreliable tokens to expected codes (soft) or to that of an id drawn; what is learnt is the
    # predictor's answer, or the image's own ids.
    unreliable: Unreliable = "soft"
    target: Literal["predictor", "tokens"] = "predictor"
    checkpoint_blocks: bool = False  # less memory: a block's inside is computed again in the backward pass


# Training


class ADDP(Method):
    """One step of figure 4."""

    def __init__(self, config: ADDPConfig, num_classes: int, image_size: int, allow_code: bool = False) -> None:
        super().__init__()
        self.config, self.tokenizer = config, load_tokenizer(config.tokenizer)
        self.predictor = load_predictor(config.token_predictor, self.tokenizer)
        self._check_sizes(image_size)
        shape = {"image_size": image_size, "patch_size": self.tokenizer.stride, "num_codes": self.tokenizer.num_codes}
        self.network = ADDPVit(config_of(config.network, shape))
        self.network.checkpoint_blocks = config.checkpoint_blocks
        frozen = (self.tokenizer, self.predictor)
        self.licence = "; ".join([Method.licence, *(f"taught by {one.name} ({one.licence})" for one in frozen)])

    def _check_sizes(self, image_size: int) -> None:
        height, width = self.tokenizer.grid(torch.empty(1, 3, image_size, image_size, device="meta"))
        if not self.tokenizer.module.config.decoder:
            raise UserError(f"the tokenizer {self.tokenizer.name} has no decoder, and ADDP learns from decoded pixels")
        if (known := self.predictor.module.config.num_tokens) != height * width:
            found = f"{height * width} tokens of {self.tokenizer.name}, the token predictor {self.predictor.name}"
            raise UserError(f"images of {image_size} pixels are {found} knows {known}; see data.image_size")

    def forward(self, batch: Batch, rng: Rows, progress: float) -> dict[str, Tensor]:
        ids = self.tokenizer.encode(batch.images)  # z_0
        masked, noisier, mean = pair_counts(self.config.mask, ids.shape[1], rng)
        order = rng.uniform(ids.shape[1]).to(ids.device)
        m_t, m_next = (lowest(order, counts[:, None].to(ids.device)) for counts in (masked, noisier))
        chance = rng.uniform(ids.shape[1]).to(ids.device) if self.config.unreliable == "hard" else None
        # Over the global batch a mean of masked tokens, however it is split over processes and micro-batches.
        loss = self.losses(ids, m_t, m_next, chance).sum() / (mean * len(ids))
        return {"loss": loss, "masked_share": m_t.float().mean()}

    def losses(self, ids: Tensor, m_t: Tensor, m_next: Tensor, chance: Tensor | None = None) -> Tensor:
        """Of each masked token, (M,): soft cross-entropy, the KL divergence up to the target's entropy."""
        x_t, target = self.teach(ids, m_t, m_next, chance)
        rows = self.tokenizer.num_codes if self.config.codes_alone else None
        logits = self.network.masked_logits(x_t, ids, m_t, rows)
        each = losses.soft_token_cross_entropy(logits[None], target[None], self.config.label_smoothing)[0]
        return each + self.network.nothing() if x_t is None else each

    @torch.no_grad()
    def teach(
        self, ids: Tensor, m_t: Tensor, m_next: Tensor, chance: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """x_t (B, 3, H, W), not held in [0, 1], None where everything is masked; q(z_{t-1} | z_t) there, (M, K).

        chance: (B, L) in [0, 1), what hard unreliable tokens are drawn with; None: they are soft.
        """
        with self._frozen_pass(ids.device):
            if bool(m_t.all()):
                return None, self._blank_target(ids, m_t)
            target, guess = self._asked(ids, m_t, m_next)
            z_t = self.tokenizer.lookup(ids)
            unreliable = self.tokenizer.soft(guess) if chance is None else self._drawn(guess, chance[m_t])
            z_t[m_t] = unreliable.to(z_t.dtype)
            return self.tokenizer.decode(z_t, self.network.config.grid).float(), target

    def _drawn(self, guess: Tensor, chance: Tensor) -> Tensor:
        """Codes (M, c) of ids drawn from a guess (M, K)."""
        return self.tokenizer.lookup(drawn_ids(guess, chance))

    def _own(self, ids: Tensor) -> Tensor:
        """Certainty of ids (M,): (M, K)."""
        return F.one_hot(ids, self.tokenizer.num_codes).float()

    def _asked(self, ids: Tensor, m_t: Tensor, m_next: Tensor) -> tuple[Tensor, Tensor]:
        """q(z | z_t) and q(z | z_{t+1}) where m_t is, (M, K) each: one batch, of an image with equal masks one pass."""
        official = self.config.predictor_dropout == "official"
        if self.config.target == "tokens":
            return self._own(ids[m_t]), self.predictor.probabilities_at(ids, m_next, m_t, dropout=official)
        apart, masked = (m_t != m_next).any(1) | official, int(m_t.sum())
        both = ((ids, ids), (m_t, m_next), (m_t, m_t))
        found = self.predictor.probabilities_at(*(torch.cat([a, b[apart]]) for a, b in both), dropout=official)
        target = found[:masked]
        guess = target.clone()
        guess[apart[:, None].expand_as(m_t)[m_t]] = found[masked:]
        return target, guess

    def _blank_target(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of masks alone: one table for all images, unless chance is in it."""
        if self.config.target == "tokens":
            return self._own(ids[mask])
        if self.config.predictor_dropout == "official":
            return self.predictor.probabilities_at(ids, mask, mask, dropout=True)
        return self.predictor.probabilities_at(ids[:1], mask[:1], mask[:1]).repeat(len(ids), 1)

    def _frozen_pass(self, device: torch.device) -> AbstractContextManager[None]:
        precision = self.config.frozen_precision
        return running(PassConfig(precision=precision), device) if precision else contextlib.nullcontext()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"addp": [p for p in self.parameters() if p.requires_grad]}

    def depths(self) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """The head's bias over the vocabulary is stored with three dimensions, and is a bias all the same."""
        return [], [self.network.mlm_layer.bias]

    def dry_step(self, images: Tensor) -> None:
        """At the law's mean share of masked tokens, which is near three quarters."""
        ids, visible, masked = self._three_quarters(images.device, len(images))
        self.network.answer(images, ids, ids == 0, visible, masked).sum().backward()

    def frozen_multiply_adds(self) -> int:
        """Encode and decode an image, ask the predictor for x_t and for the target; at the same share."""
        size, predictor = self.network.config.image_size, self.predictor.module
        counted = self.tokenizer.encode_multiply_adds(size) + self.tokenizer.decode_multiply_adds(size)
        with torch.device("meta"):
            blank = type(predictor)(predictor.config)
        ids, visible, masked = self._three_quarters(torch.device("meta"), 1)
        asked = 2 if self.config.target == "predictor" else 1
        return counted + asked * multiply_adds(lambda: predicted_at(blank, ids, ids == 0, visible.index, masked.index))

    def _three_quarters(self, device: torch.device, batch: int) -> tuple[Tensor, Places, Places]:
        """Ids, and where a mask of three quarters of them is False and True."""
        order = torch.arange(self.network.config.num_tokens, device=device).expand(batch, -1)
        shown = order.shape[1] // 4
        return torch.zeros_like(order), Places(order[:, :shown], None), Places(order[:, shown:], None)

    @property
    def student(self) -> Student:
        """The encoder as a plain ViT, as far as it has come."""
        config, norm = self.network.config, self.config.keep_tokenizer_norm
        return filled(vit_student(config.image_size, config.patch_size, config, norm), timm_state(self.network, norm))

    def export(self, run_dir: Path) -> dict[str, Any]:
        """The network with its tokenizer, to generate; the encoder as a timm ViT, to recognise."""
        write_network(run_dir, "addp", self.network, run_dir.name, self.licence)
        write_network(run_dir, "tokenizer", self.tokenizer.module, self.tokenizer.name, self.tokenizer.licence)
        save_student(run_dir, self.student)
        return {"tokenizer": self.tokenizer.sha256, "token_predictor": self.predictor.sha256}


def config_of(network: Config, shape: dict[str, int]) -> ADDPVitConfig:
    """The whole network from what a recipe says of it and what its tokenizer decides."""
    return ADDPVitConfig(**network.model_dump(), **shape)


# Generation


@dataclass(frozen=True)
class Moment:
    """What one step of a walk did. Pixels are as decoded, not held in [0, 1]."""

    step: int
    probabilities: Tensor  # (B, L, K)
    ids: Tensor  # (B, L), of masked positions still a proposal
    mask: Tensor  # (B, L), after the step
    latents: Tensor  # (B, L, c)
    pixels: Tensor  # (B, 3, H, W)


@torch.no_grad()
def alternate(
    network: ADDPVit,
    tokenizer: Tokenizer,
    config: AlternationConfig,
    draws: Draws,
    ids: Tensor,
    mask: Tensor,
    pixels: Tensor | None = None,
    watch: Callable[[Moment], None] = lambda moment: None,
) -> Tensor:
    """Figure 5: from pure masks, or from the visible ids of an image, to an image.

    Args:
        ids: (B, L); those of masked positions are not read.
        mask: (B, L), of every image the same number masked.
        pixels: what the encoder sees first, (B, 3, H, W); None: :func:`first_pixels`. Where everything is masked
            nothing depends on it.
        watch: shown every step that is done.

    Returns:
        (B, 3, H, W), not held in [0, 1].

    Raises:
        UserError: more steps than masked tokens.
    """
    counts, tokens = masked_after(config, int(mask[0].sum())), mask.shape[1]
    blank = all_masked(network, mask[:1])  # (1, L, K)
    if pixels is None and not bool(mask.all()):
        pixels = first_pixels(network, tokenizer, blank, ids, mask)
    for step in range(first_step(counts, tokens), config.steps):
        probabilities = blank if bool(mask.all()) else predicted(network, pixels, ids, mask)
        probabilities = probabilities.expand(len(ids), -1, -1)
        ids = torch.where(mask, draws.ids(step, within_top_p(probabilities, config.top_p)), ids)
        noise = choice_temperature(config, step) * draws.gumbel(step).to(ids.device)
        mask = lowest(confidence(probabilities, ids, mask, noise), counts[step])
        latents = tokenizer.lookup(ids)
        if config.unreliable == "soft":
            latents = torch.where(mask[..., None], tokenizer.soft(probabilities), latents)
        pixels = tokenizer.decode(latents, network.config.grid)
        watch(Moment(step, probabilities, ids, mask, latents, pixels))
    return pixels


def predicted(network: ADDPVit, pixels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
    """p_theta(z | x_t, z_t), (B, L, K): class and mask rows are cut off before the softmax."""
    latent = None if pixels is None else network.encode(pixels)
    logits = network.decode(latent, ids, mask)
    return logits[:, 1 : 1 + mask.shape[1], : network.config.num_codes].float().softmax(2)


def all_masked(network: ADDPVit, like: Tensor) -> Tensor:
    """What the network says where everything is masked: one table (1, L, K), whatever the pixels."""
    mask = torch.ones_like(like)
    return predicted(network, None, mask.long(), mask)


def first_step(counts: list[int], tokens: int) -> int:
    """The first step that can change the image: after those before it everything is masked still.

    A step that reveals nothing of a blank image leaves nothing behind: no later step reads its ids or its pixels.
    """
    return sum(count == tokens for count in counts[:-1])


def first_pixels(network: ADDPVit, tokenizer: Tokenizer, blank: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The pixels of visible tokens, hidden ones being what a blank image expects there."""
    latents = torch.where(mask[..., None], tokenizer.soft(blank), tokenizer.lookup(ids))
    return tokenizer.decode(latents, network.config.grid)


def as_uint8(pixels: Tensor, rounding: Literal["truncate", "nearest"] = "truncate") -> Tensor:
    """(B, 3, H, W) -> uint8; official: clamp(255 x, 0, 255) cut off, which is half a level darker than rounding."""
    scaled = (pixels.float() * 255).clamp(0, 255)
    return (scaled if rounding == "truncate" else scaled.round()).to(torch.uint8)
