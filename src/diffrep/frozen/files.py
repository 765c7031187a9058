"""Where foreign networks come in: diffusers folders, Hub ids, runs of ours, official files, a user's own factory.

Everything that can be wrong with a file is said here in one line: nothing there, not finished, truncated, a pickle
that wants to run code, weights that do not fit.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep import _torchvision_compat, assets
from diffrep.console import notice
from diffrep.errors import UserError, nearest
from diffrep.files import located, read_json
from diffrep.models.weights import read_weights

PIPELINE = "pipeline"  # the diffusers folder inside a run folder of methods/denoiser.py
CARD = "diffrep.json"  # beside a diffusers folder that `diffrep convert` wrote: what diffusers has no word for


@dataclass(frozen=True)
class Opened:
    """A place that is here. path: a file, or a diffusers folder; card: what is known of it besides."""

    path: Path
    name: str
    licence: str = "unknown"
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def scheduler(self) -> dict[str, Any]:
        """Of a diffusers folder, the config of its noise schedule; {} where it has none."""
        for place in (self.path / "scheduler", self.path):
            if (place / "scheduler_config.json").exists():
                return read_json(place / "scheduler_config.json")
        return {}


def opened(reference: str) -> Opened:
    """The file or folder that ``reference`` names: here, below $DIFFREP_DATA, under a published key, or on the Hub.

    Raises:
        UserError: nothing there, an unfinished run, a run that is no diffusion model.
    """
    path, known = located(reference), assets.find(reference)
    path = path if path.exists() or known is None else assets.local(known) or path
    if path.is_file():
        return _said(_known(Opened(path, path.name), known))
    if path.is_dir():
        return _said(_known(_opened_folder(path), known))
    if known is not None and known.source != "hub":
        raise UserError(
            f"{known.key} is not here: diffrep assets fetch {known.key}, or put it at {assets.expected_path(known)}"
        )
    if not assets.looks_like_hub_id(reference):
        raise UserError(f"teacher '{reference}' is neither a folder here nor a Hub id of the form OWNER/NAME")
    if known is None and (path.parts[0] == "runs" or path.parent.is_dir()):
        raise UserError(f"teacher '{reference}': no such folder here; train it first, or give a Hub id (OWNER/NAME)")
    return _from_hub(reference)


def _known(found: Opened, known: assets.Asset | None) -> Opened:
    """With the licence and the hash that a published file has, which is recorded at its first use."""
    if known is None:
        return found
    assets.check_or_record(found.path, known)
    licence = known.licence if found.licence == "unknown" else found.licence
    return Opened(found.path, found.name, licence, found.card)


def _said(found: Opened) -> Opened:
    """After its licence was shown where it restricts the use."""
    if assets.is_non_commercial(found.licence):
        notice(f"{found.name}: licence of its weights: {found.licence}")
    return found


def _opened_folder(folder: Path) -> Opened:
    card: dict[str, Any] = {}
    if (folder / "recipe.yaml").exists() or (folder / PIPELINE).is_dir():
        card, name = _run_card(folder), folder.name
        folder = folder / PIPELINE
        if not folder.is_dir():
            raise UserError(f"{folder.parent} is a run, but not one of a diffusion model (no {PIPELINE}/ in it)")
        return Opened(folder, card.get("name", name), card.get("licence", "unknown"), card)
    if (folder / CARD).exists():
        card = read_json(folder / CARD)
    return Opened(folder, folder.name, card.get("licence", "unknown"), card)


def part_of(folder: Path, *names: str) -> tuple[Path, str | None]:
    """The network in ``folder/NAME`` for the first name that is there, else in ``folder`` itself, and its class."""
    inner = next((folder / name for name in names if (folder / name).is_dir()), folder)
    if not (inner / "config.json").exists():
        raise UserError(f"{folder} is no diffusers folder: no unet/config.json and no config.json in it")
    card = read_json(inner / "config.json")
    return inner, card.get("_class_name") if isinstance(card, dict) else type(card).__name__


def load_unet(found: Opened) -> nn.Module:
    """A diffusers ``UNet2DModel``, every tensor of its file used and none missing.

    Raises:
        UserError: see the page's first lines.
    """
    inner, kind = part_of(found.path, "unet")
    if kind not in (None, "UNet2DModel", "UNetModel"):
        raise UserError(f"{found.path} holds a {kind}; valid: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel")
    _torchvision_compat.install()
    from diffusers import UNet2DModel

    return library_network(UNet2DModel, inner, str(found.path))


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


def _from_hub(reference: str) -> Opened:
    known = assets.find(reference)
    repository = known.location if known else reference
    _torchvision_compat.install()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.bin"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot fetch {repository} from the Hub ({type(error).__name__}); without a network give the path of a "
            f"folder that holds it"
        ) from None
    return Opened(Path(folder), repository, known.licence if known else "see its model card")


def library_network(kind: Any, folder: Path, name: str) -> nn.Module:
    """A network of diffusers or transformers in float32, with every tensor of the file used and none missing."""
    from safetensors import SafetensorError

    safe = _refuse_unreadable(folder, name)
    try:
        with quietly():
            loaded, info = kind.from_pretrained(
                folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True, use_safetensors=safe
            )
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name}: its weights cannot be loaded ({_first_line(error)})") from None
    wrong = {k: info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if wrong:
        parts = ", ".join(f"{len(v)} {k.replace('_', ' ')} (first: {sorted(v)[0]})" for k, v in wrong.items())
        raise UserError(f"{name}: weights and config do not belong together: {parts}")
    return loaded.float()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The libraries log in many lines what is wrong, and we say it in one."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def folder_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a folder's weight files, by name."""
    if _refuse_unreadable(folder, name):
        files = sorted(folder.glob("*.safetensors"))
        return {key: value for file in files for key, value in read_weights(file).items()}
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.bin")):
        state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


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
