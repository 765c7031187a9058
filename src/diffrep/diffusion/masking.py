"""Diffusion over tokens: which are masked in training, and how a walk from all masked to none goes.

Tian et al. 2024 (ADDP), figures 4 and 5 and `models_addp.py`; Li et al. 2023 (MAGE); Chang et al. 2022 (MaskGIT).
Letters: B images, L tokens, K codes; a mask is bool, True where a token is hidden or unreliable.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config
from diffrep.errors import UserError
from diffrep.randomness import Rows, stream

Unreliable = Literal["soft", "hard"]  # tokens: an expectation of the codebook, or one id

# Training


class MaskConfig(Config):
    """The law of the masked share: a normal of mean ``mu`` and deviation ``std``, cut to [minimum, maximum)."""

    minimum: float = Field(0.5, ge=0, lt=1)
    maximum: float = Field(1.0, gt=0, le=1)
    mu: float = 0.55
    std: float = Field(0.25, gt=0)
    offset: int = Field(5, ge=1)  # z_{t+1} is 1 to this many steps of the table noisier than z_t

    @model_validator(mode="after")
    def _fits(self) -> MaskConfig:
        if not len(mask_ratios(self)):
            raise ValueError("no ratio cos(pi k / 200) is in [minimum, maximum)")
        return self


class PairMaskConfig(MaskConfig):
    """Of the pair of masks that ADDP learns from."""

    # Who has a share of their own: all images of a step together (official: of a step on one process), or each one.
    ratio_per: Literal["batch", "sample"] = "batch"


def mask_ratios(config: MaskConfig) -> Tensor:
    """The table of shares, rising: cos(pi/2 k/100) for k = 99..1, those in [minimum, maximum); (R,) float32."""
    ratios = torch.cos(math.pi / 2 * (torch.arange(99, 0, -1) / 100))
    return ratios[(ratios >= config.minimum) & (ratios < config.maximum)]


def ratio_probabilities(config: MaskConfig) -> Tensor:
    """(R,) float64: the density of the law at each ratio, normalised over the table."""
    density = torch.exp(-0.5 * ((mask_ratios(config).double() - config.mu) / config.std).square())
    return density / density.sum()


def drawn_counts(config: MaskConfig, num_tokens: int, ratio: float, offset: float) -> tuple[int, int]:
    """Masked tokens at t and at the noisier step t + 1, from two uniform numbers in [0, 1)."""
    masked, noisier = counts_of(config, num_tokens, torch.tensor([ratio]).double(), torch.tensor([offset]).double())
    return int(masked), int(noisier)


def counts_of(config: MaskConfig, num_tokens: int, ratio: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`drawn_counts` of many samples: (B,) float64 each -> (B,) int64 each, on the CPU."""
    cumulative = ratio_probabilities(config).cumsum(0)
    counts = torch.tensor([masked_count(r, num_tokens) for r in mask_ratios(config)])
    index = torch.searchsorted(cumulative, ratio, right=True).clamp(max=len(counts) - 1)
    noisier = (index + 1 + (offset * config.offset).long()).clamp(max=len(counts) - 1)
    return counts[index], counts[noisier]


def pair_counts(config: PairMaskConfig, num_tokens: int, rng: Rows) -> tuple[Tensor, Tensor, float]:
    """Masked tokens of this process's rows at t and t + 1, (B,) int64 each, and the mean at t of the global batch."""
    if config.ratio_per == "batch":
        masked, noisier = drawn_counts(config, num_tokens, rng.shared(), rng.shared())
        size = rng.total if rng.rows is None else len(rng.rows)
        return torch.full((size,), masked), torch.full((size,), noisier), float(masked)
    every = Rows(rng.generator, rng.total)
    counts = counts_of(config, num_tokens, *(every.uniform().cpu().double() for _ in range(2)))
    here = slice(None) if rng.rows is None else rng.rows.cpu()
    return counts[0][here], counts[1][here], float(counts[0].double().mean())


def masked_count(ratio: Tensor, num_tokens: int) -> int:
    """ceil(L ratio), in float32 as the official code counts."""
    return int(torch.ceil(num_tokens * ratio))


def lowest(values: Tensor, count: int | Tensor) -> Tensor:
    """(B, L) -> bool mask of the ``count`` smallest of each row; masks of larger counts hold those of smaller ones.

    count: of every row, or (B, 1) of each.
    """
    return values.argsort(dim=1, stable=True).argsort(1) < count


def drawn_ids(probabilities: Tensor, chance: Tensor) -> Tensor:
    """(..., K), uniform numbers (...) in [0, 1) -> ids (...): the cumulative distribution inverted, in float64."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = chance.to(probabilities.device)[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp_(max=probabilities.shape[-1] - 1)


# Generation


class AlternationConfig(Config):
    """How an image is made, step by step. Defaults: the official ones."""

    steps: int = Field(20, ge=1)  # N; the released linear schedule takes 256
    schedule: Literal["cosine", "linear"] = "cosine"  # share that is still masked after a share of the steps
    choice_temperature: float = Field(6.0, ge=0)  # noise in the choice of what to keep
    temperature_strategy: Literal["dynamic", "static"] = "dynamic"  # dynamic: falls to 0
    top_p: float = Field(1.0, ge=0, le=1)  # ids beyond this mass are not drawn
    finish: bool = False  # reveal the last token too; official: one stays soft
    unreliable: Unreliable = "soft"  # what is decoded of masked tokens: expected codes, or (as learnt) ids drawn


def masked_after(config: AlternationConfig, masked: int) -> list[int]:
    """Masked tokens after each step, of ``masked`` at the start: clip(ceil(masked gamma(r)), 1, masked).

    Raises:
        UserError: more steps than tokens.
    """
    if config.steps > masked:
        raise UserError(f"steps {config.steps}: there are {masked} tokens to reveal, so at most {masked} steps")
    shares = [(s + 1) / config.steps for s in range(config.steps)]
    left = [math.cos(math.pi * r / 2) if config.schedule == "cosine" else 1 - r for r in shares]
    counts = [min(max(math.ceil(masked * share), 1), masked) for share in left]
    return [*counts[:-1], 0] if config.finish else counts


def choice_temperature(config: AlternationConfig, step: int) -> float:
    """tau of one step: choice_temperature (1 - r), or constant."""
    return config.choice_temperature * (
        1 - (step + 1) / config.steps if config.temperature_strategy == "dynamic" else 1.0
    )


def within_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep rank r where the mass of ranks 0..r-1 is below ``top_p``, and rank 0 always; (..., K), not normalised."""
    if top_p >= 1:
        return probabilities
    ordered, place = probabilities.sort(-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p) | (torch.arange(ordered.shape[-1], device=ordered.device) == 0)
    return torch.zeros_like(probabilities).scatter(-1, place, ordered * kept)


def confidence(probabilities: Tensor, ids: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """log p of each drawn id plus noise, (B, L) float64; known tokens are beyond doubt (+inf)."""
    chosen = probabilities.gather(2, ids[..., None])[..., 0].double().log()
    return torch.where(mask, chosen + noise, torch.inf)


class Draws(Protocol):
    """The chance in a walk: which ids, and which of them are kept."""

    def ids(self, step: int, probabilities: Tensor) -> Tensor:
        """One id for each distribution (B, L, K) -> (B, L)."""

    def gumbel(self, step: int) -> Tensor:
        """Standard Gumbel noise (B, L) float64."""


class ImageDraws:
    """Draws of images by their seeds: each image has its own, at each step, whoever stands beside it."""

    def __init__(self, seeds: list[int], num_tokens: int) -> None:
        self.seeds, self.num_tokens = seeds, num_tokens

    def ids(self, step: int, probabilities: Tensor) -> Tensor:
        """By :func:`drawn_ids`."""
        return drawn_ids(probabilities, self._uniform("token", step))

    def gumbel(self, step: int) -> Tensor:
        uniform = self._uniform("choice", step).clamp(min=np.finfo(np.float64).tiny)
        return -(-uniform.log()).log()

    def _uniform(self, purpose: str, step: int) -> Tensor:
        rows = [
            torch.rand(self.num_tokens, dtype=torch.float64, generator=stream(seed, purpose, step))
            for seed in self.seeds
        ]
        return torch.stack(rows)
