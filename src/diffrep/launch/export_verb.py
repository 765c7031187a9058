"""``diffrep export`` as Typer reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Perform = Callable[[str, dict[str, Any], bool], None]  # name of a verb, its arguments, whether JSON is wanted

_option = typer.Option


def add_export_verb(app: typer.Typer, perform: Perform) -> None:
    """One verb more."""

    @app.command()
    def export(
        run: Annotated[Path, typer.Argument(help="A run folder with a student.")],
        out: Annotated[Path, _option(metavar="FOLDER", help="What to write; it must not exist.")],
        onnx: Annotated[bool, _option("--onnx", help="Also model.onnx, from images in [0, 1].")] = False,
        image_size: Annotated[int | None, _option(min=1, help="Of its images; default what the run says.")] = None,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """A student as others take it: a folder that timm loads, and ONNX.

        Example: diffrep export runs/my_student --out my_student --onnx
        """
        given = {"run": run, "out": out, "onnx": onnx, "image_size": image_size}
        perform("export", given, as_json)
