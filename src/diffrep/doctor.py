"""What this machine can do, what would be slow, and why. Reads, never changes."""

from __future__ import annotations

import os
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffrep import __version__, _torchvision_compat
from diffrep.assets import ASSETS
from diffrep.data.sources import KINDS

EXTRAS = {"datasets": "hub", "tensorboard": "trackers", "wandb": "trackers", "trackio": "trackers"}
EXTRAS |= {"ray": "ray", "submitit": "slurm", "transformers": "text", "torch_fidelity": "scores"}
PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate")


def examine() -> dict[str, Any]:
    """Everything :func:`lines` says, as plain values."""
    import torch

    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    single, half = _rate(torch.float32), _rate(torch.bfloat16)
    return {
        "diffrep": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "cuda": cuda,
        "bf16_speedup": round(half / single, 2),
        "gmacs_per_second": round(single, 1),
        "torchvision_operators": "declared by diffrep" if _torchvision_compat.install() else "compiled",
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "extras": {package: find_spec(package) is not None for package in EXTRAS},
        "weights_cached": {key: _cached(asset.location) for key, asset in ASSETS.items() if asset.unet},
        "data_kinds": sorted(set(KINDS) - {"digits"}),
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """One line per finding, the advice after an arrow."""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items())
    told = [
        f"diffrep {found['diffrep']} with {versions}",
        f"device: {found['device']}",
        f"one thread: {found['gmacs_per_second']} G multiply-adds/s; bf16 autocast: {found['bf16_speedup']}x",
        f"torchvision operators: {found['torchvision_operators']}",
        f"data: digits comes along; other kinds read a path or an address: {', '.join(found['data_kinds'])}",
        f"disk free here: {found['free_bytes'] / 1e9:.0f} GB",
    ]
    if not found["cuda"]:
        told.append(
            "no GPU -> 8- and 32-pixel recipes are fine; at 64 pixels and above expect days: see --dry-run first"
        )
    if found["bf16_speedup"] > 1.2:
        told.append("this device has fast bf16 -> --set train.precision=bf16 saves time (it changes rounding)")
    else:
        told.append("bf16 is no faster here -> keep train.precision=fp32")
    told.append(
        f"torch.compile: {'C++ compiler found' if found['compiler'] else 'no C++ compiler'}; diffrep does not use it"
    )
    missing = sorted({EXTRAS[package] for package, there in found["extras"].items() if not there})
    told += [f"extra '{extra}' is not complete -> pip install 'diffrep[{extra}]'" for extra in missing]
    absent = [key for key, there in found["weights_cached"].items() if not there]
    told += [f"weights not cached: {', '.join(absent)} -> fetched from the Hub at the first use"] if absent else []
    return told


def _rate(dtype: Any) -> float:
    """G multiply-adds per second and thread of a 3x3 convolution, the work of every U-Net here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    x = torch.randn(16, 64, 32, 32, device=device)
    best = float("inf")
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for _ in range(4):
            began = time.perf_counter()
            convolution(x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return 64 * 64 * 9 * 32 * 32 * 16 / best / 1e9


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cached(repository: str) -> bool:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return any(repo.repo_id == repository for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False
