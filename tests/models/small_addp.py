"""A tiny ADDP of 16 tokens and 11 codes, and what its tests show it."""

import torch

from diffrep.data.batch import Batch
from diffrep.diffusion.masking import lowest
from diffrep.methods.addp import ADDP, ADDPConfig
from diffrep.randomness import seeded

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_depth": 2, "decoder_num_heads": 4, "init_std": 0.5}
LENGTH, CODES = 16, 11


def made(tokens, dropout=0.0, **options) -> ADDP:
    """Always the same untrained method on the networks in a folder; dropout is off unless asked for."""
    given = {"tokenizer": tokens, "token_predictor": tokens, "network": {**SMALL, "dropout": dropout}}
    with seeded(7, "addp"):
        return ADDP(ADDPConfig.model_validate(given | options), 2, 8).train()


def images(count, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batch(count):
    return Batch(images(count), torch.zeros(count, dtype=torch.int64), torch.arange(count))


def nested(counts, more, seed=0):
    """Masks of so many tokens, image by image, inside masks of more."""
    order = torch.rand(len(counts), LENGTH, generator=torch.Generator().manual_seed(seed))
    return tuple(lowest(order, torch.tensor(n)[:, None]) for n in (counts, more))
