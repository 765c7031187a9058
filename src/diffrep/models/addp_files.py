"""The files of ADDP's authors under our names: dict in, dict out.

Three layouts are known. An ADDP release (868 tensors at base size, 1156 at large) holds its own network without
prefix, the tokenizer as ``vqgan.*``, the token predictor as ``token_predictor.*``, and the tokenizer once more as
``token_predictor.vqgan.*``: aliases. A MAGE file holds the predictor without prefix, perhaps with ``vqgan.*``; the
tokenizer's file holds the tokenizer. Every tensor is explained, or the file is refused.
Letters: L tokens, D width, K codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.config import Config, validate
from diffrep.errors import UserError
from diffrep.models import addp_vit, masked_vit
from diffrep.models.addp_vit import LARGE, ADDPVit, ADDPVitConfig, addp_fields
from diffrep.models.convert import fitted, some
from diffrep.models.masked_vit import TokenPredictor, TokenPredictorConfig, predictor_fields
from diffrep.models.vqgan import VQGAN, VQGANConfig

KINDS: dict[str, tuple[type[nn.Module], type[Config]]] = {
    "tokenizer": (VQGAN, VQGANConfig),
    "token_predictor": (TokenPredictor, TokenPredictorConfig),
    "addp": (ADDPVit, ADDPVitConfig),
}
WORDS = {"tokenizer": "tokenizer", "token_predictor": "token predictor", "addp": "ADDP network"}

# Which networks a file holds, and what stands in front of their names; "" takes what is left.
LAYOUTS = {
    "addp": {"tokenizer": "vqgan.", "token_predictor": "token_predictor.", "addp": ""},
    "mage": {"tokenizer": "vqgan.", "token_predictor": ""},
    "tokenizer": {"tokenizer": ""},
}
# Names that only this layout has; the first that fits is taken.
MARKS = {
    "addp": ("token_predictor.", "tokenizer_norm.", "decoder_pos_token_embed"),
    "mage": ("token_emb.", "mlm_layer."),
    "tokenizer": ("encoder.", "quantize."),
}
ALIAS = "token_predictor.vqgan."
UNUSED = {"tokenizer": (), "token_predictor": masked_vit.UNUSED, "addp": addp_vit.UNUSED}

# What networks of one file have in common, and as which field of their config.
SHARED = {
    "codes": {"tokenizer": "num_codes", "token_predictor": "num_codes", "addp": "num_codes"},
    "tokens": {"token_predictor": "num_tokens", "addp": "num_tokens"},
    "pixels per token": {"tokenizer": "stride", "addp": "patch_size"},
}

PLACES = "token_emb.position_embeddings.weight"
PLACE_ROWS = 257  # of that table in every file; the first 1 + L are read
PLACE_IDS = "token_emb.position_ids"  # 0..256
MAGE_PATCH = 16  # pixels; of the unused pixel tables where no tokenizer tells its own

RELEASED: dict[str, dict[str, Config]] = {
    "tokenizer": {"vqgan_jax_strongaug": VQGANConfig()},
    "token_predictor": {
        "mage_vit_base_patch16": TokenPredictorConfig(),
        "mage_vit_large_patch16": TokenPredictorConfig(**LARGE),
        "mage_vit_tiny_patch16": TokenPredictorConfig(embed_dim=256, num_heads=4, decoder_num_heads=4),
    },
    "addp": {"addp_vit_base_patch16": ADDPVitConfig(), "addp_vit_large_patch16": ADDPVitConfig(**LARGE)},
}


@dataclass(frozen=True)
class Part:
    """One network of a file.

    state:  its tensors under our names.
    unused: tensors of the file that nothing reads, under official names without prefix; of the table of positions
            the rows behind those of L tokens.
    """

    config: Any  # a VQGANConfig, TokenPredictorConfig or ADDPVitConfig
    state: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class OfficialFile:
    """What a file holds. layout: a key of :data:`LAYOUTS`; aliases: tensors that stood there twice."""

    layout: str
    parts: dict[str, Part]
    aliases: int


# Sizes


def released_name(kind: str, config: Config) -> str | None:
    """The official name of a network of this size; None where none of the released ones has it."""
    return next((name for name, known in RELEASED[kind].items() if known == config), None)


def described(kind: str, config: Any) -> str:
    """The size of a network in words."""
    if kind == "tokenizer":
        told = f"{config.num_codes} codes of {config.z_channels} channels, stride {config.stride}"
        return told if config.decoder else f"{told}, no decoder"
    depth = f"width {config.embed_dim}, depth {config.depth} + {config.decoder_depth}"
    return f"{depth}, {config.num_codes} codes, {config.num_tokens} tokens"


Heads = Mapping[str, tuple[int, int]]  # kind -> heads of encoder and decoder


def _heads(kind: str, width: int, given: Heads, origin: str) -> dict[str, int]:
    known = {c.embed_dim: (c.num_heads, c.decoder_num_heads) for c in RELEASED[kind].values()}  # type: ignore[attr-defined]
    found = given.get(kind) or known.get(width)
    if found is None:
        widths = " or ".join(map(str, sorted(known)))
        why = f"width {width}, and the released ones have {widths}; heads cannot be seen in a file"
        how = "say them: diffrep convert FILE --out FOLDER --heads N --decoder-heads N"
        raise UserError(f"{origin}: its {WORDS[kind]} has {why}; {how}")
    return dict(zip(("num_heads", "decoder_num_heads"), found, strict=True))


def _config(kind: str, state: Mapping[str, Tensor], heads: Heads, origin: str) -> Any:
    """Read off names and shapes."""
    what = f"{origin}: its {WORDS[kind]}"
    _plausible(state, what)
    try:
        if kind == "tokenizer":
            return VQGANConfig.of(state)
        fields = predictor_fields(state) if kind == "token_predictor" else addp_fields(state)
    except KeyError as error:
        raise UserError(f"{what} lacks {error.args[0]}") from None
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        raise UserError(f"{what} has tensors of shapes that no such network has") from None
    return validate(KINDS[kind][1], fields | _heads(kind, fields["embed_dim"], heads, origin), what)


def _plausible(state: Mapping[str, Tensor], what: str) -> None:
    """No number in a name beyond the tensors there are: a network of a million layers would be built."""
    for name in state:
        numbers = re.findall(r"\d+", name)
        if any(len(n) > 4 or int(n) > len(state) + 1 for n in numbers):
            raise UserError(f"{what} has the unexplained tensor {some([name])}")


# From a file


def layout_of(state: Mapping[str, Tensor]) -> str | None:
    """A key of :data:`LAYOUTS`, or None where nothing is known."""
    return next((layout for layout, marks in MARKS.items() if any(n.startswith(marks) for n in state)), None)


def split(state: Mapping[str, Tensor], origin: str, heads: Heads | None = None) -> OfficialFile:
    """The networks of an official state dict.

    Args:
        origin: what a message calls the file.
        heads: of encoder and decoder by kind, which cannot be seen; needed besides the released widths.

    Raises:
        UserError: an unknown layout; tensors that are missing, unexplained, of another shape, or aliases of nothing
            or of something else; networks of different codebooks; a width whose heads nobody said.
    """
    layout = layout_of(state)
    if layout is None:
        valid = "an ADDP release, a MAGE file or the tokenizer's file"
        raise UserError(f"{origin} is none of the official files ({some(state)}); valid: {valid}")
    _numbers_only(state, origin)
    aliases = _aliases(state, origin) if layout == "addp" else set()
    grouped = _grouped({name: value for name, value in state.items() if name not in aliases}, LAYOUTS[layout])
    for kind, prefix in LAYOUTS[layout].items():
        if not grouped[kind] and (layout, kind) != ("mage", "tokenizer"):
            told = f"no {WORDS[kind]} ({f'{prefix}*' if prefix else 'names without prefix'})"
            raise UserError(f"{origin} holds {told}, and an official file does")
    parts = {kind: _part(kind, found, heads or {}, origin) for kind, found in grouped.items() if found}
    if layout == "addp" and not parts["tokenizer"].config.decoder:
        raise UserError(f"{origin}: its tokenizer has no decoder (vqgan.decoder.*), and an official file has one")
    _agree(parts, origin)
    return OfficialFile(layout, parts, len(aliases))


def _numbers_only(state: Mapping[str, Tensor], origin: str) -> None:
    plain = {n for n, v in state.items() if v.layout == torch.strided and (v.is_floating_point() or n.endswith("_ids"))}
    if strange := [name for name in state if name not in plain]:
        raise UserError(f"{origin}: {some(strange)} cannot be weights ({state[strange[0]].dtype})")


def _aliases(state: Mapping[str, Tensor], origin: str) -> set[str]:
    """The names under which the tokenizer stands a second time: all of it or nothing, and the same."""
    found = {name for name in state if name.startswith(ALIAS)}
    targets = {name: name.removeprefix("token_predictor.") for name in found}
    if lost := [n for n, target in targets.items() if target not in state]:
        raise UserError(f"{origin}: {some(lost)} repeats a tensor that is not there ({targets[lost[0]]})")
    if changed := [n for n, target in targets.items() if not _same(state[n], state[target])]:
        raise UserError(f"{origin}: {some(changed)} should repeat {targets[changed[0]]} and differs from it")
    whole = {name for name in state if name.startswith("vqgan.")}
    if found and (missing := sorted(whole - set(targets.values()))):
        raise UserError(f"{origin}: {ALIAS}* repeats the tokenizer but for {some(missing)}")
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _grouped(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Networks by kind, each tensor with memory of its own: safetensors files know no other."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in prefixes}
    seen: set[int] = set()
    for name, value in state.items():
        kind = next(k for k, prefix in prefixes.items() if name.startswith(prefix))
        memory = value.untyped_storage().data_ptr()
        found[kind][name.removeprefix(prefixes[kind])] = value.clone() if memory in seen else value
        seen.add(memory)
    return found


def _part(kind: str, state: Mapping[str, Tensor], heads: Heads, origin: str) -> Part:
    config = _config(kind, state, heads, origin)
    unused = {name: value for name, value in state.items() if name in UNUSED[kind]}
    read = {name: value for name, value in state.items() if name not in unused}
    if kind == "token_predictor" and PLACES in read and read[PLACES].shape[:1] > (1 + config.num_tokens,):
        table, slots = read[PLACES], 1 + config.num_tokens
        read[PLACES], unused[PLACES] = table[:slots].clone(), table[slots:].clone()
    wanted = _on_paper(kind, config).state_dict()
    return Part(config, fitted(read, wanted, f"{origin}: its {WORDS[kind]} ({described(kind, config)})"), unused)


def _on_paper(kind: str, config: Any) -> nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return KINDS[kind][0](config)


def _agree(parts: Mapping[str, Part], origin: str) -> None:
    """Networks of one file know the same codes and the same grid.

    Raises:
        UserError: they do not; the numbers of each are said.
    """
    for what, fields in SHARED.items():
        found = {kind: getattr(parts[kind].config, name) for kind, name in fields.items() if kind in parts}
        if len(set(found.values())) > 1:
            told = ", ".join(f"its {WORDS[kind]} has {number}" for kind, number in found.items())
            raise UserError(f"{origin}: {what} differ: {told}; these networks were not trained together")


# Back to a file


def checked(kind: str, part: Part, origin: str) -> Part:
    """The part, once it was seen that its tensors fit its config and that its unused tables are known ones.

    Raises:
        UserError: they do not, or are not.
    """
    if strange := [name for name in part.unused if name not in (*UNUSED[kind], PLACES)]:
        raise UserError(f"{origin}: {some(strange)} is no unused table of a {WORDS[kind]}")
    return replace(part, state=fitted(part.state, _on_paper(kind, part.config).state_dict(), origin))


def join(parts: Mapping[str, Part], origin: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """An official state dict.

    Unused tables that are not there are filled, with zeros or with 0, 1, 2, ...: nothing reads them, but the official
    code asks for their names.

    Returns:
        a key of :data:`LAYOUTS`, the tensors, the names of the tables that were filled.

    Raises:
        UserError: networks that no official file holds together, or that do not belong together.
    """
    layout = "addp" if "addp" in parts else "mage" if "token_predictor" in parts else "tokenizer"
    missing = [kind for kind in LAYOUTS[layout] if kind not in parts and (layout, kind) != ("mage", "tokenizer")]
    if missing:
        lacking = " and no ".join(WORDS[kind] for kind in missing)
        raise UserError(f"{origin} holds no {lacking}; an official file of this kind holds {_held(LAYOUTS[layout])}")
    _agree(parts, origin)
    patch = parts["tokenizer"].config.stride if "tokenizer" in parts else MAGE_PATCH
    state: dict[str, Tensor] = {}
    filled: list[str] = []
    for kind in reversed(LAYOUTS[layout]):
        if kind in parts:
            whole, fresh = _whole(kind, parts[kind], patch)
            prefix = LAYOUTS[layout][kind]
            state |= {prefix + name: value for name, value in whole.items()}
            filled += [prefix + name for name in fresh]
    if layout == "addp":
        state |= {ALIAS + name: value for name, value in parts["tokenizer"].state.items()}
    return layout, state, filled


def _held(kinds: Mapping[str, str]) -> str:
    return ", ".join(WORDS[kind] for kind in kinds)


def _whole(kind: str, part: Part, patch: int) -> tuple[dict[str, Tensor], list[str]]:
    """One network with its unused tables, and which of them had to be filled."""
    state, unused = dict(part.state), dict(part.unused)
    device = next(iter(state.values())).device
    wanted = unused_shapes(kind, part.config, patch)
    fresh = [name for name in wanted if name not in unused]
    for name in fresh:
        unused[name] = torch.zeros(wanted[name], device=device)
        if name == PLACE_IDS:
            unused[name] = torch.arange(wanted[name][1], device=device)[None]
    if kind == "token_predictor":
        rest = unused.pop(PLACES, state[PLACES][:0])
        state[PLACES] = torch.cat([state[PLACES], rest])
    return state | unused, fresh


def unused_shapes(kind: str, config: Any, patch: int) -> dict[str, tuple[int, ...]]:
    """Of :data:`UNUSED`, and of the rows of positions behind those of L tokens."""
    if kind == "tokenizer":
        return {}
    width, slots, pixels = config.embed_dim, 1 + config.num_tokens, 3 * patch**2
    known = {
        "cls_token": (1, 1, width), "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "decoder_pred.weight": (pixels, width), "decoder_pred.bias": (pixels,),
        PLACE_IDS: (1, max(slots, PLACE_ROWS)),
    }  # fmt: skip
    found = {name: known.get(name, (1, slots, width)) for name in UNUSED[kind]}
    behind = PLACE_ROWS - slots if kind == "token_predictor" else 0
    return found | ({PLACES: (behind, width)} if behind > 0 else {})
