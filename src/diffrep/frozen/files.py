"""Where foreign networks come in: diffusers folders, Hub ids, run folders of ours, a user's own factory.

Everything that can be wrong with a file is said here in one line: nothing there, not finished, truncated, a pickle
that wants to run code, weights that do not fit.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep import _torchvision_compat, assets
from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json

PIPELINE = "pipeline"  # the diffusers folder inside a run folder of methods/denoiser.py


def load_unet(reference: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A diffusers ``UNet2DModel``, its scheduler's config, and what is known of it (name, licence).

    Raises:
        UserError: see the page's first lines.
    """
    folder = located(reference)
    if folder.is_file():
        raise UserError(f"{reference} is a file; a teacher is a diffusers folder, a Hub id or a run folder")
    if folder.is_dir():
        return _from_folder(folder)
    if not assets.looks_like_hub_id(reference):
        raise UserError(f"teacher '{reference}' is neither a folder here nor a Hub id of the form OWNER/NAME")
    if assets.find(reference) is None and (folder.parts[0] == "runs" or folder.parent.is_dir()):
        raise UserError(f"teacher '{reference}': no such folder here; train it first, or give a Hub id (OWNER/NAME)")
    return _from_hub(reference)


def _from_folder(folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    run_card: dict[str, Any] = {}
    if (folder / "recipe.yaml").exists() or (folder / PIPELINE).is_dir():
        run_card = _run_card(folder)
        folder = folder / PIPELINE
        if not folder.is_dir():
            raise UserError(f"{folder.parent} is a run, but not one of a diffusion model (no {PIPELINE}/ in it)")
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (inner / "config.json").exists():
        raise UserError(f"{folder} is no diffusers folder: no unet/config.json and no config.json in it")
    card = read_json(inner / "config.json")
    kind = card.get("_class_name") if isinstance(card, dict) else type(card).__name__
    if kind not in (None, "UNet2DModel", "UNetModel"):
        raise UserError(f"{folder} holds a {kind}; valid: UNet2DModel")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = (
        read_json(scheduler if scheduler.exists() else folder / "scheduler_config.json")
        if (scheduler.exists() or (folder / "scheduler_config.json").exists())
        else {}
    )
    card = {"name": folder.name, "licence": "unknown"} | run_card
    return _strictly(inner, str(folder)), config, card


def preset_unet(reference: str) -> tuple[nn.Module, str] | None:
    """A published architecture with fresh weights, and its licence; None where no preset has this name."""
    known = assets.find(reference)
    if known is None or not known.unet:
        return None
    _torchvision_compat.install()
    from diffusers import UNet2DModel

    return UNet2DModel(**known.unet), known.licence


def _run_card(folder: Path) -> dict[str, Any]:
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is a run that has not finished (no result.json): run its command again first")
    return read_json(folder / "result.json")


def _from_hub(reference: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    known = assets.find(reference)
    repository = known.location if known else reference
    _torchvision_compat.install()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, allow_patterns=["*.json", "*.safetensors", "*.bin"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch {repository} from the Hub ({type(error).__name__}); without a network give the path of a "
            f"folder that holds it"
        ) from None
    unet, scheduler, _ = _from_folder(Path(folder))
    return unet, scheduler, {"name": repository, "licence": known.licence if known else "see its model card"}


def _strictly(folder: Path, name: str) -> nn.Module:
    """``UNet2DModel`` with every tensor of the file used and none missing."""
    _torchvision_compat.install()
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    safe = _refuse_unreadable(folder, name)
    try:
        loaded, info = UNet2DModel.from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True, use_safetensors=safe
        )
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name}: its weights cannot be loaded ({_first_line(error)})") from None
    wrong = {k: info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if wrong:
        parts = ", ".join(f"{len(v)} {k.replace('_', ' ')} (first: {v[0]})" for k, v in wrong.items())
        raise UserError(f"{name}: weights and config do not belong together: {parts}")
    return loaded.float()


def _refuse_unreadable(folder: Path, name: str) -> bool:
    """Look into the weights before diffusers does, which buries what is wrong in many lines; True if safetensors."""
    from safetensors import SafetensorError, safe_open

    safe, pickles = sorted(folder.glob("*.safetensors")), sorted(folder.glob("*.bin"))
    if not safe and not pickles:
        raise UserError(f"{name}: its weights cannot be loaded (no .safetensors or .bin file in {folder})")
    for file in safe:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is corrupt or truncated ({error}): fetch or train it again") from None
    for file in [] if safe else pickles:
        try:
            with warnings.catch_warnings(action="ignore"):
                torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
            why = f"{file.name} is damaged, or a pickle that wants to run code; nothing of it was run"
            raise UserError(f"{name}: its weights cannot be loaded ({why})") from None
    return bool(safe)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def foreign_factory(path: str, allow_code: bool) -> Callable[[], Any]:
    """The callable at ``module:name``; it runs foreign code, so the user has to say so.

    Raises:
        UserError: not allowed, no such module, no such name.
    """
    if not allow_code:
        raise UserError(f"python:{path} runs foreign code; if you trust it, say --allow-code")
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:  # the latter two: an empty or a relative name
        raise UserError(f"python:{path}: cannot import '{module_name}' ({error})") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        near = nearest(name, [n for n in vars(module) if not n.startswith("_")])
        raise UserError(f"python:{path}: '{module_name}' has no callable '{name}'; {near}")
    return factory
