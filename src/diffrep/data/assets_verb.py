"""``diffrep assets`` and ``diffrep assets fetch`` as Typer reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Show = Callable[[str, Any, bool], None]  # name of a verb, what it found, whether JSON is wanted

_option = typer.Option
_AsJson = Annotated[bool, _option("--json", help="Print JSON for programs.")]


def add_assets_verbs(app: typer.Typer, show: Show) -> None:
    """A verb, and one below it."""
    below = typer.Typer()
    app.add_typer(below, name="assets")

    @below.callback(invoke_without_command=True)
    def assets(context: typer.Context, as_json: _AsJson = False) -> None:
        """Published weights that recipes name: what for, size, licence, whether they are here, and where they belong.

        Example: diffrep assets
        """
        from diffrep.data.fetch import listing

        if context.invoked_subcommand is None:
            show("assets", listing(), as_json)

    @below.command()
    def fetch(
        key: Annotated[str, typer.Argument(help="A key that diffrep assets lists, or a published file's name.")],
        to: Annotated[Path | None, _option(metavar="FOLDER", help="Default weights/.")] = None,
        accept_licence: Annotated[bool, _option("--accept-licence", help="Of weights for non-commercial use.")] = False,
        as_json: _AsJson = False,
    ) -> None:
        """Fetch one: whole or not at all, its hash checked or recorded; the same command goes on where it stopped.

        Example: diffrep assets fetch adm-64
        """
        from diffrep.data.fetch import fetch as fetched

        show("fetch", fetched(key, to, accept_licence, lambda line: typer.echo(line, err=True)), as_json)
