"""``diffrep convert``: official files into folders that others read, and back.

An official file of guided-diffusion or DiT becomes a diffusers folder, such a folder an official file; files of MAGE
and ADDP: :mod:`diffrep.frozen.token_files`.

FOLDER/unet/ or transformer/   config.json and safetensors, as diffusers has them
FOLDER/scheduler/              the noise schedule
FOLDER/vae/                    of a DiT whose VAE was named
FOLDER/model_index.json        where diffusers has a pipeline for the whole
FOLDER/diffrep.json            licence, and what diffusers has no word for
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffrep.config import Config
from diffrep.diffusion.schedules import BETA_END, BETA_START
from diffrep.errors import UserError
from diffrep.files import folder_aside, located, read_json, write_json
from diffrep.frozen import dit, token_files
from diffrep.frozen.files import CARD, Opened, folder_weights, opened, part_of
from diffrep.frozen.official import Guided, named_guided
from diffrep.frozen.references import SourceOptions, split_reference
from diffrep.models import dit_files, guided_diffusers
from diffrep.models.stored import PICKLES, read_checkpoint, write_checkpoint
from diffrep.models.weights import write_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
SINUSOID = "diffusers itself runs a DiT with another sinusoid of t: set downscale_freq_shift 0 in its time_proj"


def convert(
    source: str, out: str | Path, heads: Sequence[int] = (), decoder_heads: Sequence[int] = ()
) -> dict[str, Any]:
    """An official file into a folder, or a folder into an official file; returns what each network in it is.

    Args:
        source: a file of guided-diffusion, DiT, ADDP, MAGE or its tokenizer, with what it cannot tell behind a ``?``
            (:mod:`diffrep.frozen.references`); or a diffusers folder, or a folder of our token networks.
        out: what is written, whole or not at all; it must not exist.
        heads, decoder_heads: of a file of ADDP or MAGE whose width is not a released one.

    Raises:
        UserError: nothing there, a damaged or unexplained file, an architecture that the other side does not have.
    """
    place, options = split_reference(source)
    path = located(place)
    if heads or decoder_heads or not path.exists():
        return token_files.convert(source, out, heads, decoder_heads)
    if Path(out).exists():
        raise UserError(f"{out} exists already and would be replaced; choose another --out")
    found = _to_folder(path, options, Path(out)) if path.is_file() else _to_file(path, options, Path(out))
    return {"source": source, "out": str(out), **found} if found else token_files.convert(place, out)


def _to_folder(path: Path, options: SourceOptions, target: Path) -> dict[str, Any] | None:
    """A file of guided-diffusion or DiT; None for another."""
    checkpoint, found = read_checkpoint(path), opened(str(path))
    if dit.is_checkpoint(checkpoint):
        return _dit_folder(found, checkpoint, options, target)
    if options.label is not None:
        raise UserError(f"{path}: a file is converted whole; leave out label={options.label}")
    guided = named_guided(found, checkpoint, options)
    return _unet_folder(found, guided, target) if guided else None


def _unet_folder(found: Opened, guided: Guided, target: Path) -> dict[str, Any]:
    config, state, unseen = guided
    words, theirs = guided_diffusers.to_diffusers(config, state, str(found.path))
    card = {"null_class": False, "attention_order": config.attention_order}
    index = {"unet": "UNet2DModel"} if config.num_classes is None else {}  # diffusers has no pipeline with labels
    with folder_aside(target) as aside:
        _write(aside, "unet", "UNet2DModel", words, theirs, found.licence, card)
        _write_schedule(aside, unseen.noise_schedule, "DDPMPipeline" if index else "", index, config.learns_variance)
    return _said("guided-diffusion", "unet", config, state, found.licence, "split")


def _dit_folder(found: Opened, checkpoint: Any, options: SourceOptions, target: Path) -> dict[str, Any]:
    origin = str(found.path)
    options.only(("num_heads", "vae"), f"{origin}, a DiT to be converted,")
    state = dit_files.dit_weights(checkpoint, origin)
    config = dit_files.dit_config(state, options.num_heads, "official", origin)
    words, theirs = dit_files.to_diffusers(config, state)
    parts = {"transformer": "DiTTransformer2DModel"} | ({"vae": "AutoencoderKL"} if options.vae else {})
    vae = part_of(opened(options.vae).path, "vae")[0] if options.vae else None
    with folder_aside(target) as aside:
        _write(aside, "transformer", "DiTTransformer2DModel", words, theirs, found.licence, {})
        _write_schedule(aside, "linear", "DiTPipeline" if vae else "", parts, config.learn_sigma)
        if vae is not None:
            shutil.copytree(vae, aside / "vae")
    return _said("DiT", "transformer", config, state, found.licence, "split") | {"note": SINUSOID}


def _to_file(folder: Path, options: SourceOptions, target: Path) -> dict[str, Any] | None:
    """A diffusers folder with a U-Net like guided-diffusion's, or a DiT; None for another folder."""
    if not any((folder / part / "config.json").exists() for part in (".", "unet", "transformer")):
        return None
    if target.suffix not in PICKLES:
        raise UserError(f"--out {target}: official files are called {', '.join(PICKLES)}")
    options.only(("attention_order", "sinusoid"), f"{folder}, a folder to be converted,")
    found = opened(str(folder))
    inner, kind = part_of(found.path, "unet", "transformer")
    config, state = read_json(inner / "config.json"), folder_weights(inner, str(folder))
    if kind == "DiTTransformer2DModel":
        network, official = dit_files.from_diffusers(config, state, options.sinusoid or "official")
        write_checkpoint(target, official)
        return _said("DiT", "transformer", network, official, found.licence, "join")
    order = options.attention_order or found.card.get("attention_order", "new")
    unet, official = guided_diffusers.from_diffusers(config, state, str(folder), order)
    write_checkpoint(target, official)
    return _said("guided-diffusion", "unet", unet, official, found.licence, "join")


def _write(
    aside: Path, part: str, kind: str, words: Mapping[str, Any], state: Mapping[str, Tensor], licence: str, card: Any
) -> None:
    (aside / part).mkdir()
    write_json(aside / part / "config.json", {"_class_name": kind, **words})
    write_weights(aside / part / WEIGHTS, state)
    write_json(aside / CARD, {"licence": licence, **card})


def _write_schedule(aside: Path, schedule: str, pipeline: str, parts: Mapping[str, str], learned: bool) -> None:
    """The scheduler's config, and what names the parts of a pipeline."""
    (aside / "scheduler").mkdir()
    betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    settings = {
        "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": betas,
        "beta_start": BETA_START, "beta_end": BETA_END, "prediction_type": "epsilon",
        "variance_type": "learned_range" if learned else "fixed_large", "clip_sample": pipeline == "DDPMPipeline",
    }  # fmt: skip
    write_json(aside / "scheduler" / "scheduler_config.json", settings)
    if pipeline:
        named = {"scheduler": "DDPMScheduler", **parts}
        index = {"_class_name": pipeline} | {part: ["diffusers", kind] for part, kind in named.items()}
        write_json(aside / "model_index.json", index)


def _said(
    layout: str, part: str, config: Config, state: Mapping[str, Tensor], licence: str, direction: str
) -> dict[str, Any]:
    about = {
        "released_as": None,
        "size": ", ".join(f"{name} {value}" for name, value in config.model_dump(mode="json").items()),
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "config": config.model_dump(mode="json"),
    }
    both = {"aliases": 0, "unused": [], "filled": [], "licence": licence, "direction": direction}
    return {"layout": layout, "parts": {part: about}, **both}
