"""ADDP's multiply-adds on the meta device: of its parts, of a published step, of what is left out here, of a walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.pretraining import BASE, Size, method
from diffrep.counting import multiply_adds
from diffrep.diffusion.masking import (
    AlternationConfig,
    MaskConfig,
    mask_ratios,
    masked_after,
    masked_count,
    ratio_probabilities,
)
from diffrep.launch.generation_cost import decoder_multiply_adds, encoder_multiply_adds
from diffrep.methods.addp import ADDP, first_step
from diffrep.models.addp_vit import LARGE
from diffrep.models.masked_vit import TransformerConfig
from diffrep.models.some_rows import Places, predicted_at
from diffrep.models.vqgan import VQGANConfig

SIZES = {"base": BASE, "large": Size("ADDP-large", 256, TransformerConfig(**LARGE), VQGANConfig())}


@dataclass(frozen=True)
class Parts:
    """Multiply-adds of each network, for one image. decoder: by the number of visible tokens."""

    encode: int
    decode: int
    predictor: int
    encoder: int
    decoder: Callable[[int], int]


@cache
def made(size: str, checkpoint_blocks: bool = False) -> ADDP:
    return method(SIZES[size], "meta", checkpoint_blocks=checkpoint_blocks)


@cache
def parts(size: str) -> Parts:
    """Every row of every network."""
    addp = made(size)
    vq, predictor, shape = addp.tokenizer.module, addp.predictor.module, addp.network.config
    image = torch.zeros(1, 3, shape.image_size, shape.image_size, device="meta")
    latents = torch.zeros(1, shape.num_tokens, vq.config.z_channels, device="meta")
    ids = torch.zeros(1, shape.num_tokens, dtype=torch.int64, device="meta")
    distances = shape.num_tokens * vq.config.z_channels * vq.config.num_codes
    return Parts(
        multiply_adds(lambda: vq.encoder(image)) + distances, multiply_adds(lambda: vq.decode(latents, shape.grid)),
        multiply_adds(lambda: predictor(ids, ids == 0)), encoder_multiply_adds(addp.network),
        cache(lambda visible: decoder_multiply_adds(addp.network, visible)),
    )  # fmt: skip


def law() -> Iterator[tuple[float, int, int]]:
    """(probability, masked tokens at t, at t + 1) of the pairs that training draws."""
    config = MaskConfig()
    counts = [masked_count(ratio, 256) for ratio in mask_ratios(config)]
    for index, probability in enumerate(ratio_probabilities(config).tolist()):
        for offset in range(1, config.offset + 1):
            yield probability / config.offset, counts[index], counts[min(index + offset, len(counts) - 1)]


def official_step(size: str) -> float:
    """Of one image, as published: two passes of the predictor, every row, a backward pass of twice its forward."""
    part = parts(size)
    decoder = sum(p * answer(size, 256 - n) for p, n, _ in law())
    return part.encode + 2 * part.predictor + part.decode + 3 * (part.encoder + decoder)


def answer(size: str, visible: int) -> float:
    """Of ADDP's decoder, every row of it."""
    return quadratic(parts(size).decoder, visible, (1, 64, 128))


def quadratic(count: Callable[[int], int], at: int, known: tuple[int, int, int]) -> float:
    """A transformer's cost is a polynomial of degree 2 in its rows: through three counts (Lagrange)."""
    terms = ((x, [y for y in known if y != x]) for x in known)
    return sum(count(x) * math.prod((at - y) / (x - y) for y in others) for x, others in terms)


@cache
def trained(size: str, masked: int) -> int:
    """Forward and backward of what :class:`ADDP` trains, where ``masked`` tokens of 256 are; 256: without pixels."""
    network = made(size).network
    ids, visible, hidden = _split(masked)
    pixels = torch.zeros(1, 3, 256, 256, device="meta") if masked < 256 else None
    return multiply_adds(lambda: network.answer(pixels, ids, ids == 0, visible, hidden).sum().backward())


@cache
def asked(size: str, masked: int) -> int:
    """One pass of the predictor, read where ``masked`` tokens are."""
    ids, visible, hidden = _split(masked)
    predictor = made(size).predictor.module
    return multiply_adds(lambda: predicted_at(predictor, ids, ids == 0, visible.index, hidden.index))


def _split(masked: int) -> tuple[Tensor, Places, Places]:
    order = torch.arange(256, device="meta").expand(1, -1)
    return torch.zeros_like(order), Places(order[:, masked:], None), Places(order[:, :masked], None)


KNOWN = (131, 195, 255)  # masked tokens


def savings(size: str) -> dict[str, float]:
    """Of one image, on the average of the law, one redundancy of the published step after the other left out."""
    part = parts(size)
    fixed, rows, once, blank = part.encode, 0.0, 0.0, 0.0
    for p, n, noisier in law():
        own, question = (quadratic(lambda m, f=f: f(size, m), n, KNOWN) for f in (trained, asked))
        rows += p * (fixed + 2 * question + part.decode + own)
        passes = 1 if n == noisier else 2
        once += p * (fixed + passes * question + part.decode + own)
        blank += p * (fixed + passes * question + part.decode + own if n < 256 else fixed + trained(size, 256))
    return {
        "as published": official_step(size),
        "without rows that nobody reads": rows,
        "and one predictor pass where both masks are equal": once,
        "and neither pixels nor encoder where everything is masked": blank,
    }


def walk(size: str, steps: int, schedule: str, skips: bool) -> float:
    """One generated image. skips: as `methods.addp.alternate` goes; else every step, and an image encoded first."""
    part = parts(size)
    counts = masked_after(AlternationConfig(steps=steps, schedule=schedule), 256)
    before = [256, *counts[:-1]]
    if not skips:
        return part.encode + sum(part.encoder + answer(size, 256 - n) + part.decode for n in before)
    before = before[first_step(counts, 256) :]
    looks = sum(part.encoder + answer(size, 256 - n) for n in before if n < 256)
    return part.decoder(0) + looks + len(before) * part.decode
