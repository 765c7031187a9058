"""Weights that recipes name: where they are published, under which licence, where they belong here, and their hashes.

Nothing is fetched here (:mod:`diffrep.data.fetch` does). Addresses and sizes are as the authors print them; no hash is
published but torchvision's, so a file's hash is recorded at its first use and a changed file is refused from then on.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffrep.errors import RunError, UserError
from diffrep.files import ROOT_VARIABLE, located, read_json, sha256_of, write_json

FOLDER = "weights"  # here, or below $DIFFREP_DATA
_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}

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

    location:   a Hub id (OWNER/NAME), the file's address, or the project's page where only a browser gets the file.
    file:       its published name; "" for a folder, which is called as the key.
    holds:      files of a folder that recipes read; () for one in diffusers' layout.
    page:       the link that a browser follows.
    also:       other names of it.
    purpose:    who uses it.
    parameters: of the network, to the digits its authors print; 0 where they do not.
    size:       smallest and largest number of bytes of a whole file; () where that is not known.
    sha256:     hex digits that its hash begins with; "" where nobody published them.
    unet:       the architecture in diffusers' words, so that it can be built, counted and tested without its weights.
    scores:     what its authors report of its images.
    """

    key: str
    location: str
    licence: str
    file: str = ""
    purpose: str = ""
    parameters: int = 0
    holds: tuple[str, ...] = ()
    page: str = ""
    also: tuple[str, ...] = ()
    sha256: str = ""
    unet: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> Literal["hub", "http", "browser"]:
        """How it can be had."""
        if self.location.startswith(("http://", "https://")):
            return "http"
        return "browser" if self.page else "hub"

    @property
    def name(self) -> str:
        """Of its file or folder below ``weights``."""
        return self.file or self.key

    @property
    def non_commercial(self) -> bool:
        return is_non_commercial(self.licence)


def is_non_commercial(licence: str) -> bool:
    """Whether the words of a licence keep it to non-commercial use."""
    words = licence.lower().replace("-", " ").replace("_", " ").split()
    return "noncommercial" in words or "nc" in words or "non commercial" in " ".join(words)


# The authors contradict themselves; nobody states a licence for the tokenizer that MAGE passes on.
_ADDP = "contradictory: Apache-2.0 (README, model page), CC BY-NC 4.0 (LICENSE file); take it as non-commercial"
_MAGE = "MIT (that of the MAGE repository)"
_ADM = "MIT (that of guided-diffusion's code; its model card says what the weights are meant for)"
_DIT = "CC BY-NC 4.0, non-commercial"
_MAGE_PAGE, _DRIVE = "github.com/LTH14/mage", "https://drive.google.com/file/d"


def _adm(key: str, file: str, purpose: str, parameters: int = 0) -> Asset:
    at = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{file}"
    return Asset(f"adm-{key}", at, _ADM, file, purpose, parameters)


def _dit(pixels: int, parameters: int = 0) -> Asset:
    file = f"DiT-XL-2-{pixels}x{pixels}.pt"
    at = f"https://dl.fbaipublicfiles.com/DiT/models/{file}"
    return Asset(f"dit-xl-2-{pixels}", at, _DIT, file, "DM-KD synthesis", parameters)


def _torchvision(name: str, stem: str, parameters: int, purpose: str = "DM-KD ImageNet") -> Asset:
    """torchvision ends a file's name with the first digits of its SHA-256."""
    at, sha256 = f"https://download.pytorch.org/models/{stem}.pth", stem.rpartition("-")[2]
    return Asset(f"torchvision-{name}", at, "BSD-3-Clause", f"{stem}.pth", purpose, parameters, sha256=sha256)


ASSETS = {
    asset.key: asset
    for asset in (
        Asset(
            "ddpm-cifar10-32",
            "google/ddpm-cifar10-32",
            "Apache-2.0",
            purpose="RepFusion CIFAR-10",
            parameters=35_746_307,
            unet=_ddpm(32, (128, 256, 256, 256), 1),
        ),
        Asset(
            "ddpm-ema-celebahq-256",
            "google/ddpm-ema-celebahq-256",
            "Apache-2.0",
            purpose="RepFusion CelebA-HQ",
            parameters=113_673_219,
            unet=_ddpm(256, (128, 128, 256, 256, 512, 512), 4),
        ),
        _adm("64", "64x64_diffusion.pt", "RepFusion Tiny-ImageNet", 295_900_000),
        _adm("128", "128x128_diffusion.pt", "teacher, generator"),
        _adm("256", "256x256_diffusion.pt", "teacher, generator"),
        _adm("256-uncond", "256x256_diffusion_uncond.pt", "RepFusion ImageNet", 552_800_000),
        _adm("512", "512x512_diffusion.pt", "teacher, generator"),
        _adm("lsun-bedroom", "lsun_bedroom.pt", "teacher"),
        _adm("lsun-cat", "lsun_cat.pt", "teacher"),
        _adm("lsun-horse", "lsun_horse.pt", "teacher"),
        _adm("lsun-horse-nodropout", "lsun_horse_nodropout.pt", "teacher"),
        _dit(256, 675_100_000),
        _dit(512),
        Asset("sd-vae-mse", "stabilityai/sd-vae-ft-mse", "MIT", purpose="DiT decoding", parameters=83_700_000),
        Asset("sd-vae-ema", "stabilityai/sd-vae-ft-ema", "MIT", purpose="DiT decoding", parameters=83_700_000),
        Asset(
            "vqgan_jax_strongaug",
            _MAGE_PAGE,
            "unknown (MAGE, which passes it on, is under MIT)",
            "vqgan_jax_strongaug.ckpt",
            "tokenizer of MAGE and ADDP",
            54_515_587,
            page=f"{_DRIVE}/13S_unB87n6KKuuMdyMnyExW0G1kplTbP",
            also=("mage-tokenizer",),
        ),
        Asset(
            "mage-vitb-1600",
            _MAGE_PAGE,
            _MAGE,
            "mage-vitb-1600.pth",
            "ADDP token predictor",
            146_500_000,
            page=f"{_DRIVE}/1Q6tbt3vF0bSrv5sPrjpFu8ksG3vTsVX2",
            scores={"FID": 11.1, "IS": 81.2},
        ),
        Asset(
            "mage-vitl-1600",
            _MAGE_PAGE,
            _MAGE,
            "mage-vitl-1600.pth",
            "ADDP token predictor",
            409_900_000,
            page=f"{_DRIVE}/15xBPa8EIa0IRUiRYtXiYOC9JZVyMIFrB",
            scores={"FID": 9.1, "IS": 105.1},
        ),
        # Base: its tensors have 1,392,226,652 bytes, an archive of them some hundred thousand more.
        Asset(
            "addp-vit-base-16",
            "Changyao/ADDP",
            _ADDP,
            "addp-vit-base-16.pth",
            "ADDP",
            size=(1_392_226_652, 1_393_226_652),
            scores={"FID": 8.9, "IS": 95.3},
        ),
        Asset(
            "addp-vit-large-16",
            "Changyao/ADDP",
            _ADDP,
            "addp-vit-large-16.pth",
            "ADDP",
            size=(3_500_693_749, 3_500_693_749),
            scores={"FID": 7.6, "IS": 105.1},
        ),
        Asset(
            "fastdfkd",
            "github.com/zju-vipa/Fast-Datafree",
            "none stated",
            purpose="DM-KD CIFAR-100",
            holds=("cifar100_resnet34.pth", "cifar100_vgg11.pth", "cifar100_wrn40_2.pth"),
            page="https://www.dropbox.com/sh/w8xehuk7debnka3/AABhoazFReE_5mMeyvb4iUWoa?dl=0",
        ),
        _torchvision("resnet18", "resnet18-f37072fd", 11_689_512),
        _torchvision("resnet34", "resnet34-b627a593", 21_797_672),
        _torchvision("resnet50", "resnet50-0676ba61", 25_557_032, "DM-KD ImageNet (V1)"),
        _torchvision("shufflenetv2", "shufflenetv2_x1-5666bf0f80", 2_278_604),
    )
}


def find(reference: str) -> Asset | None:
    """The asset with this key, other name or location, or whose published file a path ends with."""
    if reference in ASSETS:
        return ASSETS[reference]
    named = (a for a in ASSETS.values() if reference in (a.location, *a.also))
    filed = (a for a in ASSETS.values() if a.file and a.file == Path(reference).name)
    return next(named, None) or next(filed, None)


def looks_like_hub_id(reference: str) -> bool:
    """OWNER/NAME, or the key of an asset on the Hub."""
    if reference in ASSETS:
        return ASSETS[reference].source == "hub"
    return re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None


# Where it belongs


def expected_path(asset: Asset) -> Path:
    """Where it is or has to be put: ``weights/NAME``, here or below $DIFFREP_DATA."""
    found, root = located(Path(FOLDER) / asset.name), os.environ.get(ROOT_VARIABLE)
    return Path(root) / FOLDER / asset.name if root and not found.exists() else found


def local(asset: Asset) -> Path | None:
    """The whole file or folder, or ``weights/KEY`` that was converted from it; None where neither is here."""
    places = (expected_path(asset), located(Path(FOLDER) / asset.key))
    return next((place for place in places if is_whole(place, asset)), None)


def is_whole(place: Path, asset: Asset) -> bool:
    """Whether all of it is there, as far as names and sizes tell."""
    if place.is_file():
        return (asset.size[0] <= place.stat().st_size <= asset.size[1]) if asset.size else place.stat().st_size > 0
    if asset.holds:
        return all((place / name).is_file() for name in asset.holds)
    return bool(weight_files(place)) and any(place.rglob("config.json"))


def part_of(place: Path) -> Path:
    """What an unfinished fetch of ``place`` is called."""
    return place.with_name(f"{place.name}.part")


def state(asset: Asset) -> Literal["here", "not here", "incomplete"]:
    """Of the place where it belongs."""
    if local(asset):
        return "here"
    place = expected_path(asset)
    return "incomplete" if place.exists() or part_of(place).exists() else "not here"


# Hashes


def weight_files(place: Path) -> list[Path]:
    """The file itself, or all files of weights in a folder."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.rglob("*") if file.suffix in _SUFFIXES and file.is_file())


def recorded_hash(file: Path) -> str | None:
    """The SHA-256 that ``file`` had at its first use, None before that."""
    known = _record(file)
    return known["sha256"] if known else None


def check_or_record(place: Path, asset: Asset | None = None) -> str:
    """Hold a file, or each file of weights in a folder, against its published or recorded hash; record an unknown one.

    A file is read once for each size and time of change that it is met with. The record is NAME.sha256.json beside it;
    where nothing can be written there, the hash stays unknown.

    Returns:
        "hash as published", "hash as recorded", "hash recorded" or "hash unknown ...": what was found, for people.

    Raises:
        UserError: a file is not the published one, or has changed since its first use.
    """
    published = asset.sha256 if asset and place.is_file() else ""
    return "; ".join(dict.fromkeys(_checked(file, published) for file in weight_files(place))) or "no weights"


def _checked(file: Path, published: str) -> str:
    known, stamp = _record(file), {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
    is_seen = known is not None and all(known.get(name) == value for name, value in stamp.items())
    if known is None and not published and not os.access(file.parent, os.W_OK):
        return f"hash unknown (it cannot be recorded in {file.parent})"
    met = known["sha256"] if known and is_seen else sha256_of(file)
    if not met.startswith(published):
        raise UserError(f"{file} is not the published file: SHA-256 {met[:12]}..., not {published}...; get it anew")
    if known and met != known["sha256"]:
        raise UserError(
            f"{file} has changed since its first use (SHA-256 {known['sha256'][:12]}..., now {met[:12]}...): get it "
            f"anew, or delete {_beside(file).name} if the change is meant"
        )
    is_kept = is_seen or _keep(file, {"sha256": met, **stamp})
    if published:
        return "hash as published"
    if not is_kept:
        return f"hash unknown (it cannot be recorded in {file.parent})"
    return "hash as recorded" if known else "hash recorded"


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256.json")


def _record(file: Path) -> dict[str, Any] | None:
    if not _beside(file).is_file():
        return None
    kept = read_json(_beside(file))
    if not isinstance(kept, dict) or not isinstance(kept.get("sha256"), str):
        raise UserError(f"{_beside(file)} is no record of a hash: delete it, and the hash is recorded anew")
    return kept


def _keep(file: Path, record: dict[str, Any]) -> bool:
    try:
        write_json(_beside(file), record)
    except (RunError, OSError):  # a folder that is only read
        return False
    return True
