"""Weights that recipes name: where they are, and under which licence. Nothing is fetched here."""

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


@dataclass(frozen=True)
class Asset:
    """One published file or folder.

    unet: the architecture in diffusers' words, so that it can be built, counted and tested without its weights.
    """

    key: str
    location: str
    licence: str
    unet: dict[str, Any] = field(default_factory=dict)


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
    )
}


def find(reference: str) -> Asset | None:
    """The asset with this key or location."""
    return ASSETS.get(reference) or next((a for a in ASSETS.values() if a.location == reference), None)


def looks_like_hub_id(reference: str) -> bool:
    """OWNER/NAME, or a key of :data:`ASSETS`."""
    return reference in ASSETS or re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None
