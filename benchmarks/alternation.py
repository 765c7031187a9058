"""ADDP's generation at its base size and 256 pixels, random weights, against a plain write-up of the same computation.

The rival computes in the official order with hand-written attention, contiguous float32, nothing left out. Timed is
one step in the middle of a walk of 20, network and pixel decode; what a walk leaves out altogether is counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import line, rivals
from diffrep.diffusion.masking import AlternationConfig, masked_after
from diffrep.frozen.tokens import Tokenizer
from diffrep.methods.addp import first_step, predicted
from diffrep.models.addp_vit import ADDPVit, ADDPVitConfig
from diffrep.models.vqgan import VQGAN, VQGANConfig
from diffrep.randomness import seeded

MASKED = 182  # of 256 tokens: what a step in the middle of a walk of 20 meets


def measure() -> list[dict[str, Any]]:
    """One step in both precisions; then the steps of a whole walk that are computed, counted."""
    with seeded(0, "bench"):
        network, tokenizer = ADDPVit(ADDPVitConfig()).eval(), Tokenizer(VQGAN(VQGANConfig()), "random")
    pixels, ids = torch.rand(1, 3, 256, 256), torch.randint(0, 1024, (1, 256))
    mask = torch.arange(256)[None] < MASKED
    latents = tokenizer.lookup(ids)

    @torch.no_grad()
    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predicted(network, pixels, ids, mask)
            tokenizer.decode(latents, (16, 16))

    @torch.no_grad()
    def plain() -> None:
        _plain_step(network, pixels, ids, mask)
        tokenizer.decode(latents, (16, 16))

    unit, name, rival = "CPU s per step", "a step of ADDP-base at 256 pixels", "plain eager float32"
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = rivals(lambda dtype=dtype: step(dtype), plain, repeats=3)
        words = {torch.float32: "float32", torch.bfloat16: "bfloat16 networks, ids drawn in float32"}[dtype]
        found.append(line(f"{name}, {words}", rival, mine, theirs, unit=unit))
    config = AlternationConfig()
    computed = config.steps - first_step(masked_after(config, 256), 256)
    return [*found, line("pixel decodes of a walk of 20", "official order", computed, config.steps, unit="per image")]


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
