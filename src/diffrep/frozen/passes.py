"""How a frozen network is run: in which precision and layout, compiled or not, and in how much memory.

None of it changes what is computed, only how it is rounded; ``diffrep doctor`` says what each brings on a machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffrep.config import Config


class PassConfig(Config):
    """Of every pass through a teacher."""

    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products and convolutions; features come in float32
    channels_last: bool = False  # pixels of all channels side by side in memory
    compile: bool = False  # torch.compile, block by block; the first pass takes minutes
    attention: Literal["fused", "plain"] = "fused"  # plain: softmax(q k) written out, as official code does it
    memory_mb: int | None = Field(None, ge=1)  # a batch is split until its activations fit; None: it is not


@contextlib.contextmanager
def running(config: PassConfig, device: torch.device) -> Iterator[None]:
    """Everything inside is computed as ``config`` says."""
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    plain = sdpa_kernel(SDPBackend.MATH) if config.attention == "plain" else contextlib.nullcontext()
    with half, plain:
        yield


Compiled = dict[nn.Module, Callable[..., Any]]


def compiled_blocks(network: nn.Module, taps: Sequence[str]) -> Compiled:
    """The largest blocks with no tap inside them, each compiled by itself: a pass can then end at any tap."""
    found: Compiled = {}

    def visit(module: nn.Module, name: str) -> None:
        holds_tap = not name or any(tap.startswith(f"{name}.") for tap in taps)
        if holds_tap or isinstance(module, nn.ModuleList | nn.ModuleDict):
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)
        elif next(module.parameters(), None) is not None:
            found[module] = torch.compile(module.forward)

    visit(network, "")
    return found


@contextlib.contextmanager
def swapped_in(compiled: Compiled) -> Iterator[None]:
    """The compiled blocks in place of the plain ones, which counting and listing taps still see.

    Blocks of one class share their code, of which torch keeps 8 versions and runs further ones uncompiled: it may keep
    as many as there are blocks.
    """
    if not compiled:
        yield
        return
    import torch._dynamo

    for module, forward in compiled.items():
        module.forward = forward
    try:
        with torch._dynamo.config.patch(recompile_limit=8 * len(compiled), accumulated_recompile_limit=10_000):
            yield
    finally:
        for module in compiled:
            del module.forward
