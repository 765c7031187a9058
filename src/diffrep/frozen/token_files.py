"""``diffrep convert``: an official file of MAGE or ADDP into folders of ours, and back.

FOLDER/tokenizer/, token_predictor/, addp/   those the file holds: weights.safetensors and config.json
FOLDER/unused.safetensors                    tables that nothing reads, as KIND.OFFICIAL_NAME: nothing is lost
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from diffrep.errors import UserError
from diffrep.files import folder_aside, located
from diffrep.frozen.tokens import LICENCES, held, read_official, read_part, write_part
from diffrep.frozen.vqmodel import VQModelConfig
from diffrep.models.addp_files import ALIAS, Heads, Part, checked, described, join, released_name
from diffrep.models.stored import PICKLES, write_checkpoint
from diffrep.models.weights import read_weights, write_weights

UNUSED = "unused.safetensors"
WRAPPERS = {"addp": "model", "mage": "model", "tokenizer": "state_dict"}  # under which official code looks


def convert(
    source: str, out: str | Path, heads: Sequence[int] = (), decoder_heads: Sequence[int] = ()
) -> dict[str, Any]:
    """Split an official file into a folder, or join such a folder into a file; returns what each part is.

    Args:
        source: a file of ADDP, MAGE or the tokenizer, or a folder with our networks.
        out: what is written, whole or not at all; it must not exist.
        heads, decoder_heads: of a file whose width is not a released one; two numbers are ADDP's and the predictor's.

    Raises:
        UserError: nothing there, a damaged or unexplained file, networks that do not belong together.
    """
    place, target = located(source), Path(out)
    if not place.exists():
        raise UserError(f"{source} does not exist; valid: an official file (.pth, .ckpt) or a folder of its networks")
    if target.exists():
        raise UserError(f"{out} exists already and would be replaced; choose another --out")
    if place.is_dir():
        if heads or decoder_heads:
            raise UserError(f"{source} is a folder, whose config.json files know the heads: leave out the options")
        return {"source": source, "out": str(out)} | _to_file(place, target)
    return {"source": source, "out": str(out)} | _to_folder(place, target, _by_kind(heads, decoder_heads))


def _by_kind(heads: Sequence[int], decoder_heads: Sequence[int]) -> Heads:
    pairs = list(zip(heads, decoder_heads, strict=False))
    if len(heads) != len(decoder_heads) or len(pairs) > 2 or min([1, *heads, *decoder_heads]) < 1:
        raise UserError("--heads and --decoder-heads belong together: one number each, or ADDP's and the predictor's")
    return {"addp": pairs[0], "token_predictor": pairs[-1]} if pairs else {}


def _to_folder(path: Path, target: Path, heads: Heads) -> dict[str, Any]:
    official = read_official(path, heads)
    licence = LICENCES[official.layout]
    unused = {f"{kind}.{name}": value for kind, part in official.parts.items() for name, value in part.unused.items()}
    with folder_aside(target) as aside:
        for kind, part in official.parts.items():
            write_part(aside, kind, part.config, part.state, released_name(kind, part.config) or path.stem, licence)
        if unused:
            write_weights(aside / UNUSED, unused)
    found = _said(official.layout, official.parts, official.aliases, licence)
    return found | {"direction": "split", "unused": sorted(unused), "filled": []}


def _to_file(folder: Path, target: Path) -> dict[str, Any]:
    if target.suffix not in PICKLES:
        raise UserError(f"--out {target}: official files are called {', '.join(PICKLES)}")
    parts, licence = _parts(folder)
    layout, state, filled = join(parts, str(folder))
    write_checkpoint(target, state, WRAPPERS[layout])
    unused = sorted(f"{kind}.{name}" for kind, part in parts.items() for name in part.unused)
    found = _said(layout, parts, sum(name.startswith(ALIAS) for name in state), licence)
    return found | {"direction": "join", "unused": unused, "filled": filled}


def _parts(folder: Path) -> tuple[dict[str, Part], str]:
    places = held(folder)
    if not places:
        raise UserError(f"{folder} holds none of our networks; valid: what diffrep convert FILE --out FOLDER writes")
    dead = _unused(folder / UNUSED)
    if strange := sorted(dead.keys() - places.keys()):
        raise UserError(f"{folder / UNUSED} has tables of {strange[0]}, which {folder} does not hold")
    parts, licences = {}, []
    for kind, place in places.items():
        config, state, card = read_part(place, kind)
        if isinstance(config, VQModelConfig):
            raise UserError(f"{place} is a VQModel of diffusers, and no official file holds one")
        parts[kind] = checked(kind, Part(config, dict(state), dead.get(kind, {})), str(place))
        licences.append(str(card["licence"]))
    return parts, "; ".join(dict.fromkeys(licences))


def _unused(path: Path) -> dict[str, dict[str, Tensor]]:
    """{kind: {name: table}}."""
    named = sorted(read_weights(path).items()) if path.exists() else []
    by_kind = groupby(named, key=lambda item: item[0].partition(".")[0])
    return {kind: {name.partition(".")[2]: value for name, value in rows} for kind, rows in by_kind}


def _said(layout: str, parts: Mapping[str, Part], aliases: int, licence: str) -> dict[str, Any]:
    return {
        "layout": layout,
        "parts": {kind: _about(kind, part) for kind, part in parts.items()},
        "aliases": aliases,
        "licence": licence,
    }


def _about(kind: str, part: Part) -> dict[str, Any]:
    return {
        "released_as": released_name(kind, part.config),
        "size": described(kind, part.config),
        "tensors": len(part.state),
        "parameters": sum(value.numel() for value in part.state.values()),
        "config": part.config.model_dump(mode="json"),
    }
