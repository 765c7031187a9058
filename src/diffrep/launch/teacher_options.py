"""What every verb that reads a teacher asks for: which one, and how its passes are run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_option = typer.Option

TEACHER = (
    "A run folder; a diffusers folder or Hub id (a U-Net, a DiT, Stable Diffusion?prompt=TEXT); an official file, "
    "guided-diffusion's by its published name or ?like=adm-64, DiT's with ?vae=FOLDER; python:module:factory for any "
    "network of (x, timestep) or, EDM-style, (x, sigma); random: before any of them for untrained weights."
)

Teacher = Annotated[str, typer.Argument(help=TEACHER)]
Precision = Annotated[str, _option(metavar="fp32|bf16", help="Of the teacher's products; diffrep doctor times them.")]
ChannelsLast = Annotated[bool, _option("--channels-last", help="Memory layout of the teacher's maps.")]
Compile = Annotated[bool, _option("--compile", help="torch.compile the teacher, block by block.")]
Attention = Annotated[str, _option(metavar="fused|plain", help="Of the teacher.")]
MemoryMb = Annotated[int | None, _option(min=1, help="Split batches until the teacher's maps fit.")]
PASSES = ("precision", "channels_last", "compile", "attention", "memory_mb")


def pass_values(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``PassConfig`` among a verb's arguments."""
    return {name: given[name] for name in PASSES}
