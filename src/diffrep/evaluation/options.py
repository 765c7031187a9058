"""The options of ``diffrep score``, and the fields of a ``ScoreConfig`` that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from diffrep.errors import UserError

_option = typer.Option


def score_verb(perform: Callable[[dict[str, Any], bool], None]) -> Callable[..., None]:
    """The command as Typer reads it; ``perform`` gets the arguments of :func:`diffrep.api.score`, and --json."""

    def score(
        images: Annotated[str, typer.Argument(metavar="SET", help="Folder of PNG, synthetic set, data reference.")],
        reference: Annotated[str, _option(help="The same, or Inception statistics: .npz, .pt.")],
        protocol: Annotated[str | None, _option(help="inception, inception-val, inception-adm.")] = None,
        inception: Annotated[str | None, _option(metavar="FILE", help="Inception's weights, if elsewhere.")] = None,
        features: Annotated[str | None, _option(help="A classifier, in whose features to compare instead.")] = None,
        architecture: Annotated[str | None, _option(help="Of its weights file; default told by its keys.")] = None,
        mean: Annotated[str | None, _option(help="R,G,B, where its reference has none.")] = None,
        std: Annotated[str | None, _option(help="As --mean.")] = None,
        image_size: Annotated[int | None, _option(min=1, help="Resize both sides; default as stored.")] = None,
        precision_recall: Annotated[bool, _option("--precision-recall", help="These two as well; slow.")] = False,
        allow_code: Annotated[bool, _option("--allow-code", help="Allow python:module:factory.")] = False,
        as_json: Annotated[bool, _option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Score generated images: FID, IS, KID, or distances in the features of a classifier you name.

        Example: diffrep score my_images --reference imagenet-val256
        """
        look: dict[str, Any] = {"architecture": architecture}
        look |= {"mean": _triple(mean, "--mean"), "std": _triple(std, "--std")}
        look = {name: value for name, value in look.items() if value}
        if features is None and look:
            raise UserError("--architecture, --mean and --std belong to a classifier: name it with --features")
        judge = {"reference": features, **look} if features else None
        settings: dict[str, Any] = {"protocol": protocol, "inception": inception, "features": judge}
        settings |= {"image_size": image_size, "precision_recall": precision_recall}
        given = {"images": images, "reference": reference, "settings": settings, "allow_code": allow_code}
        perform(given, as_json)

    return score


def _triple(text: str | None, option: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"{option} takes numbers separated by commas, not '{text}'") from None
