"""guided-diffusion's U-Net as diffusers' ``UNet2DModel`` and back: config and tensors in, config and tensors out.

The architectures are the same but for names and for q, k and v, which diffusers keeps in tensors of their own: there
the order of their channels is no question any more. A class-conditional network asked through diffusers always needs
a label; ours may be asked without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffrep.config import Config, validate
from diffrep.errors import UserError
from diffrep.models.convert import whole
from diffrep.models.guided_files import on_paper
from diffrep.models.guided_unet import GROUPS, AttentionOrder, GuidedUNetConfig

Resampling = Literal["conv", "resnet"]


class UNetWords(Config):
    """What of a ``UNet2DModel``'s config tells networks of guided-diffusion apart; the defaults are diffusers'."""

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = Field(min_length=1)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    downsample_type: Resampling = "conv"  # of attended levels; the name of another says it
    upsample_type: Resampling = "conv"
    attention_head_dim: int | None = 8  # channels; None: one head
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    num_class_embeds: int | None = None


# What is the same in all of them; but for the last, also diffusers' defaults.
FIXED: dict[str, Any] = {
    "act_fn": "silu", "add_attention": True, "center_input_sample": False, "class_embed_type": None,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D", "norm_eps": 1e-5, "norm_num_groups": GROUPS, "time_embedding_dim": None,
    "time_embedding_type": "positional", "attn_norm_num_groups": GROUPS,
}  # fmt: skip

ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}  # beside qkv
QKV = ("to_q", "to_k", "to_v")

# How diffusers calls a level of the way down, by whether it is attended and how the size changes.
LEVELS: dict[tuple[bool, Resampling], str] = {
    (False, "conv"): "DownBlock2D",
    (False, "resnet"): "ResnetDownsampleBlock2D",
    (True, "conv"): "AttnDownBlock2D",
    (True, "resnet"): "AttnDownBlock2D",
}


# There


def to_diffusers(
    config: GuidedUNetConfig, state: Mapping[str, Tensor], origin: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keywords of a ``UNet2DModel`` and its state dict.

    Raises:
        UserError: tensors that do not fit the config, or a network that diffusers cannot express.
    """
    words = _words(config, origin).model_dump() | FIXED
    return words, _renamed(config, whole(state, on_paper(config), origin))


def _words(config: GuidedUNetConfig, origin: str) -> UNetWords:
    levels = range(len(config.widths))
    resampling: Resampling = "resnet" if config.resblock_updown else "conv"
    if config.widths[0] != config.model_channels:
        why = f"its first level is {config.widths[0]} wide and its timesteps are embedded in {config.model_channels}"
        raise UserError(f"{origin}: {why}; in diffusers both widths are one")
    if not (config.resblock_updown or config.conv_resample or len(levels) == 1):
        raise UserError(f"{origin}: its levels change size without weights; in diffusers they need a convolution")
    down = [LEVELS[2**level in config.attention_factors, resampling] for level in levels]
    return UNetWords(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(_upwards(name) for name in reversed(down)),
        downsample_type=resampling,
        upsample_type=resampling,
        attention_head_dim=_head_channels(config, origin),
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        num_class_embeds=config.num_classes,
    )


def _upwards(name: str) -> str:
    return name.replace("Downsample", "Upsample").replace("Down", "Up")


def _head_channels(config: GuidedUNetConfig, origin: str) -> int | None:
    """The width that all heads share; None: one head everywhere, as wide as its attention."""
    found = sorted({width // heads for width, heads in config.attentions})
    if len(found) == 1:
        return found[0]
    if all(heads == 1 for _, heads in config.attentions):
        return None
    told = " and ".join(map(str, found))
    raise UserError(f"{origin}: its attentions have heads {told} channels wide; in diffusers all are of one width")


def _renamed(config: GuidedUNetConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    table = dict(_modules(config))
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        ours, _, kind = name.rpartition(".")
        if ours.endswith(".qkv"):
            parts = zip(QKV, _split(value, *_layout(config, ours, len(value) // 3)), strict=True)
            found |= {f"{table[ours]}.{part}.{kind}": rows for part, rows in parts}
        else:
            found[f"{table[ours]}.{kind}"] = value.squeeze(-1) if ours.endswith(".proj_out") else value
    return found


def _modules(config: GuidedUNetConfig) -> Iterator[tuple[str, str]]:
    """(our name, diffusers' name) of every module that may hold tensors; a qkv stands for three of theirs."""
    yield from ENDS.items()
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")
    for level in range(len(config.widths)):
        yield from _down(level, config.num_res_blocks)
        yield from _up(level, config.num_res_blocks)


def _down(level: int, count: int) -> Iterator[tuple[str, str]]:
    """One level of the way down, behind the first convolution and ``level`` levels of one block more than residual."""
    first, theirs = 1 + level * (count + 1), f"down_blocks.{level}"
    for number in range(count):
        yield from _residual(f"input_blocks.{first + number}.0", f"{theirs}.resnets.{number}")
        yield from _attention(f"input_blocks.{first + number}.1", f"{theirs}.attentions.{number}")
    yield from _residual(f"input_blocks.{first + count}.0", f"{theirs}.downsamplers.0")
    yield f"input_blocks.{first + count}.0.op", f"{theirs}.downsamplers.0.conv"


def _up(level: int, count: int) -> Iterator[tuple[str, str]]:
    """One level of the way up; the map grows in its last block, behind the residual block or behind its attention."""
    first, theirs = level * (count + 1), f"up_blocks.{level}"
    for number in range(count + 1):
        yield from _residual(f"output_blocks.{first + number}.0", f"{theirs}.resnets.{number}")
        yield from _attention(f"output_blocks.{first + number}.1", f"{theirs}.attentions.{number}")
    for place in (1, 2):
        yield from _residual(f"output_blocks.{first + count}.{place}", f"{theirs}.upsamplers.0")
        yield f"output_blocks.{first + count}.{place}.conv", f"{theirs}.upsamplers.0.conv"


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{part}", f"{theirs}.{name}") for part, name in RESIDUAL.items())


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{part}", f"{theirs}.{name}") for part, name in ATTENTION.items())
    yield f"{ours}.qkv", theirs


# q, k and v


def _layout(config: GuidedUNetConfig, name: str, width: int) -> tuple[AttentionOrder, int]:
    return config.attention_order, config.heads(width, upwards=name.startswith("output_blocks."))


def _split(value: Tensor, order: AttentionOrder, heads: int) -> list[Tensor]:
    """Official qkv (3C, C, 1) or (3C,) -> q, k, v of (C, C) or (C,)."""
    rows = value.squeeze(-1) if value.dim() == 3 else value
    if order == "new":
        return list(rows.chunk(3))
    return [part.flatten(0, 1) for part in rows.unflatten(0, (heads, 3, -1)).unbind(1)]


def _joined(parts: list[Tensor], order: AttentionOrder, heads: int) -> Tensor:
    """The way back of :func:`_split`."""
    if order == "legacy":
        parts = [torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)]
    rows = torch.cat(parts)
    return rows[..., None] if rows.dim() == 2 else rows


# And back


def from_diffusers(
    unet_config: Mapping[str, Any], state: Mapping[str, Tensor], origin: str, attention_order: AttentionOrder = "new"
) -> tuple[GuidedUNetConfig, dict[str, Tensor]]:
    """The network behind a ``UNet2DModel``'s config and state dict.

    Args:
        attention_order: in which q, k and v are written down; outputs do not depend on it.

    Raises:
        UserError: a U-Net that is none of guided-diffusion, or tensors that do not fit its config.
    """
    config = validate(GuidedUNetConfig, _fields(unet_config, origin) | {"attention_order": attention_order}, origin)
    theirs = whole(state, _renamed(config, on_paper(config)), origin)
    table, found = dict(_modules(config)), {}
    for name, wanted in on_paper(config).items():
        ours, _, kind = name.rpartition(".")
        if ours.endswith(".qkv"):
            parts = [theirs[f"{table[ours]}.{part}.{kind}"] for part in QKV]
            found[name] = _joined(parts, *_layout(config, ours, len(wanted) // 3))
        else:
            found[name] = theirs[f"{table[ours]}.{kind}"].view(wanted.shape)
    return config, found


def _fields(unet_config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Fields of a :class:`GuidedUNetConfig`."""
    known = {name: value for name, value in unet_config.items() if name in UNetWords.model_fields}
    words = validate(UNetWords, known, origin)
    _same_family(unet_config, words, origin)
    attended, resampling = _levels(words, origin)
    return {
        "image_size": words.sample_size,
        "in_channels": words.in_channels,
        "out_channels": words.out_channels,
        "model_channels": words.block_out_channels[0],
        "num_res_blocks": words.layers_per_block,
        "channel_mult": tuple(width / max(words.block_out_channels[0], 1) for width in words.block_out_channels),
        "attention_factors": tuple(2**level for level in attended),
        "num_classes": words.num_class_embeds,
        "num_head_channels": words.attention_head_dim,
        "scale_shift_norm": words.resnet_time_scale_shift == "scale_shift",
        "resblock_updown": resampling == "resnet",
    }


def _same_family(unet_config: Mapping[str, Any], words: UNetWords, origin: str) -> None:
    found = {name: unet_config.get(name, usual) for name, usual in FIXED.items()}
    middle = unet_config.get("attn_norm_num_groups")  # where nobody says: as all norms, or no norm beside scaled ones
    found["attn_norm_num_groups"] = GROUPS if middle is None and words.resnet_time_scale_shift == "default" else middle
    if other := [name for name in FIXED if found[name] != FIXED[name]]:
        told = f"{other[0]} {found[other[0]]} instead of {FIXED[other[0]]}"
        raise UserError(f"{origin} is no U-Net of guided-diffusion: it has {told}")


def _levels(words: UNetWords, origin: str) -> tuple[list[int], Resampling]:
    """The attended levels, and how all levels change size."""
    down = list(words.down_block_types)
    if strange := [name for name in down if name not in LEVELS.values()]:
        raise UserError(f"{origin} is no U-Net of guided-diffusion: it has a level {strange[0]}")
    attended = [level for level, name in enumerate(down) if name == LEVELS[True, "conv"]]
    types: tuple[Resampling, ...] = ("conv", "resnet")
    for resampling in types:
        wanted = [LEVELS[level in attended, resampling] for level in range(len(words.block_out_channels))]
        upwards = [_upwards(name) for name in reversed(wanted)]
        says = not attended or {words.downsample_type, words.upsample_type} == {resampling}
        if (down, list(words.up_block_types)) == (wanted, upwards) and says:
            return attended, resampling
    told = "its way up is not its way down reversed, or only some of its levels change size by residual blocks"
    raise UserError(f"{origin} is no U-Net of guided-diffusion: {told}")
