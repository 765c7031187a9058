"""What generation takes, before anything is written: calls and multiply-adds of each part, time, memory.

Letters: L tokens, D width, n visible tokens, c latent channels, K codes.
"""

from __future__ import annotations

import copy
import resource
import time
from typing import Any

import torch

from diffrep.counting import multiply_adds, on_meta
from diffrep.frozen.tokens import FrozenADDP
from diffrep.launch import film
from diffrep.launch.generate import Generation
from diffrep.methods.addp import first_step
from diffrep.models.addp_vit import ADDPVit

TIMED = 1e12  # multiply-adds that a CPU is asked for when a block is timed: half a minute of one core

Parts = dict[str, tuple[int, int]]  # part -> (calls, multiply-adds) for one image


def estimate(generation: Generation, device: str) -> dict[str, Any]:
    """Counted for all images, timed on one block; on a CPU a walk that would take minutes is timed on two steps."""
    images, each = len(generation.seeds), counted(generation)
    total = sum(added for _, added in each.values())
    seconds, pixels = _timed(generation, device, total)
    return {
        "images": images,
        "steps": len(generation.counts),
        "parts": {part: {"calls": calls * images, "multiply_adds": n * images} for part, (calls, n) in each.items()},
        "multiply_adds": total * images,
        "block_size": generation.size,
        "seconds": seconds * images,
        "memory_bytes": _peak(),
        "disk_bytes": len(film.png(pixels)) * images,
        "licences": {"network": generation.network.licence, "tokenizer": generation.tokenizer.licence},
    }


def counted(generation: Generation) -> Parts:
    """Of one image alone: what a block has in common, and what an image to repair is encoded with, counts in full."""
    parts = _alternation(generation) if generation.config.by == "addp" else _mage(generation)
    if generation.repair:
        image = torch.zeros(1, 3, *generation.image_size)
        parts["tokenizer, encode"] = 1, multiply_adds(on_meta(generation.tokenizer.module.encoder, image))
    return {part: found for part, found in parts.items() if found[0]}


def _alternation(generation: Generation) -> Parts:
    """Of :func:`diffrep.methods.addp.alternate`, step by step."""
    assert isinstance(generation.network, FrozenADDP)
    network, tokens = generation.network.module, generation.num_tokens
    walked = range(first_step(generation.counts, tokens), len(generation.counts))
    before = [generation.masked, *generation.counts]
    visible = [tokens - before[step] for step in walked if before[step] < tokens]  # where the network is asked
    decoded = len(walked) + (generation.masked < tokens)  # with the first pixels of a repair
    each = {n: decoder_multiply_adds(network, n) for n in {0, *visible}}
    asked = [0, *visible]  # the table of all masked comes first
    return {
        "encoder": (len(visible), len(visible) * encoder_multiply_adds(network)),
        "decoder": (len(asked), sum(each[n] for n in asked)),
        "tokenizer, decode": (decoded, decoded * decode_multiply_adds(generation)),
    }


def _mage(generation: Generation) -> Parts:
    ids = torch.zeros(1, generation.num_tokens, dtype=torch.int64)
    network, steps = generation.network.module, len(generation.counts)
    once = multiply_adds(on_meta(network, ids, ids == 0, generation.tokenizer.num_codes))
    return {"predictor": (steps, steps * once), "tokenizer, decode": (1, _decoder(generation))}


def encoder_multiply_adds(network: ADDPVit) -> int:
    """Of a look at one image."""
    config = network.config
    image = torch.zeros(1, 3, config.image_size, config.image_size)
    slots = torch.zeros(1, 1 + config.num_tokens, config.embed_dim)
    return sum(multiply_adds(on_meta(*part)) for part in ((network.patch_embed, image), (network.blocks, slots)))


def decoder_multiply_adds(network: ADDPVit, visible: int) -> int:
    """Of one answer with ``visible`` reliable tokens; without any, the encoder's features are not embedded."""
    tokens, width = 1 + network.config.num_tokens, network.config.embed_dim
    slots, table = torch.zeros(1, tokens + visible, width), network.token_emb.weight
    parts = [on_meta(network.decoder_blocks, slots), on_meta(network.mlm_layer, slots, table)]
    parts += [on_meta(network.decoder_embed, torch.zeros(1, tokens, width))] if visible else []
    return sum(map(multiply_adds, parts))


def decode_multiply_adds(generation: Generation) -> int:
    """Soft codes (L K c), then pixels."""
    codes = generation.tokenizer.num_codes
    return generation.num_tokens * codes * generation.tokenizer.module.config.z_channels + _decoder(generation)


def _decoder(generation: Generation) -> int:
    module = generation.tokenizer.module
    assert module.decoder is not None
    return multiply_adds(on_meta(module.decoder, torch.zeros(1, module.config.z_channels, *generation.grid)))


def _timed(generation: Generation, device: str, total: int) -> tuple[float, torch.Tensor]:
    """Seconds of one image, and the last one made."""
    seeds = [generation.seeds[0]] * generation.size
    if total <= TIMED or torch.device(device).type == "cuda":
        generation.draw(seeds, device)  # warms up
        began = time.monotonic()
        image = generation.draw(seeds, device)[0]
        return (time.monotonic() - began) / len(seeds), image
    short = _shortened(generation)
    began = time.monotonic()
    image = short.draw(seeds[:1], device)[0]
    return (time.monotonic() - began) * total / sum(added for _, added in counted(short).values()), image


def _shortened(generation: Generation) -> Generation:
    """The same networks with a walk of two steps."""
    alternation = generation.config.alternation.model_copy(update={"steps": min(2, generation.masked)})
    short = copy.copy(generation)
    short.set_walk(alternation)
    return short


def _peak() -> int:
    """Bytes, so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
