"""Weights that recipes name: where they are, which licence, what their authors report. Nothing is fetched here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# What the two published DDPM U-Nets share, in the words of diffusers' UNet2DModel.
_DDPM = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "attention_head_dim": None,
}


def _ddpm(sample_size: int, widths: tuple[int, ...], attention_level: int) -> dict[str, Any]:
    down = ["AttnDownBlock2D" if level == attention_level else "DownBlock2D" for level in range(len(widths))]
    up = [block.replace("Down", "Up") for block in reversed(down)]
    return _DDPM | {
        "sample_size": sample_size,
        "block_out_channels": widths,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
    }


# The authors contradict themselves; nobody states a licence for the tokenizer that MAGE passes on.
_ADDP = "contradictory: Apache-2.0 (README, model page), CC BY-NC 4.0 (LICENSE file); take it as non-commercial"
_MAGE = "MIT (that of the MAGE repository)"


@dataclass(frozen=True)
class Asset:
    """One published file or folder.

    unet: the architecture in diffusers' words, so that it can be built, counted and tested without its weights.
    size: smallest and largest number of bytes of a whole file; () where that is not known.
    scores: what its authors report of its images.
    """

    key: str
    location: str
    licence: str
    unet: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)


ASSETS = {
    asset.key: asset
    for asset in (
        Asset("ddpm-cifar10-32", "google/ddpm-cifar10-32", "Apache-2.0", unet=_ddpm(32, (128, 256, 256, 256), 1)),
        Asset(
            "ddpm-ema-celebahq-256",
            "google/ddpm-ema-celebahq-256",
            "Apache-2.0",
            unet=_ddpm(256, (128, 128, 256, 256, 512, 512), 4),
        ),
        # Base: its tensors have 1,392,226,652 bytes, an archive of them some hundred thousand more.
        Asset(
            "addp-vit-base-16",
            "Changyao/ADDP",
            _ADDP,
            size=(1_392_226_652, 1_393_226_652),
            scores={"FID": 8.9, "IS": 95.3},
        ),
        Asset(
            "addp-vit-large-16",
            "Changyao/ADDP",
            _ADDP,
            size=(3_500_693_749, 3_500_693_749),
            scores={"FID": 7.6, "IS": 105.1},
        ),
        Asset("mage-vitb-1600", "github.com/LTH14/mage", _MAGE, scores={"FID": 11.1, "IS": 81.2}),
        Asset("mage-vitl-1600", "github.com/LTH14/mage", _MAGE, scores={"FID": 9.1, "IS": 105.1}),
        Asset("vqgan_jax_strongaug", "github.com/LTH14/mage", "unknown (MAGE, which passes it on, is under MIT)"),
    )
}


def find(reference: str) -> Asset | None:
    """The asset with this key or location."""
    return ASSETS.get(reference) or next((a for a in ASSETS.values() if a.location == reference), None)


def looks_like_hub_id(reference: str) -> bool:
    """OWNER/NAME, or a key of :data:`ASSETS`."""
    return reference in ASSETS or re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None
