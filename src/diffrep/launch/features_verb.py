"""``diffrep features`` as Typer reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.launch import teacher_options as of
from diffrep.launch.parsing import integers

Perform = Callable[[dict[str, Any], bool], None]  # arguments of api.features, --json
ListTaps = Callable[[str, bool], None]  # teacher, --allow-code

FIELDS = ("pool", "dtype", "noise", "condition")

_option = typer.Option


def add_features_verb(app: typer.Typer, perform: Perform, list_them: ListTaps) -> None:
    """One verb more."""

    @app.command()
    def features(
        teacher: of.Teacher,
        data: Annotated[str, _option(help="Data reference, e.g. digits or cifar10:FOLDER.")],
        taps: Annotated[str, _option(help="Dotted names, comma-separated; --list-taps prints them.")] = "mid_block",
        timesteps: Annotated[str, _option(help="0,50,100")] = "0",
        out: Annotated[Path, _option(help="The folder to write.")] = Path("features"),
        split: str = "train",
        augment: Annotated[str, _option(help="Every view of it is written.")] = "none",
        pool: Annotated[int | None, _option(min=1, help="Cells per side; default whole maps.")] = None,
        dtype: str = "float16",
        noise: Annotated[str | None, _option(help="forward: noise the image to t.")] = None,
        condition: Annotated[str | None, _option(help="labels: tell the teacher each image's class.")] = None,
        precision: of.Precision = "fp32",
        channels_last: of.ChannelsLast = False,
        compile: of.Compile = False,
        attention: of.Attention = "fused",
        memory_mb: of.MemoryMb = None,
        image_size: Annotated[int | None, _option(min=1, help="Resize to this many pixels.")] = None,
        list_taps: Annotated[bool, _option(help="Print the teacher's taps and stop.")] = False,
        allow_code: Annotated[bool, _option("--allow-code", help="Allow python:module:factory.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Write a teacher's features to memory-mapped files, in constant memory; continues after an interruption.

        Example: diffrep features runs/my_teacher --data digits --taps mid_block,up_blocks.1 --timesteps 0,100 --pool 2
        """
        given = dict(locals())
        if list_taps:
            return list_them(teacher, allow_code)
        settings = {name: given[name] for name in FIELDS} | {"passes": of.pass_values(given)}
        settings |= {"taps": taps.split(","), "timesteps": integers(timesteps, "--timesteps")}
        chosen = {name: given[name] for name in ("teacher", "out", "split", "allow_code")}
        source = {"source": data, "augment": augment, "image_size": image_size}
        perform(chosen | {"data": source, "settings": settings}, as_json)
