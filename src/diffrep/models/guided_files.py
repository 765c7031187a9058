"""Files of guided-diffusion: names and tensors in, the config of a :class:`GuidedUNet` out.

Names and shapes tell nearly everything. What they do not tell (:class:`GuidedUnseen`) is known of the published files
(:data:`PRESETS`) and has to be said of any other: a wrong order of q, k and v loads without complaint and moves the
features by more than half of their norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffrep.config import Config, validate
from diffrep.errors import UserError
from diffrep.models.convert import whole
from diffrep.models.guided_unet import AttentionOrder, GuidedUNet, GuidedUNetConfig

NAMED = 5  # tensors, in a refusal
FIRST = ("time_embed.0.weight", "input_blocks.0.0.weight")  # every network of this family has them
UPSAMPLER_CHANNELS = 6  # a noisy image beside the small one


class GuidedUnseen(Config):
    """What a file cannot tell."""

    image_size: int = Field(ge=1)  # pixels per side
    attention_order: AttentionOrder
    num_heads: int | None = Field(None, ge=1)  # of every attention,
    num_head_channels: int | None = Field(None, ge=1)  # or channels of each
    noise_schedule: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="after")
    def _one_of_two(self) -> GuidedUnseen:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ValueError("give either num_heads or num_head_channels")
        return self


# Published files


@dataclass(frozen=True)
class GuidedPreset:
    """A published file. config: of the network in it, without memory to be built, counted or left untrained."""

    file: str
    config: GuidedUNetConfig
    noise_schedule: Literal["linear", "cosine"] = "linear"

    @property
    def unseen(self) -> GuidedUnseen:
        config = self.config
        return GuidedUnseen(
            image_size=config.image_size,
            attention_order=config.attention_order,
            num_heads=None if config.num_head_channels else config.num_heads,
            num_head_channels=config.num_head_channels,
            noise_schedule=self.noise_schedule,
        )


def _adm(image_size: int, channel_mult: tuple[float, ...], **changed: Any) -> GuidedUNetConfig:
    """All published networks attend at 32, 16 and 8 pixels. Source: the flags in guided-diffusion's README."""
    fields: dict[str, Any] = {
        "image_size": image_size, "channel_mult": channel_mult, "out_channels": 6, "model_channels": 256,
        "num_res_blocks": 2, "attention_factors": tuple(image_size // pixels for pixels in (32, 16, 8)),
        "num_head_channels": 64, "scale_shift_norm": True, "resblock_updown": True, "attention_order": "legacy",
    }  # fmt: skip
    return GuidedUNetConfig(**fields | changed)


_CLASSES = {"num_classes": 1000}  # of ImageNet
_MULT_256 = (1, 1, 2, 2, 4, 4)

PRESETS = {
    "adm-64": GuidedPreset(
        "64x64_diffusion.pt",
        _adm(64, (1, 2, 3, 4), model_channels=192, num_res_blocks=3, attention_order="new", **_CLASSES),
        "cosine",
    ),
    "adm-128": GuidedPreset(
        "128x128_diffusion.pt", _adm(128, (1, 1, 2, 3, 4), num_heads=4, num_head_channels=None, **_CLASSES)
    ),
    "adm-256": GuidedPreset("256x256_diffusion.pt", _adm(256, _MULT_256, **_CLASSES)),
    "adm-256-uncond": GuidedPreset("256x256_diffusion_uncond.pt", _adm(256, _MULT_256)),
    "adm-512": GuidedPreset("512x512_diffusion.pt", _adm(512, (0.5, 1, 1, 2, 2, 4, 4), **_CLASSES)),
    "adm-lsun-bedroom": GuidedPreset("lsun_bedroom.pt", _adm(256, _MULT_256)),
    "adm-lsun-cat": GuidedPreset("lsun_cat.pt", _adm(256, _MULT_256)),
    "adm-lsun-horse": GuidedPreset("lsun_horse.pt", _adm(256, _MULT_256)),
    "adm-lsun-horse-nodropout": GuidedPreset("lsun_horse_nodropout.pt", _adm(256, _MULT_256)),
}


# From a file


def looks_like_guided(state: Mapping[str, Tensor]) -> bool:
    """Whether these are names of guided-diffusion, of a relative that is refused too; not of a network told by text."""
    return all(name in state for name in FIRST) and not any(".transformer_blocks." in name for name in state)


def guided_config(state: Mapping[str, Tensor], unseen: GuidedUnseen, origin: str) -> GuidedUNetConfig:
    """The network behind a state dict, whose tensors were all compared with it.

    Args:
        state: official names, nothing wrapped around them (`convert.unwrap`).
        origin: what a message calls the file.

    Raises:
        UserError: a classifier or an upsampler; tensors that are missing, left over or of another shape; image size
            or heads that do not fit.
    """
    _refuse_relatives(state, origin)
    try:
        seen = _seen(state)
    except KeyError as error:
        raise UserError(f"{origin} lacks {error.args[0]}, which a guided-diffusion U-Net has") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UserError(f"{origin} has tensors of shapes that no guided-diffusion U-Net has") from None
    said = unseen.model_dump(exclude_none=True, exclude={"noise_schedule"})
    config = validate(GuidedUNetConfig, seen | said, origin)
    whole(state, on_paper(config), origin)
    return config


def _refuse_relatives(state: Mapping[str, Tensor], origin: str) -> None:
    valid = f"valid: a diffusion file such as {PRESETS['adm-64'].file}"
    if any(n.startswith("out.") for n in state) and not any(n.startswith("output_blocks.") for n in state):
        why = "it names classes and predicts no noise (no output_blocks.*)"
        raise UserError(f"{origin} is a classifier of guided-diffusion: {why}; {valid}")
    if FIRST[1] in state and state[FIRST[1]].shape[1:2] == (UPSAMPLER_CHANNELS,):
        why = (
            f"it reads a small image beside the noisy one ({UPSAMPLER_CHANNELS} channels), and there is none to give it"
        )
        raise UserError(f"{origin} is a super-resolution network of guided-diffusion: {why}; {valid}")


def _seen(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of a :class:`GuidedUNetConfig` by names and shapes, which may be those of anything."""
    channels, (per_level, levels) = state["time_embed.0.weight"].shape[1], _levels(state)
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    told, told_width = (state[f"middle_block.0.{name}.weight"].shape[0] for name in ("emb_layers.1", "out_layers.3"))
    has_blocks, has_convs = (bool(_ups(state, part)) for part in ("in_layers", "conv"))
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "model_channels": channels,
        "num_res_blocks": per_level - 1,
        "channel_mult": tuple(width / channels for width in widths),
        "attention_factors": tuple(2**k for k, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
        "num_classes": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        "scale_shift_norm": told == 2 * told_width,
        "resblock_updown": has_blocks,
        "conv_resample": has_convs or has_blocks or levels == 1,
    }


def _levels(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(blocks per level, levels), by the way up: the last block of a level, and no other, ends in a larger map.

    Where growing needs no tensors, shrinking needs none either: the first block without any ends the first level. A
    block that is lost or too many is left for :func:`whole` to name.
    """
    blocks, ups = _numbers(state, r"output_blocks\.(\d+)\."), _ups(state, "(?:in_layers|conv)")
    inputs = _numbers(state, r"input_blocks\.(\d+)\.")
    gap = next(k for k in count() if k not in inputs)
    per_level = math.gcd(*(k + 1 for k in ups)) if ups else gap if gap < len(inputs) else len(blocks)
    return per_level, round(len(blocks) / per_level)


def _ups(state: Mapping[str, Tensor], part: str) -> set[int]:
    """Blocks of the way up behind whose residual block, and attention, stands a layer with this part."""
    return _numbers(state, rf"output_blocks\.(\d+)\.[12]\.{part}\.")


def _numbers(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(match[1]) for name in state if (match := re.match(pattern, name))}


def build(config: GuidedUNetConfig, state: Mapping[str, Tensor]) -> GuidedUNet:
    """The network with these weights, which fit, in float32; those that already are stay where they lie in memory."""
    with torch.device("meta"):
        network = GuidedUNet(config)
    network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return network


def on_paper(config: GuidedUNetConfig) -> dict[str, Tensor]:
    """Names and shapes of the network, without its memory."""
    with torch.device("meta"):
        return GuidedUNet(config).state_dict()
