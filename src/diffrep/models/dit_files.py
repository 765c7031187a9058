"""Files of DiT's weights: official ones and those of diffusers, dict in and dict out.

A released file is a flat dict of tensors. A checkpoint of the official `train.py` holds ``model``, ``ema``, ``opt`` and
``args``; what its authors sample from is ``ema``. diffusers' ``DiTTransformer2DModel`` has the same weights under other
names, with the two embedders once in every block and the position table in no file.
Letters: N tokens, D width, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrep.config import validate
from diffrep.errors import UserError
from diffrep.models.convert import some, unwrap, whole
from diffrep.models.dit import EPS, DiT, DiTConfig, position_table

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by width D, of the official XL, L, B and S
MARKS = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.adaLN_modulation.1.weight")


@dataclass(frozen=True)
class Preset:
    """A released network."""

    file: str
    licence: str
    config: DiTConfig


PRESETS = {
    f"dit-xl-2-{pixels}": Preset(f"DiT-XL-2-{pixels}x{pixels}.pt", "CC BY-NC 4.0", DiTConfig(input_size=pixels // 8))
    for pixels in (256, 512)
}


# Official files


def dit_weights(checkpoint: Any, origin: str) -> dict[str, Tensor]:
    """The tensors by name; of a training checkpoint the averaged ones (``ema``).

    Raises:
        UserError: no mapping of names to tensors is in it.
    """
    averaged = checkpoint.get("ema") if isinstance(checkpoint, Mapping) else None
    return unwrap(averaged if isinstance(averaged, Mapping) else checkpoint, origin)


def looks_like_dit(state: Mapping[str, Any]) -> bool:
    """Whether these are the names of an official DiT."""
    return all(name in state for name in MARKS)


def dit_config(
    state: Mapping[str, Tensor],
    num_heads: int | None,
    sinusoid: str,
    origin: str,
    num_classes: int | None = None,
) -> DiTConfig:
    """The config behind an official state dict, read off its names and shapes.

    Args:
        num_heads: cannot be seen; None where the width is one of :data:`HEADS`.
        sinusoid: cannot be seen; "official", or "diffusers" for weights that diffusers trained.
        num_classes: None: the last row of the class table is the null class, as in every released file; as many as
            the table has rows: there is none.

    Raises:
        UserError: a tensor it is read off is missing or of an impossible shape; a width whose heads nobody said.
    """
    try:
        fields = _fields(state)
    except KeyError as error:
        raise UserError(f"{origin} is no DiT: it lacks {error.args[0]}") from None
    except (ValueError, TypeError, ZeroDivisionError):
        raise UserError(f"{origin}: its tensors have shapes that no DiT has") from None
    width, rows = fields["hidden_size"], fields.pop("rows")
    heads = num_heads or HEADS.get(width)
    if heads is None:
        known = ", ".join(map(str, sorted(HEADS)))
        unseen = f"{origin} has width {width}, and heads cannot be seen in a file"
        raise UserError(f"{unseen}: say num_heads (known widths: {known})")
    classes = rows - 1 if num_classes is None else num_classes
    if classes not in (rows, rows - 1):
        raise UserError(f"{origin} has {rows} rows of classes, so num_classes is {rows - 1} or {rows}, not {classes}")
    told = {"num_heads": heads, "sinusoid": sinusoid, "num_classes": classes, "has_null_class": classes < rows}
    return validate(DiTConfig, fields | told, origin)


def _fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All that can be seen, and the rows of the class table."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    _, tokens, _ = state["pos_embed"].shape
    out = len(state["final_layer.linear.weight"]) / patch**2
    if out not in (channels, 2 * channels):
        raise ValueError
    blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "input_size": round(tokens**0.5) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(blocks),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "learn_sigma": out != channels,
        "rows": len(state["y_embedder.embedding_table.weight"]),
    }


def on_paper(config: DiTConfig) -> dict[str, Tensor]:
    """Names and shapes of the network, without its memory."""
    with torch.device("meta"):
        return DiT(config).state_dict()


def build(config: DiTConfig, state: Mapping[str, Tensor], origin: str) -> DiT:
    """The network with these weights in float32; those that already are stay where they lie in memory.

    Raises:
        UserError: tensors that do not fit.
    """
    weights = {name: value.float() for name, value in whole(state, on_paper(config), origin).items()}
    with torch.device("meta"):
        network = DiT(config)
    network.load_state_dict(weights, assign=True)
    return network


# diffusers and back

_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_KINDS = ("weight", "bias")
_FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}  # of its config, in every DiT


def to_diffusers(config: DiTConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments and the state dict of a ``DiTTransformer2DModel``.

    diffusers computes another sinusoid than the official code, whatever the weights were trained with: outputs
    differ until ``downscale_freq_shift`` of each block's ``norm1.emb.time_proj`` is set to 0.

    Raises:
        UserError: tensors that do not fit the config; a network that diffusers cannot express.
    """
    state = whole(state, on_paper(config), "the state dict")
    if config.mlp_width != 4 * config.hidden_size or not config.has_null_class:
        raise UserError("diffusers' DiT has an MLP of four times the width and a null class; this one has not")
    if not _is_table(config, state["pos_embed"]):
        raise UserError("pos_embed is not the table of sines and cosines, and diffusers knows no other")
    found = {theirs: state[ours] for ours, theirs in _names(config).items()}
    for i in range(config.depth):
        for kind in _KINDS:
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            found |= {f"transformer_blocks.{i}.{name}.{kind}": part for name, part in zip(_QKV, parts, strict=True)}
        copies = {_embedder(i, theirs): state[ours] for ours, theirs in _EMBEDDERS.items()}
        found |= {name: value.clone() if i else value for name, value in copies.items()}  # no file takes one twice
    return _their_config(config), found


def from_diffusers(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    sinusoid: str = "official",
    origin: str = "the DiT of diffusers",
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Back from the config and the state dict of a ``DiTTransformer2DModel``.

    Args:
        sinusoid: "diffusers" for weights that diffusers trained, rather than converted from official ones.

    Raises:
        UserError: a config that no DiT has; missing tensors; blocks with embedders of their own, of which the
            official network has one for all.
    """
    ours = _our_config(config, sinusoid, origin)
    if ours.depth > len(state):
        raise UserError(f"{origin}: its config has {ours.depth} layers, and its weights are {len(state)} tensors")
    names = _names(ours) | {name: _embedder(0, theirs) for name, theirs in _EMBEDDERS.items()}
    try:
        found = {name: state[theirs] for name, theirs in names.items()}
        for i in range(ours.depth):
            for kind in _KINDS:
                parts = [state[f"transformer_blocks.{i}.{name}.{kind}"] for name in _QKV]
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        for i in range(1, ours.depth):
            _same_embedders(state, i, origin)
    except KeyError as error:
        raise UserError(f"{origin} lacks {error.args[0]}") from None
    if left := sorted(set(state) - _their_names(ours)):
        raise UserError(f"{origin} has {len(left)} unexplained tensors ({some(left, 5)})")
    table = position_table(ours.hidden_size, ours.grid[0])[None].to(found["x_embedder.proj.weight"])
    return ours, whole(found | {"pos_embed": table}, on_paper(ours), origin)


def _names(config: DiTConfig) -> dict[str, str]:
    """Official name -> diffusers' name, of all that stands once in both."""
    pairs = dict(_ENDS)
    for i in range(config.depth):
        pairs |= {f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}" for ours, theirs in _IN_BLOCK.items()}
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in _KINDS}


def _their_names(config: DiTConfig) -> set[str]:
    blocks = range(config.depth)
    split = {f"transformer_blocks.{i}.{name}.{kind}" for i in blocks for name in _QKV for kind in _KINDS}
    return {*_names(config).values(), *split, *(_embedder(i, n) for i in blocks for n in _EMBEDDERS.values())}


def _embedder(block: int, name: str) -> str:
    return f"transformer_blocks.{block}.norm1.emb.{name}"


def _same_embedders(state: Mapping[str, Tensor], block: int, origin: str) -> None:
    for name in _EMBEDDERS.values():
        if not torch.equal(state[_embedder(block, name)], state[_embedder(0, name)]):
            raise UserError(
                f"{origin}: {_embedder(block, name)} is not that of block 0; an official DiT has one of all"
            )


def _is_table(config: DiTConfig, found: Tensor) -> bool:
    table = position_table(config.hidden_size, config.grid[0])[None].to(found)
    return found.is_meta or torch.allclose(found, table, rtol=0, atol=1e-5)


def _their_config(config: DiTConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": EPS if config.sinusoid == "official" else 1e-5,
    }


def _our_config(config: Mapping[str, Any], sinusoid: str, origin: str) -> DiTConfig:
    other = [f"{key} {config[key]}" for key, value in _FIXED.items() if config.get(key, value) != value]
    if other:
        raise UserError(f"{origin} is no DiT: its config has {', '.join(other)}")
    try:
        heads, channels = config["num_attention_heads"], config["in_channels"]
        fields = {
            "input_size": config["sample_size"],
            "patch_size": config["patch_size"],
            "in_channels": channels,
            "hidden_size": heads * config["attention_head_dim"],
            "depth": config["num_layers"],
            "num_heads": heads,
            "num_classes": config["num_embeds_ada_norm"],
            "learn_sigma": config["out_channels"] not in (None, channels),
            "sinusoid": sinusoid,
        }
    except KeyError as error:
        raise UserError(f"{origin}: its config lacks {error.args[0]}") from None
    except TypeError:
        raise UserError(f"{origin}: its config has no whole number of heads, or of channels in one") from None
    return validate(DiTConfig, fields, origin)
