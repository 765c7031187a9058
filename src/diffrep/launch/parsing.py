"""Numbers as the command line writes them: 1,2,3."""

from __future__ import annotations

import typer


def integers(text: str, option: str) -> list[int]:
    """``0,50,100``; anything else is refused under the option's name."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers separated by commas, not '{text}'") from None


def numbers(text: str | None, option: str) -> list[float] | None:
    """``0.5,0.5,0.5``; None where nothing was given."""
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers separated by commas, not '{text}'") from None
