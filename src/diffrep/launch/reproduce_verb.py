"""``diffrep reproduce`` as Typer reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Perform = Callable[[str, dict[str, Any], bool], None]  # name of a verb, its arguments, whether JSON is wanted

_option = typer.Option


def add_reproduce_verb(app: typer.Typer, perform: Perform) -> None:
    """One verb more."""

    @app.command()
    def reproduce(
        name: Annotated[str, typer.Argument(metavar="addp-base|addp-large", help="Whose published scores.")],
        out: Annotated[Path | None, _option(metavar="FOLDER", help="Default runs/NAME-stepsN.")] = None,
        steps: Annotated[int, _option(metavar="20|256", help="Cosine with 20, linear with 256.")] = 20,
        images: Annotated[int, _option(help="How many; another number is another protocol.")] = 50_000,
        model: Annotated[str | None, _option(metavar="REF", help="Networks, if not those in weights/.")] = None,
        reference: Annotated[str | None, _option(help="If not data/imagenet-val256; also .npz, .pt.")] = None,
        inception: Annotated[str | None, _option(metavar="FILE", help="Inception's weights, if elsewhere.")] = None,
        features: Annotated[str | None, _option(help="Without Inception: a classifier; its scores are no FID.")] = None,
        jobs: Annotated[int | None, _option(help="Processes on this machine.")] = None,
        ray: Annotated[str | None, _option(metavar="auto|local|ADDRESS", help="Make images as Ray tasks.")] = None,
        dry_run: Annotated[bool, _option("--dry-run", help="Find the files, say what it would cost, stop.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Published FID and IS again: find the files, make 50,000 images, score them, print both numbers.

        The same command goes on after an interruption; torchrun shares the work.

        Example: diffrep reproduce addp-base --steps 256 --jobs 2
        """
        given = dict(locals())
        del given["perform"], given["as_json"]
        perform("reproduce", given, as_json)
