"""ADDP's generation at its base size and 256 pixels, random weights, against a plain write-up of the same computation.

The rival computes in the official order with hand-written attention, contiguous float32, nothing left out: it encodes
an image that nothing depends on, looks at it in every step, and decodes in every step. Timed are one step in the
middle of a walk of 20 and whole walks; memory is the peak of a process that does nothing else.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published_teachers import peak_so_far
from benchmarks.timing import cpu_seconds, line, rivals
from diffrep.counting import multiply_adds, on_meta
from diffrep.diffusion.masking import (
    AlternationConfig,
    ImageDraws,
    choice_temperature,
    confidence,
    lowest,
    masked_after,
)
from diffrep.frozen.tokens import Tokenizer
from diffrep.launch.generation_cost import decoder_multiply_adds, encoder_multiply_adds
from diffrep.methods.addp import alternate, first_step, predicted
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.randomness import seeded

MASKED = 182  # of 256 tokens: what a step in the middle of a walk of 20 meets


PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16 networks, ids drawn in float32"}
RIVAL = "plain eager float32"
CONFIG = AlternationConfig()


def measure() -> list[dict[str, Any]]:
    """One step, then a walk of 20, in both precisions; memory; what is left out, counted."""
    return [*_steps(), *_walks(), *_memory(), *_counts()]


def _networks() -> tuple[ADDPVit, Tokenizer]:
    with seeded(0, "bench"):
        return ADDPVit(ADDPVitConfig()).eval(), Tokenizer(VQGAN(VQGANConfig()), "random")


@torch.no_grad()
def _steps() -> list[dict[str, Any]]:
    network, tokenizer = _networks()
    pixels, ids = torch.rand(1, 3, 256, 256), torch.randint(0, 1024, (1, 256))
    mask, latents = torch.arange(256)[None] < MASKED, tokenizer.lookup(ids)

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predicted(network, pixels, ids, mask)
            tokenizer.decode(latents, (16, 16))

    def plain() -> None:
        _plain_step(network, pixels, ids, mask)
        tokenizer.decode(latents, (16, 16))

    found = []
    for dtype, words in PRECISIONS.items():
        mine, theirs = rivals(lambda dtype=dtype: step(dtype), plain, repeats=3)
        name = f"a step of ADDP-base at 256 pixels, {words}"
        found.append(line(name, RIVAL, mine, theirs, unit="CPU s per step"))
    return found


def _walks() -> list[dict[str, Any]]:
    parts = _networks()
    runs = [lambda: _plain_walk(*parts), *(lambda dtype=dtype: _walk(*parts, dtype) for dtype in PRECISIONS)]
    theirs, *ours = (min(times) for times in zip(*[map(cpu_seconds, runs) for _ in range(2)], strict=True))
    name = f"an image of ADDP-base at 256 pixels in {CONFIG.steps} steps"
    words = PRECISIONS.values()
    return [line(f"{name}, {w}", RIVAL, mine, theirs, unit="CPU s") for w, mine in zip(words, ours, strict=True)]


def _memory() -> list[dict[str, Any]]:
    """Each in a process of its own; a walk of two steps holds as much as one of twenty."""
    theirs = _alone("plain")
    named = {words: _alone(words) for words in PRECISIONS.values()}
    return [line(f"peak memory of generation, {w}", RIVAL, m, theirs, unit="GB") for w, m in named.items()]


def _counts() -> list[dict[str, Any]]:
    """Multiply-adds of a walk by torch's counter: all of the official order, and what is computed here."""
    (network, tokenizer), counts = _networks(), masked_after(CONFIG, 256)
    first, before = first_step(counts, 256), [256, *counts[:-1]]
    decode = multiply_adds(on_meta(tokenizer.module.decoder, torch.zeros(1, 256, 16, 16)))
    encode = multiply_adds(on_meta(tokenizer.module.encoder, torch.zeros(1, 3, 256, 256)))
    answers = [decoder_multiply_adds(network, 256 - masked) for masked in before]
    looks, blank = encoder_multiply_adds(network), sum(masked == 256 for masked in before)
    official = encode + CONFIG.steps * (looks + decode) + sum(answers)
    ours = (CONFIG.steps - blank) * looks + (CONFIG.steps - first) * decode + answers[0] + sum(answers[blank:])
    name = f"multiply-adds of an image in {CONFIG.steps} steps"
    return [line(name, "official order", ours / 1e9, official / 1e9, unit="G")]


@torch.no_grad()
def _walk(network: ADDPVit, tokenizer: Tokenizer, dtype: torch.dtype, config: AlternationConfig = CONFIG) -> Tensor:
    ids, mask = torch.zeros(1, 256, dtype=torch.int64), torch.ones(1, 256, dtype=torch.bool)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return alternate(network, tokenizer, config, ImageDraws([0], 256), ids, mask)


@torch.no_grad()
def _plain_walk(network: ADDPVit, tokenizer: Tokenizer, config: AlternationConfig = CONFIG) -> Tensor:
    """The official order of work: encode, then look, answer, draw, choose and decode in every step."""
    draws, pixels = ImageDraws([0], 256), torch.zeros(1, 3, 256, 256)
    ids, mask = tokenizer.encode(pixels), torch.ones(1, 256, dtype=torch.bool)
    for step, count in enumerate(masked_after(config, 256)):
        probabilities = _plain_step(network, pixels, ids, mask)
        ids = torch.where(mask, draws.ids(step, probabilities), ids)
        noise = choice_temperature(config, step) * draws.gumbel(step)
        mask = lowest(confidence(probabilities, ids, mask, noise), count)
        latents = torch.where(mask[..., None], tokenizer.soft(probabilities), tokenizer.lookup(ids))
        pixels = tokenizer.decode(latents, (16, 16))
    return pixels


def _alone(what: str) -> float:
    """Peak resident GB of a process that makes an image in two steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (what,))


def _peak(what: str) -> float:
    torch.set_num_threads(1)
    parts, short = _networks(), CONFIG.model_copy(update={"steps": 2})
    if what == "plain":
        _plain_walk(*parts, short)
    else:
        _walk(*parts, next(d for d, words in PRECISIONS.items() if words == what), short)
    return peak_so_far() / 1e9


def _plain_step(network: ADDPVit, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Encoder and decoder written out, attention by its formula, all 2,025 columns of the head."""
    x = network.embed(pixels)
    for block in network.blocks:
        x = _block(block, x)
    y = network.decoder_embed(network.norm(x))
    hidden, dropped = F.pad(mask, (1, 0))[..., None], F.pad(mask, (1, 0), value=True)[..., None]
    places = torch.where(hidden, network.decoder_pos_mask_embed, network.decoder_pos_embed_learned)
    where = (~mask).nonzero()[:, 1].view(len(mask), -1)
    visible = network.token_emb(ids.gather(1, where)) + network.decoder_pos_token_embed[0, 1 + where]
    y = torch.cat([torch.where(dropped, network.mask_token, y) + places, visible], 1)
    for block in network.decoder_blocks:
        y = _block(block, y)
    head = network.mlm_layer
    h = head.ln(F.gelu(head.fc(network.decoder_norm(y))))
    return (h @ network.token_emb.weight.T + head.bias)[:, 1:257, :1024].softmax(2)


def _block(block: Any, x: Tensor) -> Tensor:
    heads, width = block.attn.num_heads, x.shape[2]
    q, k, v = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(3)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))
