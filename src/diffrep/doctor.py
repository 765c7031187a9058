"""What this machine can do, what would be slow, and why. Reads and measures, never changes."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from diffrep import __version__, _torchvision_compat
from diffrep.assets import ASSETS
from diffrep.data.sources import DENSE_TASKS, KINDS
from diffrep.frozen.diffusion import DiffusionTeacher
from diffrep.frozen.passes import PassConfig
from diffrep.models.guided_unet import GuidedUNet, GuidedUNetConfig
from diffrep.randomness import seeded

EXTRAS = {"datasets": "hub", "tensorboard": "trackers", "wandb": "trackers", "trackio": "trackers"}
EXTRAS |= {"onnx": "export", "onnxscript": "export", "lightly": "selfsup"}
EXTRAS |= {"ray": "ray", "submitit": "slurm", "transformers": "text", "torch_fidelity": "scores"}
EXTRAS |= {"faster_coco_eval": "detect"}
PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate")

# What is timed: a small stack of the blocks that the teachers here are built of, up to its middle.
TRIAL = GuidedUNetConfig(
    image_size=32,
    out_channels=3,
    model_channels=128,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_factors=(1, 2),
    num_head_channels=64,
    scale_shift_norm=True,
    resblock_updown=True,
    attention_order="new",
)
TAP, BATCH, REPEATS = "middle_block", 4, 4
WAYS = {
    "plain": PassConfig(),
    "bf16": PassConfig(precision="bf16"),
    "channels_last": PassConfig(channels_last=True),
    "attention_written_out": PassConfig(attention="plain"),
}
WORTH = 1.1  # times faster; less is noise


def examine() -> dict[str, Any]:
    """Everything :func:`lines` says, as plain values."""
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    rate, passes = _trial("cuda" if cuda else "cpu")
    return {
        "diffrep": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "cuda": cuda,
        "gmacs_per_second": rate,
        "passes": passes,
        "torchvision_operators": "declared by diffrep" if _torchvision_compat.install() else "compiled",
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "triton": find_spec("triton") is not None,
        "free_memory_bytes": torch.cuda.mem_get_info()[0] if cuda else _free_memory(),
        "extras": {package: find_spec(package) is not None for package in EXTRAS},
        "weights_cached": {key: _cached(asset.location) for key, asset in ASSETS.items() if asset.unet},
        "data_kinds": sorted({*KINDS, *DENSE_TASKS} - {"digits"}),
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """One line per finding, the advice after an arrow."""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items())
    told = [
        f"diffrep {found['diffrep']} with {versions}",
        f"device: {found['device']}",
        f"{'float32' if found['cuda'] else 'one thread, float32'}: {found['gmacs_per_second']} G multiply-adds/s",
        f"torchvision operators: {found['torchvision_operators']}",
        f"data: digits comes along; other kinds read a path or an address: {', '.join(found['data_kinds'])}",
        f"disk free here: {found['free_bytes'] / 1e9:.0f} GB",
    ]
    if not found["cuda"]:
        told.append(
            "no GPU -> 8- and 32-pixel recipes are fine; at 64 pixels and above expect days: see --dry-run first"
        )
    if found["passes"]["bf16"] > WORTH:
        told.append("this device has fast bf16 -> --set train.precision=bf16 saves time (it changes rounding)")
    else:
        told.append("bf16 is no faster here -> keep train.precision=fp32")
    told += _options(found)
    missing = sorted({EXTRAS[package] for package, there in found["extras"].items() if not there})
    told += [f"extra '{extra}' is not complete -> pip install 'diffrep[{extra}]'" for extra in missing]
    absent = [key for key, there in found["weights_cached"].items() if not there]
    told += [f"weights not cached: {', '.join(absent)} -> fetched from the Hub at the first use"] if absent else []
    return told


# How a teacher is run


def _options(found: dict[str, Any]) -> list[str]:
    """One line per option of :class:`PassConfig`: what it brings and what to set."""
    gains = found["passes"]
    return [
        _gain("bf16", gains["bf16"], "precision=bf16", "--precision bf16", "precision=fp32"),
        _gain("channels-last", gains["channels_last"], "channels_last=true", "--channels-last", "channels_last=false"),
        _fused(gains["fused_attention"]),
        _compiled(found),
        f"free memory: {found['free_memory_bytes'] / 1e9:.1f} GB -> teacher, batches that do not fit: "
        f"--set method.passes.memory_mb=N (--memory-mb N) splits them into parts of N MB of activations",
    ]


def _gain(words: str, gain: float, setting: str, flag: str, default: str) -> str:
    told = f"teacher, {words}: {gain}x ->"
    if gain > WORTH:
        return f"{told} --set method.passes.{setting} ({flag}) saves time"
    return f"{told} {'slower' if gain < 1 / WORTH else 'no faster'} here: keep method.passes.{default}"


def _fused(gain: float) -> str:
    told = f"teacher, fused attention: {gain}x of attention written out ->"
    if gain < 1 / WORTH:
        return f"{told} --set method.passes.attention=plain (--attention plain) saves time"
    return f"{told} keep method.passes.attention=fused"


def _compiled(found: dict[str, Any]) -> str:
    """Not measured: the first compiled pass alone takes minutes."""
    needs = "a C++ compiler and triton" if found["cuda"] else "a C++ compiler"
    if found["compiler"] and (found["triton"] or not found["cuda"]):
        how = "--set method.passes.compile=true (--compile) for long runs: its first pass takes minutes"
        return f"teacher, torch.compile: {needs} found, gain not measured -> {how}"
    return f"teacher, torch.compile: needs {needs} -> keep method.passes.compile=false"


def _trial(device: str) -> tuple[float, dict[str, float]]:
    """G multiply-adds per second as the teachers come, and how many times faster each option makes them."""
    with seeded(0, "doctor"):
        teacher = DiffusionTeacher(GuidedUNet(TRIAL), "a stack of blocks", TRIAL.image_size)
        images = torch.rand(BATCH, 3, TRIAL.image_size, TRIAL.image_size).to(device)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(1 + REPEATS):  # in turn: a drifting machine touches all alike
        for name, config in WAYS.items():
            teacher.run_as(config)
            taken[name].append(_seconds(lambda: teacher.features(images, 0, [TAP]), device))
    best = {name: min(seconds[1:]) for name, seconds in taken.items()}  # the first was to warm up
    plain, written_out = best["plain"], best["attention_written_out"]
    gains = {name: plain / best[name] for name in ("bf16", "channels_last")} | {"fused_attention": written_out / plain}
    rate = BATCH * teacher.multiply_adds(TAP) / plain / 1e9
    return round(rate, 1), {name: round(gain, 2) for name, gain in gains.items()}


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Of the processor that works: CPU time, or time until the GPU is done."""
    if device == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _free_memory() -> int:
    """Bytes that Linux would give without swapping."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


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
